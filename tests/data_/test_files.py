# SPDX-License-Identifier: Apache-2.0
"""One reader: what files hold is read, however they are packed, or named in one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from datetime import date
from decimal import Decimal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmf.config.data import DataRecipe, SourceSettings
from hmf.config.places import PairSettings
from hmf.config.recipes import read_recipe
from hmf.config.runs import DistillRecipe
from hmf.config.strict import parse_json, parse_yaml
from hmf.data import files
from hmf.data.conversation import normalise
from hmf.data.encoding import IGNORED, encode_chat
from hmf.data.shards import Counts, Encoder
from hmf.data.sources import Record, Source, content, pair_of
from hmf.errors import HmfError


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd, ".ZST": zstd}
TEXTS = ["a river", "é 😀 \u2028 \x85 end", "three\r\nlines\n"]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def read(path, **settings):
    settings, texts = SourceSettings(path=str(path), **settings), []
    for record in Source(settings).records():
        try:
            texts.append(content(record, settings))
        except HmfError as error:
            raise HmfError(f"{record.where}: {error}") from None
    return texts


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "A.ndjson", "a.json", "array.Json"])
def test_json_is_read_however_it_is_packed(tmp_path, name, packed):
    data = LINES
    if name == "array.Json":
        data = json.dumps([{"text": text} for text in TEXTS], indent=2).encode()
    path = tmp_path / f"{name}{packed}"
    for variant in (data, b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), b"\n \n" + data + b"\n\n"):
        half = len(variant) // 2
        path.write_bytes(PACK[packed](variant[:half]) + PACK[packed](variant[half:]))  # streams one after the other
        assert read(path) == read(tmp_path) == TEXTS


ROWS = st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers() | st.none(), max_size=3))


@given(rows=ROWS, indent=st.sampled_from([None, 1]), chunk=st.integers(1, 40), array=st.booleans())
def test_objects_are_those_of_the_json_module(tmp_path_factory, rows, indent, chunk, array):
    texts = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(f"[{', '.join(texts)}]" if array else "\n".join(texts), newline="", encoding="utf-8")
    before, files.CHUNK = files.CHUNK, chunk
    try:
        assert [row for _, _, row in files.objects(path)] == rows
    finally:
        files.CHUNK = before


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 5\n"
BAD = {
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "cut.jsonl.gz:[34]: cannot be read .*ended before"),
    "cut.jsonl.zst": (zstd(LINES)[:-3], "cut.jsonl.zst:.* cannot be read .*Truncated"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-9], "cut.jsonl.xz:.* cannot be read"),
    "more.jsonl.gz": (gzip.compress(LINES) + b"more", "more.jsonl.gz:[34]: cannot be read"),
    "flip.jsonl.gz": (gzip.compress(LINES)[:20] + b"\0\0\0" + gzip.compress(LINES)[23:], "flip.jsonl.gz:.* cannot be"),
    "none.jsonl.zst": (b"not really zstd", "none.jsonl.zst:1: cannot be read"),
    "none.jsonl.gz": (LINES, "none.jsonl.gz:1: cannot be read .*gzipped"),
    "none.jsonl.bz2": (LINES, "none.jsonl.bz2:1: cannot be read"),
    "none.jsonl.xz": (LINES, "none.jsonl.xz:1: cannot be read"),
    "zero.jsonl.gz": (b"", "zero.jsonl.gz: has 0 bytes"),
    "zero.json.zst": (b"", "zero.json.zst: has 0 bytes"),
    "zero.txt.xz": (b"", "zero.txt.xz: has 0 bytes"),
    "packed.jsonl": (gzip.compress(LINES), "packed.jsonl:1: compressed with gzip; add .gz"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "utf16.jsonl:1: encoded in UTF-16"),
    "utf16le.jsonl": (LINES.decode().encode("utf-16-le"), r"utf16le.jsonl:1: not UTF-8 text \(byte 2 is 0\)"),
    "utf16.json": (LINES.decode().encode("utf-16"), "utf16.json:1: cannot be read"),
    "latin.jsonl": (LINES + '{"text": "café"}'.encode("latin-1"), r"latin.jsonl:4: not UTF-8 .* byte 14"),
    "latin.txt": (b"caf\xe9!", r"latin.txt: not UTF-8 .* byte 4"),
    "nul.txt": (b"a\0b", "nul.txt: not UTF-8 text"),
    "nul.jsonl": (LINES + b'{"text": "a\0"}', "nul.jsonl:4: not UTF-8 text"),
    "twice.jsonl": (LINES + b'{"text": "a", "text": "b"}', "jsonl:4: not valid JSON .the key 'text' occurs twice"),
    "twice.json": (
        b'[{"text": "a"},\n{"text": "a", "text": "b"}]',
        "json:2: not valid JSON .the key 'text' occurs twice",
    ),
    "nested.jsonl": (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", "nested.jsonl:1: not valid JSON .it is nested too"),
    "nested.json": (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", "nested.json:1: not valid JSON .it is nested too"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not valid JSON .it is nested too deeply"),
    "half.jsonl": (
        b'{"text": "a \\ud83d b"}',
        r"half.jsonl:1: text: a lone surrogate \(\\ud83d\) is not valid text; remove",
    ),
    "open.json": (b'[{"text": "a"},\n{"text": "b"}', "open.json:2: the array does not end"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b', "cut.json:2: not valid JSON .Unterminated string"),
    "more.json": (b'[{"text": "a"}]\n{"text": "b"}', "more.json:2: '{' is not valid here, where the end is expected"),
    "numbers.json": (b"[1, 2]", "numbers.json:1: '1' is not valid here"),
    "wrong.json": (b'{"text": "a"}\n{"text" "b"}' + b" " * 99, "wrong.json:2: not valid JSON .Expecting ':'"),
    "pointer.parquet": (POINTER, "pointer.parquet: is a pointer of Git LFS"),
    "pointer.txt": (POINTER, "pointer.txt: is a pointer of Git LFS"),
    "none.parquet": (b"", "none.parquet: row 0: not readable Parquet"),
    "a.parquet.gz": (b"", "nothing to read .a.parquet.gz"),
    "a.xlsx": (b"text\na", "nothing to read .a.xlsx"),
    "long.csv": (b"text,id\n\na,b,c\n", "long.csv:3: the row does not have 2 cells, as the first line has"),
    "short.csv": (b'id,text\n1,"a\nb"\n2\n', "short.csv:4: the row does not have 2 cells"),
    "twice.csv": (b"text,text\na,b\n", "twice.csv:1: two columns have the name 'text'"),
    "open.csv": (b'text,id\n"a,b\n', "open.csv:2: not valid CSV"),
    "semicolon.csv": (b"text;id\na;b\n", "semicolon.csv:2: no field 'text'; the row has 'text;id'"),
    "utf16.csv": ("text\na\n".encode("utf-16"), "utf16.csv:1: cannot be read .'utf-8' codec"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path, name):
    data, expected = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(HmfError, match=expected) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_cells_of_csv_are_texts_as_they_are_in_the_file(tmp_path, name):
    """No number loses its zeros, and no text such as NA is read as a missing value."""
    values = ["007", "NA", "null", "1e5", 'a "b", c', "two\r\nlines", "é 😀"]
    written, mark = io.StringIO(), "\ufeff"
    rows = csv.writer(written, delimiter="\t" if "TSV" in name else ",")
    rows.writerows([["instruction", "input", "output", "n"]] + [["q", value, value, 1] for value in values])
    (tmp_path / name).write_bytes(PACK[".gz" if ".gz" in name else ""]((mark + written.getvalue()).encode()))
    settings = SourceSettings(path=str(tmp_path), shape="alpaca", name="rows")
    records = list(Source(settings).records())
    assert [record.where for record in records] == [f"{name}:{line}" for line in (2, 3, 4, 5, 6, 7, 10)]
    found = [content(record, settings) for record in records]
    assert [[message["content"] for message in talk.messages] for talk in found] == [[f"q\n{v}", v] for v in values]
    assert {talk.unread for talk in found} == {("n",)}
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(HmfError, match="holds csv and jsonl files; set format to the one to read"):
        Source(settings)


def test_a_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 1000)
    monkeypatch.setattr(files, "CHUNK", 100)
    row = json.dumps({"text": "a" * 2000}).encode()
    for name, expected in (
        ("a.jsonl.gz", "a.jsonl.gz:2: the line has more"),
        ("a.json.gz", "a.json.gz:2: the object has"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "b"}\n' + row))
        with pytest.raises(HmfError, match=expected):
            read(tmp_path / name)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(row))
    with pytest.raises(HmfError, match="a.txt.gz: has more than"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*.jsonl", "c?.jsonl", "[d]/a.jsonl", "e[1]"])
def test_a_name_that_exists_is_no_pattern(tmp_path, name):
    place = tmp_path / name / "a.jsonl" if not name.endswith("jsonl") else tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_text('{"text": "a"}')
    for other in ("a1.jsonl", "b2.jsonl", "c3.jsonl"):
        (tmp_path / other).write_text('{"text": "other"}')
    assert read(tmp_path / name) == ["a"]


def test_a_folder_with_a_held_out_split_needs_a_pattern(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/train_sft-0.jsonl", "data/latest-training.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    both = ["data/latest-training.jsonl", "data/train_sft-0.jsonl"]
    assert read(tmp_path) == both
    held_out = (
        "testSet.jsonl",
        "data/devset.jsonl",
        "TESTDATA.jsonl",
        "tests.jsonl",
        "held_out.jsonl",
        "holdout/0.jsonl",
    )
    for name in ("data/test_sft-0.jsonl", "Validation.jsonl", "data/train_eval.jsonl", *held_out):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
        with pytest.raises(HmfError, match=r"a training split \(.*train.*\) and a held-out one"):
            read(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "name", ["train-0.jsonl", "Train.jsonl", "trainSet.jsonl", "train/0.jsonl", "sub/training-1/b/train.jsonl"]
)
def test_the_patterns_that_an_error_about_splits_names_read_the_files(tmp_path, name):
    for file in (name, "test.jsonl", "train.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps({"text": file}))
    with pytest.raises(HmfError, match="a held-out one") as error:
        read(tmp_path, format="jsonl")
    words = str(error.value).split()
    assert read(words[words.index("example") + 1].rstrip(",")) == [name]
    assert sorted(read(words[words.index("or") + 1], format="jsonl")) == sorted([name, "test.jsonl"])


def test_one_file_is_no_two_splits(tmp_path):
    (tmp_path / "train_eval.jsonl").write_text('{"text": "a"}')
    assert read(tmp_path) == ["a"]


def test_a_pointer_is_no_data_set(tmp_path):
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "data.arrow").write_bytes(POINTER)
    for place in ({"path": str(tmp_path)}, {"dataset": str(tmp_path)}):
        with pytest.raises(HmfError, match=r"data.arrow: is a pointer of Git LFS"):
            Source(SourceSettings(**place))


def test_files_of_a_data_set_are_read_as_they_are(tmp_path):
    """The datasets library would write the second text with quotes, 1 as 1.0, 007 as 7, and no text in place of NA."""
    folder, arguments = tmp_path / "rows", ({"n": 1, "when": "2024-01-02T03:04:05"}, {"n": 1.5, "when": ["x"]})
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: ['0.jsonl', '1.jsonl']\n---\n")
    rows = []
    for number, content_ in enumerate(("a", [{"type": "text", "text": "b"}])):
        call = {"function": {"name": "f", "arguments": arguments[number]}}
        rows.append(said(("user", "NA"), ("assistant", content_)))
        rows[-1][1]["tool_calls"] = [call]
        (folder / f"{number}.jsonl").write_text(json.dumps({"messages": rows[-1]}))
    (folder / "other.jsonl").write_text("?")
    settings = SourceSettings(dataset=str(folder), messages_field="messages")
    records = list(Source(settings).records())
    assert [content(record, settings).messages for record in records] == rows
    assert [record.where for record in records] == ["0.jsonl:1", "1.jsonl:1"]
    tables = tmp_path / "tables"
    tables.mkdir()
    (tables / "train.csv").write_text("prompt,completion\n007,NA\n")
    (tables / "test.csv").write_text("prompt,completion\nx,y\n")
    settings = SourceSettings(dataset=str(tables), shape="prompt_completion")
    [record] = Source(settings).records()
    assert [message["content"] for message in content(record, settings).messages] == ["007", "NA"]
    with pytest.raises(HmfError, match="unknown split 'dev'; valid: .*train"):
        list(Source(SourceSettings(dataset=str(tables), split="dev")).records())


@pytest.mark.parametrize(
    ("file", "text_", "options"),
    [
        ("a.csv", "text;id\nhi;1\n", 'sep: ";"'),
        ("a.csv", "hi,1\n", "header: null\n  names: [text, id]"),
        ("a.json", '{"data": [{"text": "hi"}], "version": 1}', "field: data"),
    ],
    ids=["separator", "no header", "field"],
)
def test_options_of_a_data_set_are_kept(tmp_path, file, text_, options):
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {file}\n  {options}\n---\n")
    (tmp_path / file).write_text(text_)
    settings = SourceSettings(dataset=str(tmp_path))
    assert [content(record, settings) for record in Source(settings).records()] == ["hi"]


@pytest.mark.parametrize("name", ["script.py", "train.zip", "train.wav"])
def test_errors_of_the_datasets_library_are_one_line(tmp_path, name):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / ("rows.py" if name.endswith("py") else name)).write_bytes(b"RIFF")
    with pytest.raises(HmfError, match="rows: the datasets library cannot read it") as caught:
        list(Source(SourceSettings(dataset=str(tmp_path / "rows"))).records())
    assert "\n" not in str(caught.value)


def test_a_file_is_no_data_set(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(HmfError, match=r"sources.a.dataset: .*a.jsonl: is a file; write path in place of dataset"):
        Source(SourceSettings(dataset=str(tmp_path / "a.jsonl")))


def test_files_that_are_not_read_are_named(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "x.jsonl").mkdir()
    for name in ("a.jsonl", "inner/b.JSONL", "x.jsonl/c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    for name in ("LICENSE", "b.bin", ".git/d.jsonl", "z.sha256"):
        (tmp_path / name).write_text("?")
    (tmp_path / "link").symlink_to(tmp_path / "inner")
    assert sorted(read(tmp_path)) == ["a.jsonl", "inner/b.JSONL", "x.jsonl/c.jsonl"]
    assert ": not read: .git/, LICENSE, b.bin and 2 more" in capsys.readouterr().err
    assert read(tmp_path / "*.jsonl") == ["a.jsonl"]
    assert ": not read: x.jsonl/" in capsys.readouterr().err
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(HmfError, match="gone.jsonl: is not a regular file, or is a broken link"):
        read(tmp_path)
    with pytest.raises(HmfError, match="nothing to read"):
        read(tmp_path / "*.nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HmfError, match="pipe: is neither a file nor a folder"):
        read(tmp_path / "pipe")


def test_a_format_chooses_files_by_their_suffix_or_those_without_one(tmp_path, capsys):
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "part-0").write_text('{"text": "a"}')
    assert read(tmp_path, format="jsonl") == ["a"]
    assert ": not read: README.md" in capsys.readouterr().err
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    assert read(tmp_path, format="jsonl") == ["b"]
    assert read(tmp_path / "part-*", format="jsonl") == ["a"]
    with pytest.raises(HmfError, match="holds text files, but rows with fields are needed"):
        read(tmp_path / "README.md", messages_field="messages")


# ---- shapes


def shaped(tmp_path, row, kind=SourceSettings, **settings):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    made = kind(path=str(tmp_path / "rows.json"), **settings)
    [record] = Source(made).records()
    return (content if kind is SourceSettings else pair_of)(record, made)


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TALK = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
ALPACA = {"instruction": "Add.", "input": "1+1", "output": "2", "system": "Be brief.", "history": [["Hi", "Hello"]]}
SHAPED = {
    "sharegpt": ({"id": 7, "conversations": TALK}, said(("user", "1+1?"), ("assistant", "2"))),
    "alpaca": (
        ALPACA,
        said(
            ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1+1"), ("assistant", "2")
        ),
    ),
    "prompt_completion": ({"prompt": "1+1?", "completion": "2"}, said(("user", "1+1?"), ("assistant", "2"))),
}


@pytest.mark.parametrize("shape", SHAPED)
def test_a_shape_is_one_key(tmp_path, shape):
    row, messages = SHAPED[shape]
    assert shaped(tmp_path, row, shape=shape).messages == messages
    for name in row.keys() - {"id", "input", "system", "history"}:
        fix = "set the recipe's key" if name == "conversations" else f"shape {shape} needs it"
        with pytest.raises(HmfError, match=f"no field '{name}'; the row has .*{fix}"):
            shaped(tmp_path, {key: value for key, value in row.items() if key != name}, shape=shape)


def test_only_the_completion_is_supervised(tmp_path, tokenizer):
    """As in TRL; answers in the prompt are context, unless they have a weight."""
    prompt = said(("user", "1+1?"), ("assistant", "2"), ("user", "2+1?"))
    row = {"prompt": prompt, "completion": said(("assistant", "3"))}
    for weight, learnt in ((None, ["3<|im_end|>"]), (0, ["3<|im_end|>"]), (1, ["2<|im_end|>", "3<|im_end|>"])):
        prompt[1]["weight"] = weight
        documents = encode_chat(tokenizer, shaped(tmp_path, row, shape="prompt_completion").messages)
        labels = [[label for label in document.labels if label != IGNORED] for document in documents]
        assert [tokenizer.decode(ids) for ids in labels] == learnt


def test_an_ignored_weight_does_not_supervise_the_prompt(tmp_path, tokenizer):
    prompt = said(("user", "1+1?"), ("assistant", "2"), ("user", "2+1?"))
    prompt[1]["weight"] = 1
    row = {"prompt": prompt, "completion": [*said(("assistant", "3"))]}
    source = {"path": str(tmp_path / "a.jsonl"), "shape": "prompt_completion", "ignore_keys": ["weight"]}
    recipe = DataRecipe(output="o", tokenizer="teacher", sequence_length=64, sources=[source])
    record = Record("a.jsonl:1", row, 0)
    [document] = Encoder.of(recipe.sources[0], recipe).encode(record, tokenizer, Counts())
    assert tokenizer.decode([label for label in document.labels if label != IGNORED]) == "3<|im_end|>"


def test_sharegpt_has_tools_and_calls(tmp_path):
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ]
    row = {"conversations": turns, "system": "Be brief.", "tools": json.dumps([{"name": "add"}])}
    found = shaped(tmp_path, row, shape="sharegpt")
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert found.tools == [{"name": "add"}]


REFUSED = {
    "speaker": ({"conversations": [{"from": "humman", "value": "a"}]}, "sharegpt", "did you mean 'human'"),
    "turn and message": (
        {"conversations": [TALK[0] | {"content": "a"}]},
        "sharegpt",
        r"conversations\[0\].content: a turn has from and value instead",
    ),
    "two systems": (
        {"conversations": [{"from": "system", "value": "a"}], "system": "b"},
        "sharegpt",
        "have a system turn",
    ),
    "field": ({"conversations": TALK, "functions": [{"name": "f"}]}, "sharegpt", "'functions' .*ignore_fields"),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, "alpaca", r"history\[0\]: a list of two texts"),
    "surrogate": ({"instruction": "a", "output": "\ud83d"}, "alpaca", r"messages\[1\].content: a lone surrogate"),
    "empty": ({"prompt": "", "completion": "a"}, "prompt_completion", "prompt: is empty"),
    "unwanted": ({"prompt": "a", "completion": "b", "label": False}, "prompt_completion", "'label' is false, as KTO"),
    "unwanted, as a number": (
        {"prompt": "a", "completion": "b", "label": 0},
        "prompt_completion",
        "'label' is 0, as KTO .*ignore_fields",
    ),
    "messages": ({"conversations": said(("user", "a"))}, "sharegpt", "leave shape out and set messages_field"),
    "messages as text": (
        {"prompt": json.dumps(said(("user", "a"))), "completion": "b"},
        "prompt_completion",
        "prompt: is text that holds messages as JSON; store the list",
    ),
    "message as text": (
        {"prompt": "a", "completion": json.dumps(said(("assistant", "b"))[0])},
        "prompt_completion",
        "completion: is text that holds messages as JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_shape_does_not_read_is_refused(tmp_path, name):
    row, shape, expected = REFUSED[name]
    with pytest.raises(HmfError, match=expected):
        shaped(tmp_path, row, shape=shape)


@pytest.mark.parametrize("text", ['[{"role": "x"}]', "[]", "{}", "[1]", '{"role": ', "[a] list"])
def test_other_json_is_text(tmp_path, text):
    row = {"prompt": text, "completion": text}
    assert shaped(tmp_path, row, shape="prompt_completion").messages == said(("user", text), ("assistant", text))


def test_further_keys_of_a_turn_are_those_of_a_message(tmp_path, tokenizer):
    talk = [TALK[0] | {"weight": None, "markdown": None}, TALK[1] | {"weight": 0}, TALK[0], TALK[1] | {"weight": 1.0}]
    found = shaped(tmp_path, {"conversations": talk}, shape="sharegpt").messages
    *_, last = encode_chat(tokenizer, found)
    labels = [label for label in last.labels if label != IGNORED]
    assert tokenizer.decode(last.ids).count("assistant\n") == 2
    assert tokenizer.decode(labels).startswith("2") and len(labels) == 2
    talk[1] |= {"score": 5}
    found = shaped(tmp_path, {"conversations": talk}, shape="sharegpt").messages
    with pytest.raises(HmfError, match=r"messages\[1\].score: unknown key .*ignore_keys"):
        encode_chat(tokenizer, found)
    assert encode_chat(tokenizer, found, ignore_keys=["score"])[-1] == last


def test_fields_that_belong_to_a_conversation_are_read_or_ignored_by_name(tmp_path):
    row = {"messages": said(("user", "a"), ("assistant", "b")), "parallel_tool_calls": False, "id": 1}
    with pytest.raises(HmfError, match="'parallel_tool_calls' belongs to the conversation but is not read"):
        shaped(tmp_path, row, messages_field="messages")
    ignored = shaped(tmp_path, row, messages_field="messages", ignore_fields=["parallel_tool_calls"])
    assert ignored.messages == row["messages"]


def test_objects_in_columns_of_json_are_those_of_the_file(tmp_path):
    """datasets has such columns for objects that differ from row to row, and writes them into Parquet files."""
    made = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": value, "unit": None}}}],
                },
            ],
            "tools": [{"name": "f", "parameters": {"properties": {"x": {"default": [value], "enum": [value, None]}}}}],
        }
        for value in (1, "a", None, True, [None, {"y": None}])
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train")
    assert "Json" in str(rows.features)
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for place in ({"path": "saved"}, {"path": "rows.parquet"}, {"dataset": "rows"}, {"path": "rows"}):
        settings = SourceSettings(
            messages_field="messages", **{key: str(tmp_path / name) for key, name in place.items()}
        )
        found = [content(record, settings) for record in Source(settings).records()]
        assert [(talk.messages, talk.tools) for talk in found] == [(row["messages"], row["tools"]) for row in made], (
            place
        )


@pytest.mark.parametrize("number", ["0.1", "1.10", "1e5", "48.856613999999997", "0.5000000000000000000000", "1e-320"])
def test_numbers_that_a_float_holds_are_kept(tmp_path, number):
    arguments = f'{{"x": {number}, "n": 123456789012345678901234567890}}'
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]}
    file = tmp_path / "a.jsonl"
    for form in (json.dumps(arguments), arguments):  # as JSON text, and as an object
        file.write_text(json.dumps(row).replace('"name": "f"', f'"name": "f", "arguments": {form}'))
        settings = SourceSettings(path=str(file), messages_field="messages")
        [record] = Source(settings).records()
        found = normalise(content(record, settings).messages)[0][1]["tool_calls"][0]["function"]["arguments"]
        assert found == {"x": float(number), "n": 123456789012345678901234567890}


@pytest.mark.parametrize("number", ["12345678901234567.89", "-0.12345678901234567891", "1.000000000000000000001e3"])
def test_numbers_with_more_digits_are_refused_where_they_are_read(tmp_path, number):
    file = tmp_path / "a.json"
    start = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", '
    for text, read in (
        (f'"tool_calls": [{{"name": "f", "arguments": {{"x": {number}}}}}]}}]}}', True),
        (f'"content": "a"}}], "tools": [{{"name": "f", "parameters": {{"minimum": {number}}}}}]}}', True),
        (f'"content": "a"}}], "score": {number}}}', False),
    ):
        file.write_text(start + text)
        settings = SourceSettings(path=str(file), messages_field="messages")
        [record] = Source(settings).records()
        if read:
            with pytest.raises(HmfError, match="the number has more digits than are kept"):
                content(record, settings)
        else:
            assert content(record, settings).unread == ("score",)


SCHEMA = {"type": "object", "properties": {}}
UNREAD = {
    "capitals": ({"System": "Be kind."}, "'System' belongs .* move it into the messages"),
    "system message": ({"system_message": "Be kind."}, "'system_message' belongs"),
    "context": ({"context": "A text to answer from."}, "'context' belongs"),
    "tools": ({"available_tools": [{"name": "f", "parameters": SCHEMA}]}, "set tools_field: available_tools, or add"),
    "tools as text": (
        {"spec": json.dumps([{"type": "function", "function": {"name": "f", "parameters": {}}}])},
        "spec",
    ),
    "tools, each as text": ({"spec": [json.dumps({"name": "f", "parameters": SCHEMA})]}, "set tools_field: spec"),
    "tools of MCP": ({"Tools": [{"name": "f", "inputSchema": SCHEMA}]}, "set tools_field: Tools"),
    "unwanted": ({"label": False}, "'label' is false, as KTO marks an unwanted answer"),
    "unwanted, as a number": ({"kto_tag": 0}, "'kto_tag' is 0"),
    "unwanted, as text": ({"label": "False"}, "'label' is false"),
    "mask of answers": ({"train": [0, 1]}, "'train' has 0 or 1 for each message"),
    "mask of answers as text": ({"learnt": "[0, 1]"}, "'learnt' has 0 or 1 for each message"),
    "weights": ({"lossWeights": [1.0, 0.5]}, r"'lossWeights' is \[1.0, 0.5\], but rows have no weights"),
    "weight of the row": ({"weight": 0}, "'weight' is 0, but rows have no weights; remove the row"),
    "weight of the row, as text": ({"loss_weight": "0.5"}, "'loss_weight' is '0.5', but rows have no weights"),
    "row that is not learnt": ({"is_train": False}, "'is_train' is False, but rows have no weights"),
    "system message in one word": ({"systemPrompt": "Be kind."}, "'systemPrompt' belongs"),
    "image": ({"image_url": "a.png"}, "'image_url' belongs"),
    "tools without schemas": ({"all_tools": [{"name": "f", "description": "d"}]}, "set tools_field: all_tools"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_fields_under_other_names_are_not_passed_over(tmp_path, name):
    more, expected = UNREAD[name]
    row = {"messages": said(*[("user", "a"), ("assistant", "b")] * 2)} | more
    with pytest.raises(HmfError, match=expected):
        shaped(tmp_path, row, messages_field="messages")
    ignored = shaped(tmp_path, row, messages_field="messages", ignore_fields=list(more))
    assert ignored.messages == row["messages"] and not ignored.unread


def test_ignored_fields_are_left_out_of_every_shape(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = {
        "sharegpt": {"conversations": turns, "system": "Be kind.", "tools": [{"name": "f", "parameters": SCHEMA}]},
        "alpaca": {"instruction": "a", "output": "b", "input": "c", "system": "Be kind.", "history": [["x", "y"]]},
    }
    for shape, row in rows.items():
        ignored = [name for name in row if name in ("system", "tools", "input", "history")]
        found = shaped(tmp_path, row, shape=shape, ignore_fields=ignored)
        assert (found.messages, found.tools, found.unread) == (said(("user", "a"), ("assistant", "b")), None, ())
        pair = {"chosen": "b", "rejected": "c"} | row | ({"conversations": turns[:1]} if shape == "sharegpt" else {})
        ignored += ["output"] if shape == "alpaca" else []
        made = shaped(tmp_path, pair, PairSettings, shape=shape, ignore_fields=ignored)
        assert (made.prompt, made.tools, made.unread) == (said(("user", "a")), None, ())


def test_the_answer_to_the_last_message_is_not_passed_over(tmp_path):
    """In data sets with a prompt of several turns, the answer is in another field."""
    asked = said(("user", "a"), ("assistant", "b"), ("user", "c"))
    for name in ("output", "response", "Answer"):
        row = {"messages": asked, name: "d"}
        with pytest.raises(HmfError, match=f"'{name}' may hold the answer to the last message.* of role 'user'"):
            shaped(tmp_path, row, messages_field="messages")
        assert not shaped(tmp_path, row, messages_field="messages", ignore_fields=[name]).unread
        answered = row | {"messages": [*asked, *said(("assistant", "d"))]}
        assert shaped(tmp_path, answered, messages_field="messages").unread == (name,)


def test_fields_that_weight_nothing_are_facts(tmp_path):
    facts = {"weight": 1.0, "train": True, "mask_id": 7, "weights": "open", "train_id": 3, "loss_weight": "1.00"}
    row = {"messages": said(("user", "a"), ("assistant", "b"))} | facts
    assert shaped(tmp_path, row, messages_field="messages").unread == (*facts,)
    pair = PAIRS[None] | {"weight": 0.5}
    with pytest.raises(HmfError, match="'weight' is 0.5, but rows have no weights;.*add it to pairs.ignore_fields"):
        shaped(tmp_path, pair, PairSettings)
    assert not shaped(tmp_path, pair, PairSettings, ignore_fields=["weight"]).unread


@pytest.mark.parametrize("value", [date(2024, 1, 2), Decimal("1.50"), b"ab"], ids=["date", "decimal", "bytes"])
def test_values_of_tables_that_json_does_not_have_are_named(tmp_path, value):
    file = tmp_path / "a.parquet"
    call = {"function": {"name": "f", "arguments": {"x": value}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), file)
    [record] = Source(settings := SourceSettings(path=str(file), messages_field="messages")).records()
    with pytest.raises(HmfError, match=r"messages\[1\].*arguments.x: JSON has no values of type .* as text"):
        content(record, settings)
    ignored = [{"role": "user", "content": "q", "time": value}, {"role": "assistant", "content": "a"}]
    pq.write_table(pa.Table.from_pylist([{"messages": ignored}]), file)
    settings = SourceSettings(path=str(file), messages_field="messages", ignore_keys=["time"])
    [record] = Source(settings).records()
    assert len(content(record, settings).messages) == 2


def test_variables_of_the_template_are_those_of_the_row_and_the_recipe(tmp_path):
    talk = {"messages": said(("user", "a"), ("assistant", "b"))}
    own = {"enable_thinking": False, "note": None, "xml_tools": [], "effort": "high"}
    settings = {"messages_field": "messages", "chat_template_kwargs": {"effort": "low", "note": "x"}}
    for value in (own, json.dumps(own)):
        found = shaped(tmp_path, talk | {"chat_template_kwargs": value}, **settings)
        assert found.chat_template_kwargs == {"enable_thinking": False, "note": "x", "effort": "high"}
        assert not found.unread
    pair = PAIRS[None] | {"chat_template_kwargs": own}
    assert shaped(tmp_path, pair, PairSettings).chat_template_kwargs == {"enable_thinking": False, "effort": "high"}
    ignored = settings | {"ignore_fields": ["chat_template_kwargs"]}
    found = shaped(tmp_path, talk | {"chat_template_kwargs": own}, **ignored)
    assert found.chat_template_kwargs == settings["chat_template_kwargs"]
    for changes, expected in (
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' holds list instead of an object"),
        ({"chat_template_kwargs": {"note": "\ud83d"}}, "chat_template_kwargs.note: a lone surrogate"),
        ({"enable_thinking": True}, "'enable_thinking' belongs .* move it into chat_template_kwargs"),
    ):
        with pytest.raises(HmfError, match=expected):
            shaped(tmp_path, talk | changes, **settings)
    for key, value in (("chat_template_kwargs", {"effort": "low"}), ("tools_field", "tools"), ("ignore_keys", ["id"])):
        with pytest.raises(ValueError, match=f"{key} has no effect on texts"):
            SourceSettings(path="a.txt", **{key: value})
    with pytest.raises(ValueError, match="date_string\n  input was not a valid JSON value"):
        PairSettings(
            path="a.jsonl", chat_template_kwargs={"date_string": date(2024, 7, 26)}
        )  # as YAML reads 2024-07-26
    with pytest.raises(ValueError, match="chat_template_kwargs.effort: has no value"):
        PairSettings(path="a.jsonl", chat_template_kwargs={"effort": None})


def test_tools_may_be_json_texts(tmp_path):
    row, tools = {"messages": said(("user", "a"), ("assistant", "b"))}, [{"name": "f", "parameters": SCHEMA}]
    for value in (tools, json.dumps(tools), [json.dumps(tool) for tool in tools]):
        assert shaped(tmp_path, row | {"tools": value}, messages_field="messages").tools == tools
    with pytest.raises(HmfError, match=r"'tools\[0\]' is text but not valid JSON"):
        shaped(tmp_path, row | {"tools": ["f(x)"]}, messages_field="messages")


def test_facts_about_a_row_are_named_as_not_read(tmp_path):
    facts = {
        "id": 7,
        "source": "web",
        "label": 1,
        "turns": [1],
        "names": [{"name": "Ann"}],
        "scores": [0.5, 1],
        "note": None,
    }
    found = shaped(tmp_path, {"messages": said(("user", "a"), ("assistant", "b"))} | facts, messages_field="messages")
    assert found.unread == ("id", "source", "label", "turns", "names", "scores")


@pytest.mark.parametrize("label", [0, 0.0, "0", 3, "spam"])
def test_the_number_of_a_class_marks_no_unwanted_answer(tmp_path, label):
    row = {"messages": said(("user", "a"), ("assistant", "b")), "label": label}
    assert shaped(tmp_path, row, messages_field="messages").unread == ("label",)


@pytest.mark.parametrize("mask", [[0, 1], [False, True], [1.0, 0.0]])
def test_a_mask_of_messages_is_not_passed_over(tmp_path, mask):
    row = {"messages": said(("user", "a"), ("assistant", "b")), "loss_mask": mask, "scores": [0.5, 1], "tags": ["x", 1]}
    with pytest.raises(HmfError, match="'loss_mask' has 0 or 1 for each message .* write weight"):
        shaped(tmp_path, row, messages_field="messages")
    ignored = shaped(tmp_path, row, messages_field="messages", ignore_fields=["loss_mask"])
    assert ignored.messages == row["messages"]


ASKED = said(("user", "1+1?"))
PAIRS = {
    None: {"prompt": "1+1?", "chosen": "2", "rejected": [{"role": "assistant", "content": "3"}]},
    "ultrafeedback": {
        "prompt": "1+1?",
        "score_chosen": 9.0,
        "messages": ASKED + said(("assistant", "2")),
        "chosen": ASKED + said(("assistant", "2")),
        "rejected": ASKED + said(("assistant", "3")),
    },
    "sharegpt": {"conversations": TALK[:1], "chosen": TALK[1], "rejected": {"from": "gpt", "value": "3"}},
    "alpaca": {"instruction": "1+1?", "chosen": "2", "rejected": "3"},
}


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_have_shapes_too(tmp_path, shape):
    pair = shaped(tmp_path, PAIRS[shape], PairSettings, shape=shape)
    assert (pair.prompt, [pair.chosen, pair.rejected]) == (ASKED, said(("assistant", "2"), ("assistant", "3")))


def test_a_suggested_shape_of_pairs_is_one_of_theirs(tmp_path):
    """Of rows for SFT there are others: prompt_completion is none for pairs, ultrafeedback none for documents."""
    for shape in ("ultrafeedback", "sharegpt", "alpaca"):
        row = {name: value for name, value in PAIRS[shape].items() if name != "prompt"}
        with pytest.raises(HmfError, match=f"no field 'prompt'; .*, or shape: {shape}$"):
            shaped(tmp_path, row, PairSettings)
    with pytest.raises(HmfError, match="no field 'chosen'; .* the recipe's key for its name$"):
        shaped(tmp_path, {"prompt": "a", "completion": "b", "label": True}, PairSettings)


def test_ignored_keys_of_messages_may_differ_in_the_two_answers(tmp_path):
    row = PAIRS["ultrafeedback"]
    ids = {
        name: [message | {"id": f"{name}-{number}"} for number, message in enumerate(row[name])]
        for name in ("chosen", "rejected", "messages")
    }
    for changes in (ids, ids | {"messages": json.dumps(ids["messages"])}):
        found = shaped(tmp_path, row | changes, PairSettings, shape="ultrafeedback", ignore_keys=["id"])
        assert (found.prompt, found.chosen) == (ASKED, said(("assistant", "2"))[0])
    with pytest.raises(HmfError, match="differ only in their last message"):
        shaped(tmp_path, row | ids, PairSettings, shape="ultrafeedback")


def test_pairs_that_do_not_share_their_prompt_are_refused(tmp_path):
    row = PAIRS["ultrafeedback"]
    for changes, expected in (
        ({"rejected": said(("user", "1+2?"), ("assistant", "3"))}, "differ only in their last message"),
        ({"prompt": "1+2?"}, "field 'prompt' differs from chosen"),
        ({"messages": ASKED}, "field 'messages' differs from chosen"),
    ):
        with pytest.raises(HmfError, match=expected):
            shaped(tmp_path, row | changes, PairSettings, shape="ultrafeedback")
    with pytest.raises(HmfError, match="chosen: is text that holds messages as JSON"):
        shaped(tmp_path, {"prompt": "a", "chosen": json.dumps(row["chosen"]), "rejected": "b"}, PairSettings)
    with pytest.raises(HmfError, match="set shape: ultrafeedback"):
        shaped(tmp_path, {name: row[name] for name in ("prompt", "chosen", "rejected")}, PairSettings)


# ---- strict JSON and YAML


def test_the_same_key_twice_is_an_error(tmp_path):
    for text in ('{"a": 1, "b": {"c": 1, "c": 1}}', '[{"a": 1, "\\u0061": 2}]'):
        with pytest.raises(ValueError, match="occurs twice"):
            parse_json(text)
    for text in ("a: 1\nb: 2\n'a': 3", "{x: {1: a, 0x1: b}}", "- {true: 1, True: 2}"):
        with pytest.raises(ValueError, match="occurs twice, again in line"):
            parse_yaml(text)
    merged = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}"
    assert parse_yaml(merged) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: a\noutput: b\ntraining: {max_steps: 1, max_steps: 2}\n")
    with pytest.raises(HmfError, match="yaml: not valid YAML .the key 'max_steps' occurs twice, again in line 3"):
        read_recipe(recipe, DistillRecipe)


@pytest.mark.parametrize("text", ["a: 2020-13-45", "[" * 3000, "a: " + "9" * 5000, "a: !!python/object:os.system 1"])
def test_values_that_yaml_knows_and_python_does_not_are_one_line(text):
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)


def test_null_in_a_table_is_no_value(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(HmfError, match="row 1: no field 'text'; the row has none with a value"):
        read(tmp_path)


def test_a_row_of_a_table_has_a_limit(tmp_path, monkeypatch):
    """A small file can hold a large text once for many rows."""
    monkeypatch.setattr(files, "LIMIT", 1000)
    for size, rows in ((900, 300), (2000, 3)):
        column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * size]))
        pq.write_table(pa.table({"text": column}), tmp_path / f"{size}.parquet")
    assert read(tmp_path / "900.parquet") == ["a" * 900] * 300
    with pytest.raises(HmfError, match=r"2000.parquet: row 0: has more than"):
        read(tmp_path / "2000.parquet")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("system", "You call functions.", "belongs to a conversation but is not read; set messages_field or shape"),
        ("tools", [{"name": "add", "description": "Adds."}], "belongs to a conversation but is not read"),
        ("chat_template_kwargs", {"thinking": True}, "belongs to a conversation but is not read"),
        ("weight", 0, "is 0, but rows have no weights; remove the row, or add it to sources.rows.ignore_fields"),
    ],
)
def test_a_field_beside_a_text_is_refused_or_ignored(tmp_path, name, value, said):
    """As in other sources: Glaive has the system prompt beside the text `chat`. Facts about the row are no problem."""
    row = {"chat": "USER: Hi?", "source": "web", "score": 3, name: value}
    with pytest.raises(HmfError, match=f"^field '{name}' {said}"):
        shaped(tmp_path, row, text_field="chat")
    assert shaped(tmp_path, row, text_field="chat", ignore_fields=[name]) == "USER: Hi?"
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    with pytest.raises(HmfError, match=f"field '{name}' {said}"):
        read(tmp_path / "rows.parquet", text_field="chat")
