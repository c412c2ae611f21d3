# SPDX-License-Identifier: Apache-2.0
"""Training data with damaged bytes, wrong types and odd text, raw and prepared."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.campaign import SIZE, call, examples
from tests.faults.damage import change_bytes, change_tree, damage_folder

pytestmark = pytest.mark.faults

HUGE = 10**5 if SIZE == 1 else 10**6  # of them in a text; tokenising a million takes 20 s
TALK = [{"role": "user", "content": "one 1"}, {"role": "assistant", "content": "two 2"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
# kind of record -> (keys of the source, a good record).
RECORDS = {
    "text": ({}, {"text": "one 1 two 2 three 3", "id": 7}),
    "chat": ({"messages_field": "messages"}, {"messages": TALK}),
    "tools": (
        {"messages_field": "messages"},
        {
            "messages": [
                TALK[0],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "3"},
                TALK[1],
            ],
            "tools": TOOLS,
        },
    ),
    "sharegpt": (
        {"shape": "sharegpt"},
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}], "system": "three"},
    ),
    "alpaca": ({"shape": "alpaca"}, {"instruction": "one", "input": "1", "output": "two", "history": [["a", "b"]]}),
    "completion": ({"shape": "prompt_completion"}, {"prompt": "one 1", "completion": "two 2"}),
}
ODD = [
    "\ud800",
    "\u202e\u0000",
    "a\u0301" * 99,
    "\U0010ffff",
    "\r\n\x85\u2028",
    "<|im_end|>",
    "one " * 20_000,
    "\x1b[2J",
    "",
    " \n",
]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def as_parquet(records: list) -> bytes | None:
    """The records as a table, or None where they make none."""
    try:
        table, file = pa.Table.from_pylist(records), io.BytesIO()
        pq.write_table(table, file)
    except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return file.getvalue()


def write_damaged(data, folder: Path, record: dict) -> tuple[Path, str]:
    """A file of records, of which one is changed, or whose bytes are. Returns it and what is wrong."""
    records = [json.loads(json.dumps(record)) for _ in range(4)]
    wrong = data.draw(st.sampled_from(["value", "value", "line", "bytes", "huge"]))
    done = wrong
    if wrong == "value":
        done = change_tree(
            data.draw, records[2], [*ODD, None, 3, 0.5, True, [], {}, [{}], [None], TALK], [*record, "x", "system"]
        )
    form = data.draw(st.sampled_from(["jsonl", "jsonl", "json", "parquet"]))
    content = as_parquet(records) if form == "parquet" else None
    if content is None:
        form = "jsonl" if form == "parquet" else form
        lines = [json.dumps(item) for item in records]
        if wrong == "line":
            lines[2] = data.draw(
                st.sampled_from(["{", "[1]", "null", "{}", "[" * 10**5, "9" * 5000, "\x00", '{"a": NaN}', "}{"])
            )
        elif wrong == "huge":
            lines[2] = json.dumps(record | {"text": "one 1 " * HUGE})
        content = "\n".join(lines).encode() if form == "jsonl" else f"[{','.join(lines)}]".encode()
    pack = data.draw(st.sampled_from(sorted(PACK))) if form != "parquet" else ""
    content = PACK[pack](content)
    if wrong == "bytes":
        content = change_bytes(data.draw, content)
    file = folder / f"records.{form}{pack}"
    file.write_bytes(content)
    return file, f"{file.name}: {done}"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", RECORDS)
def test_damaged_records(kind, models, campaign):
    fields, record = RECORDS[kind]

    @examples(20)
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as folder:
            home, output = Path(folder) / "in", Path(folder) / "out/result"
            home.mkdir()
            output.parent.mkdir()
            file, done = write_damaged(data, home, record)
            (home / "recipe.yaml").write_text(
                yaml.safe_dump(
                    {
                        "output": str(output),
                        "tokenizer": str(models / "base"),
                        "sequence_length": 64,
                        "max_truncated_share": 1.0,
                        "sources": [fields | {"path": str(file)}],
                    }
                )
            )
            if data.draw(st.booleans()):
                arguments = ("data", "prepare", home / "recipe.yaml", "--workers", "1")
            else:
                arguments = ("data", "show", home / "recipe.yaml")
            campaign.run(*arguments, inputs=home, output=output, damage=done)

    attempt()


@pytest.fixture(scope="module")
def prepared(models, tmp_path_factory):
    """Rows of the corpus."""
    home = tmp_path_factory.mktemp("prepared")
    (home / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "output": str(home / "rows"),
                "tokenizer": str(models / "base"),
                "sequence_length": 32,
                "sources": [{"path": str(models / "corpus")}],
            }
        )
    )
    assert call("data", "prepare", home / "recipe.yaml", "--workers", "1").code == 0
    return home / "rows"


@pytest.mark.timeout(1800)
def test_damaged_rows(models, prepared, campaign):
    @examples(30)
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as folder:
            home, output = Path(folder) / "in", Path(folder) / "out/result"
            output.parent.mkdir()
            rows = home / "rows"
            shutil.copytree(prepared, rows)
            index = rows / "index.json"
            act = data.draw(st.sampled_from(["index", "bytes", "folder"]))
            if act == "index":
                tree = json.loads(index.read_text())
                done = change_tree(data.draw, tree)
                index.write_text(json.dumps(tree))
            elif act == "bytes":
                file = data.draw(st.sampled_from(sorted(item for item in rows.rglob("*") if item.is_file())))
                file.write_bytes(change_bytes(data.draw, file.read_bytes()))
                done = f"{file.name}: bytes"
            else:
                done = damage_folder(data.draw, data.draw(st.sampled_from([rows, rows / "rows"])))
            (home / "recipe.yaml").write_text(
                yaml.safe_dump(
                    {
                        "method": "cpt",
                        "model": str(models / "hybrid"),
                        "output": str(output),
                        "trainable": {"all": 1e-3},
                        "data": {"prepared": str(rows)},
                        "training": {"max_steps": 1, "per_device_train_batch_size": 1},
                    }
                )
            )
            arguments = data.draw(st.sampled_from([("data", "show", rows), ("finetune", home / "recipe.yaml")]))
            campaign.run(*arguments, inputs=home, output=output, damage=done)

    attempt()
