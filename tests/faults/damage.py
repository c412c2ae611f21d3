# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a file: generated changes of bytes, of JSON and YAML values, of safetensors and folders."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[..., Any]

# Of the wrong type, at the ends of what a type holds, or text that does harm where it is printed, opened or imported.
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    10**6,
    2**31,
    2**63,
    10**30,
    -(10**12),
    0.0,
    0.5,
    -0.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    " ",
    "x",
    "1",
    "gelu",
    "float16",
    "float64",
    "int8",
    "torch.load",
    "auto",
    "none",
    "qwen3",
    "llama",
    "hybrid_qwen3",
    "mamba2",
    "gdn",
    "GDN",
    "yarn",
    "org/name",
    "/etc/passwd",
    "../../etc/passwd",
    "a\nhmf: b",
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "é" * 300,
    "x" * 10**5,
    [],
    [0],
    [None],
    [[]],
    [-1],
    ["x"],
    {},
    {"x": 1},
    {"": None},
    {"rope_type": "yarn", "factor": 0},
    {"rope_type": "x"},
    {"0": {}},
]
# Keys that libraries look at wherever they stand.
KEYS = [
    "",
    "x",
    "auto_map",
    "_attn_implementation",
    "attn_implementation",
    "quantization_config",
    "rope_scaling",
    "rope_parameters",
    "torch_dtype",
    "dtype",
    "text_config",
    "vision_config",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "tie_word_embeddings",
    "transformers_weights",
    "hybrid_override_pattern",
    "gdn_config",
    "fused_layers",
    "model_type",
    "architectures",
    "is_encoder_decoder",
    "pruned_heads",
    "num_labels",
    "id2label",
    "problem_type",
    "chunk_size_feed_forward",
    "output_attentions",
    "use_cache",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "tokenizer_class",
    "added_tokens_decoder",
    "extra_special_tokens",
    "chat_template",
    "__class__",
]
TEXTS = [
    "",
    "{",
    "[",
    "null",
    "3",
    '"x"',
    "[1]",
    "{}",
    '{"a": 1, "a": 2}',
    "[" * 3000,
    "[" * 10**5,
    '{"a": ' * 2000,
    "9" * 5000,
    '{"a": NaN}',
    "\0" * 64,
    "\ufeff{}",
    "PK\x03\x04",
    "version https://git-lfs.github.com/spec/v1\n",
    "<!DOCTYPE html>",
    '{"a": "\\ud800"}',
]
YAML_TEXTS = [
    *TEXTS,
    "a: b: c",
    "- 1\na: 2",
    "a: 2020-13-45",
    "a: &x [*x]",
    "a: *x",
    "!!python/object/apply:os.system ['true']",
    "a: !!binary x",
    "? [1, 2]\n: 3",
    "\t",
    "a: 1\na: 2",
    "{a: b",
    "%YAML 9.9\n---\na: 1",
    "--- 1\n--- 2",
    "a: 0o9",
    "<<: 3",
    "a: !x 1",
    "a: 1:99:99",
    "? {a: 1}\n: 2",
    "\x07",
    "a: '",
    "a: |\n x\n y: 2",
    "a: ''''\nb: [\n",
]
TEMPLATES = [
    "",
    "{{",
    "{% for %}",
    "{% endif %}",
    "{{ a.b.c }}",
    "{{ messages[9].x }}",
    "{{ raise_exception('a\nb') }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ none() }}",
    "{{ messages | tojson(indent=-1) }}",
    "{{ messages | nothing }}",
    "{{ x is divisibleby 0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% generation %}x",
    "\0",
    "é" * 100,
    "{{ messages[0] }}",
]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree of dicts and lists."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def _spelled(name: str) -> str:
    return name.replace("_", "-") if "_" in name else name[::-1]


def change_tree(draw: Draw, tree: Any, values: list[Any] = VALUES, keys: list[str] = KEYS) -> str:
    """Change a tree of dicts and lists in one to three places, in place. Returns what was done."""
    done = []
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        where, key = draw(st.sampled_from(found))
        act = draw(st.sampled_from(["value", "value", "value", "delete", "rename", "add", "move", "wrap", "near"]))
        text = st.text(max_size=8).filter(lambda text: not text.startswith("/"))
        value = copy.deepcopy(draw(st.sampled_from(values) | st.integers() | st.floats() | text))
        done.append(f"{act} {str(key)[:40]!r} {str(value)[:40]!r}")
        if act == "delete":
            del where[key]
        elif act == "rename" and isinstance(where, dict):
            where[_spelled(str(key))] = where.pop(key)
        elif act == "add" and isinstance(where, dict):
            where[draw(st.sampled_from(keys))] = value
        elif act == "move":
            other, name = draw(st.sampled_from(found))
            there = name in other if isinstance(other, dict) else name < len(other)
            where[key] = copy.deepcopy(other[name]) if there else value
        elif act == "wrap":
            where[key] = [where[key]]
        elif act == "near" and isinstance(where[key], int | float):
            where[key] = draw(st.sampled_from([-1, 1, 0.5])) + where[key]
        else:
            where[key] = value
    return "; ".join(done)


def change_bytes(draw: Draw, content: bytes) -> bytes:
    """Cut, flip, insert, take out, double or recode."""
    at = draw(st.integers(0, len(content)))
    act = draw(
        st.sampled_from(["cut", "flip", "insert", "take out", "double", "empty", "utf-16", "bom", "nul", "lines"])
    )
    if act == "cut":
        return content[:at]
    if act == "flip":
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if act == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=16)) + content[at:]
    if act == "take out":
        return content[:at] + content[at + draw(st.integers(1, 64)) :]
    if act == "utf-16":
        return content.decode("latin-1").encode("utf-16")
    if act == "lines":
        return content.replace(b"\n", b"\r")
    return {"double": content * 2, "empty": b"", "bom": b"\xef\xbb\xbf" + content, "nul": content + b"\0"}[act]


def change_safetensors(draw: Draw, content: bytes) -> tuple[bytes, str]:
    """Change bytes, or names, dtypes, shapes and offsets in the header, or the length before it."""
    act = draw(st.sampled_from(["bytes", "header", "header", "length", "values"]))
    size = int.from_bytes(content[:8], "little")
    if act == "header":
        header = json.loads(content[8 : 8 + size])
        act = change_tree(draw, header, [*VALUES, "F32", "BF16", "I64", "F8_E4M3", "Q4", [0, 4], [2, 2], [2**40]])
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + size :], act
    if act == "length":
        length = draw(st.sampled_from([0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1]))
        return length.to_bytes(8, "little") + content[8:], f"header of {length} bytes"
    if act == "values":
        at = 8 + size + 4 * draw(st.integers(0, (len(content) - 8 - size) // 4 - 1))
        value = draw(st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"]))
        return content[:at] + value + content[at + 4 :], f"{value!r} at byte {at}"
    return change_bytes(draw, content), "bytes"


def damage_file(draw: Draw, file: Path) -> str:
    """Change what is in one file of a checkpoint, by its kind."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        changed, done = change_safetensors(draw, content)
        file.write_bytes(changed)
        return f"{file.name}: {done}"
    if file.suffix == ".json" and draw(st.integers(0, 3)):
        tree = json.loads(content)
        done = change_tree(draw, tree)
        file.write_text(json.dumps(tree))
        return f"{file.name}: {done}"
    if file.suffix == ".jinja" and draw(st.booleans()):
        file.write_text(done := draw(st.sampled_from(TEMPLATES)))
        return f"{file.name}: {done[:80]}"
    if draw(st.booleans()):
        file.write_text(done := draw(st.sampled_from(TEXTS)))
        return f"{file.name}: {done[:80]!r}"
    file.write_bytes(change_bytes(draw, content))
    return f"{file.name}: bytes"


STRANGERS = [
    "modeling_x.py",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "adapter_config.json",
    "params.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "additional_chat_templates",
    "tokenizer.model",
    "config.yaml",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "processor_config.json",
    "a\nhmf: b",
    ".hidden",
    "consolidated.safetensors",
]


def damage_folder(draw: Draw, folder: Path) -> str:
    """Take a file away, put a folder, a link or nothing in its place, or put a stranger beside it."""
    file = draw(st.sampled_from(sorted(item for item in folder.iterdir() if item.is_file())))
    act = draw(st.sampled_from(["missing", "folder", "outside", "dangling", "loop", "absolute", "twin", "stranger"]))
    if act == "stranger":
        name = draw(st.sampled_from(STRANGERS))
        if not (folder / name).exists():
            (folder / name).write_bytes(draw(st.sampled_from([b"", b"{}", b"[", b"\0" * 99, file.read_bytes()])))
        return f"{name!r} like {file.name}"
    kept = folder.parent / f"{folder.name}.{file.name}"
    file.rename(kept)
    if act == "folder":
        file.mkdir()
    elif act == "twin":
        shutil.copy(kept, folder / file.name.upper())
    elif act == "absolute":
        file.symlink_to("/dev/null")
    elif act != "missing":
        file.symlink_to({"outside": os.path.join("..", kept.name), "dangling": "nothing", "loop": file.name}[act])
    return f"{file.name}: {act}"
