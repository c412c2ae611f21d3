# SPDX-License-Identifier: Apache-2.0
"""From files to rows: every format, mixtures, limits, errors that name their line, and runs that are cut off."""

import fcntl
import gzip
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.data import DataRecipe, RepetitionSettings, SourceSettings
from hmf.config.recipes import load_recipe
from hmf.config.runs import DataSettings
from hmf.data import shards, tasks
from hmf.data.encoding import IGNORED, encode_chat, encode_document
from hmf.data.filters import repetition
from hmf.data.mixture import mixture, row_length
from hmf.data.packing import best_fit
from hmf.data.prepare import prepare
from hmf.data.prepared import PreparedDataset
from hmf.data.shards import load_tokenizer
from hmf.data.sources import Source, content
from hmf.data.text import stdlib_documents
from hmf.data.tokenizer import train_tokenizer
from hmf.errors import HmfError
from hmf.folders import HOLDER, resolve_base
from hmf.report.samples import print_counts
from hmf.training.distill import distill
from tests.training import cutting
from tests.training.cutting import make_tiny_stage0, on_touch

datasets = pytest.importorskip("datasets", reason="needs datasets, which `make test` installs")

TEACHER = resolve_base("teacher")
WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "far"]


def words(number, count=60):
    rng = Random(number)
    return f"text {number}: " + " ".join(rng.choice(WORDS) for _ in range(count))


TEXTS = [words(number, 10 + 7 * number) for number in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A corpus of text and of conversations as JSON lines."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    samples = [
        tasks.sample(task, seed, tokenizer, 160, thinking=seed % 2 == 0)
        for seed in range(8)
        for task in ("arithmetic", "tool_answer", "chat")
    ]
    lines = [json.dumps({"messages": sample.messages, "tools": sample.tools}) + "\n" for sample in samples]
    (folder / "chat.jsonl").write_text("".join(lines))
    return folder


def recipe(folder, output, **changes):
    texts, chat = (
        {"path": str(folder / "texts.jsonl")},
        {"path": str(folder / "chat.jsonl"), "messages_field": "messages"},
    )
    made = {"output": output, "tokenizer": "teacher", "sequence_length": 512, "sources": [texts, chat]}
    return DataRecipe.model_validate(made | {"shard_documents": 7, "max_truncated_share": 0.5} | changes)


def files(output):
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != HOLDER
    }


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    prepare(recipe(folder, output), TEACHER)
    return output


def documents(output):
    """Token ids and labels of each document, filler left out, by where it is from."""
    dataset, found = PreparedDataset(output), {}
    for index in range(len(dataset)):
        row, stored = dataset[index], dataset.stored[index]
        start = 0
        for where, length in zip(stored["where"], stored["lengths"].tolist(), strict=True):
            part = slice(start, start + length)
            assert row["position_ids"][part].tolist() == list(range(length))
            if where:
                found.setdefault(str(where), []).append((row["input_ids"][part].tolist(), row["labels"][part].tolist()))
            else:
                assert set(row["labels"][part].tolist()) == {IGNORED}
            start += length
        assert start == dataset.sequence_length
    return found


def test_rows_hold_every_document_once_as_it_is_encoded(folder, whole, tokenizer):
    found = documents(whole)
    for number, text in enumerate(TEXTS, 1):
        wanted = encode_document(tokenizer, text)
        where = f"texts: texts.jsonl:{number}"
        assert found.pop(where) == [(wanted.ids, wanted.labels)]
    for number, line in enumerate((folder / "chat.jsonl").read_text().splitlines(), 1):
        wanted = encode_chat(tokenizer, **json.loads(line))
        got = sorted(found.pop(f"chat: chat.jsonl:{number}"))
        assert got == sorted((item.ids, item.labels) for item in wanted)
    assert not found
    index = json.loads((whole / "index.json").read_text())
    assert [source["records"] for source in index["sources"]] == [24, 24]
    assert index["filled"] > 0.9


@pytest.mark.parametrize("workers", [1, 2])
def test_fields_that_are_not_read_are_counted(tmp_path, capsys, workers):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": talk, "id": number} | ({"[/b]": "x"} if number % 2 else {}) for number in range(10)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = recipe(
        tmp_path,
        tmp_path / "out",
        sources=[{"path": str(tmp_path / "chat.jsonl"), "messages_field": "messages", "name": "../../chat"}],
    )
    index = prepare(settings, TEACHER, workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "out"]
    assert index["sources"][0]["unread"] == {"id": 10, "[/b]": 5}
    print_counts(index)
    assert "chat: fields of conversations that are not read: [/b] (5), id (10)" in capsys.readouterr().out
    shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "out"), "--samples", "12"]).output
    assert sorted(re.findall(r"chat.jsonl:(\d+)", shown), key=int) == [str(number) for number in range(1, 11)]


def test_training_reads_prepared_rows(whole, tokenizer):
    data = DataSettings(prepared=whole)
    rows = mixture(data, tokenizer, rows=300, seed=3)
    assert row_length(data) == 512
    stored = PreparedDataset(whole)
    assert len(rows) == 300 > 3 * len(stored)
    for name, value in rows[0].items():
        assert value.shape == (512,) and value.dtype == torch.int64 and torch.equal(value, stored[0][name])
    passes = [[rows.place(index) for index in range(n * len(stored), (n + 1) * len(stored))] for n in range(3)]
    assert passes[0] == sorted(passes[1]) == sorted(passes[2]) and passes[1] != passes[2]
    again = mixture(data, tokenizer, rows=300, seed=3)
    assert [again.place(index) for index in reversed(range(300))] == [
        rows.place(index) for index in reversed(range(300))
    ]
    other = train_tokenizer(TEXTS, 280, "", 128)
    with pytest.raises(HmfError, match="prepared with another tokenizer"):
        mixture(data, other, rows=1, seed=0)
    with pytest.raises(ValueError, match="prepared: the rows are complete .*leave out text"):
        DataSettings(prepared=whole, text="stdlib")


@given(lengths=st.lists(st.integers(1, 20), max_size=60), window=st.integers(1, 70))
@settings(deadline=None)
def test_best_fit_keeps_items_whole_and_wastes_little(lengths, window):
    rows = best_fit(lengths, 20, window)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < total <= 20 for total in sums)
    if window >= len(lengths):  # then no two rows would fit into one
        assert all(a + b > 20 for a, b in zip(sorted(sums), sorted(sums)[1:], strict=False))


def as_format(kind, folder, texts):
    """The texts as a source of some format."""
    rows = datasets.Dataset.from_dict({"body": texts})
    place: dict = {"path": str(folder), "text_field": "body"}
    if kind == "jsonl.gz":
        with gzip.open(folder / "a.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"body": text}) + "\n\n" for text in texts)
        place["path"] = str(folder / "*.jsonl.gz")
    elif kind == "text":
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.md").write_text(text)
        del place["text_field"]
    elif kind == "saved":
        datasets.DatasetDict({"train": rows}).save_to_disk(folder / "set")
        place["path"] = str(folder / "set")
    else:
        rows.to_parquet(folder / "train.parquet")
        if kind == "dataset":
            place = {"dataset": str(folder), "text_field": "body", "split": "train"}
    return SourceSettings.model_validate(place)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet", "text", "saved", "dataset"])
def test_every_format_gives_the_same_texts(tmp_path, kind):
    source = as_format(kind, tmp_path, TEXTS)
    assert [content(record, source) for record in Source(source).records()] == TEXTS


def test_tables_give_messages_without_the_fields_of_other_rows(tmp_path, tokenizer):
    sample = tasks.sample("tool_answer", 1, tokenizer, 160)
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"talk": sample.messages, "functions": json.dumps(sample.tools)}, {"talk": plain, "functions": None}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    source = SourceSettings(path=str(tmp_path), messages_field="talk", tools_field="functions")
    found = [content(record, source) for record in Source(source).records()]
    assert [talk.messages for talk in found] == [sample.messages, plain]
    assert [talk.tools for talk in found] == [sample.tools, None]


def weighted(folder, shares, **more):
    sources = [
        {"path": str(folder / "texts.jsonl"), "weight": shares[0]},
        {"path": str(folder / "chat.jsonl"), "messages_field": "messages", "weight": shares[1]},
    ]
    return {"sources": sources} | more


def test_weights_are_shares_of_tokens(folder, tmp_path):
    most = prepare(recipe(folder, tmp_path / "most", **weighted(folder, (1, 3))), TEACHER)["sources"]
    assert most[1]["passes"] == 1 and most[0]["passes"] < 1  # no document twice
    assert most[1]["used"]["tokens"] == pytest.approx(3 * most[0]["used"]["tokens"], abs=3)
    mixed = weighted(folder, (1, 3), tokens=20_000)
    long = prepare(recipe(folder, tmp_path / "long", **mixed), TEACHER)
    used = [source["used"]["tokens"] for source in long["sources"]]
    assert used[0] == 5_000 and used[1] == pytest.approx(15_000, rel=0.02)  # conversations stay whole
    assert long["sources"][1]["passes"] > 2
    prepare(recipe(folder, tmp_path / "again", **mixed), TEACHER)
    prepare(recipe(folder, tmp_path / "seed", **mixed, seed=1), TEACHER)
    assert files(tmp_path / "again") == files(tmp_path / "long")
    assert files(tmp_path / "seed")["rows/00000.arrow"] != files(tmp_path / "long")["rows/00000.arrow"]


def test_long_texts_are_split_and_long_conversations_cut(folder, tmp_path, tokenizer):
    texts, chat = recipe(folder, tmp_path).model_dump(mode="json", exclude_defaults=True)["sources"]
    split = prepare(recipe(folder, tmp_path / "a", sequence_length=32, sources=[texts]), TEACHER)
    assert split["sources"][0]["truncated"] == 0
    assert split["sources"][0]["used"]["tokens"] == split["sources"][0]["tokens"]
    found = documents(tmp_path / "a")
    wanted = encode_document(tokenizer, TEXTS[20])
    pieces = [found[f"texts: texts.jsonl:21{f' from token {n}' if n else ''}"][0] for n in range(0, len(wanted), 32)]
    assert [token for ids, _ in pieces for token in ids] == wanted.ids
    assert all(labels == [IGNORED, *ids[1:]] for ids, labels in pieces)
    with pytest.raises(
        HmfError, match=r"chat: \d+ of \d+ .* longer than sequence_length 64, .*chat.jsonl:\d+ has \d+ tok"
    ):
        prepare(recipe(folder, tmp_path / "b", sequence_length=64, sources=[chat], max_truncated_share=0), TEACHER)
    # The limit is no part of what was tokenised: with another one the same folder goes on.
    cut = prepare(recipe(folder, tmp_path / "b", sequence_length=64, sources=[chat], max_truncated_share=1), TEACHER)
    assert cut["sources"][0]["truncated"] > 0 < cut["sources"][0]["unusable"]
    for parts in documents(tmp_path / "b").values():
        assert all(len(ids) <= 64 and set(labels) != {IGNORED} for ids, labels in parts)


def test_filters_leave_out_what_repeats_and_what_is_short(folder, tmp_path):
    limits = RepetitionSettings()
    assert repetition(Path(shutil.__file__).read_text()[:6000], limits) is None
    assert repetition("A short line.", limits) is None
    assert repetition("the same line again\n" * 30, limits) == "duplicate_lines"
    assert repetition("one two " * 100 + " ".join(map(str, range(300))), limits) == "top_2gram"
    sentence = "seven words that come again and again "
    text = " ".join(f"{sentence}{number} {word}" for number, word in enumerate(WORDS))
    assert repetition(text, limits.model_copy(update={"top_ngram": {}})) == "duplicate_5grams"
    texts = {"path": str(tmp_path / "some.jsonl"), "filters": {"repetition": True, "min_tokens": 20}}
    lines = [
        json.dumps({"text": text}) + "\n"
        for text in ("again and again\n" * 40, "short", Path(os.__file__).read_text()[:3000])
    ]
    (tmp_path / "some.jsonl").write_text("".join(lines))
    index = prepare(recipe(folder, tmp_path / "out", sources=[texts]), TEACHER)
    assert index == prepare(recipe(folder, tmp_path / "out", sources=[texts]), TEACHER)  # it is there already
    found = index["sources"][0]
    assert found["filtered"] == {"duplicate_lines": 1, "min_tokens": 1} and found["documents"] == 1


TEXT, CHAT = {}, {"messages_field": "messages"}
BAD = {
    "not JSON": (TEXT, '{"text": "a"', r"bad: bad.jsonl:3: not valid JSON .* at the end of the line"),
    "no object": (TEXT, "[1]", r"bad.jsonl:3: a JSON object is expected, not list; rename the file to .json"),
    "no field": (
        TEXT,
        '{"body": "a", "id": 1}',
        r"bad.jsonl:3: no field 'text'; the row has 'body', 'id': set text_field",
    ),
    "no text": (TEXT, '{"text": null}', r"bad.jsonl:3: field 'text' holds nothing instead of text"),
    "talk as text": (TEXT, '{"text": [{}]}', r"bad.jsonl:3: .* set messages_field or shape"),
    "no messages": (CHAT, '{"messages": []}', r"bad.jsonl:3: field 'messages' holds an empty list"),
    "no role": (CHAT, '{"messages": [{"from": "human", "value": "a"}]}', r"jsonl:3: messages\[0\] has no role"),
    "no answer": (CHAT, '{"messages": [{"role": "user", "content": "a"}]}', r"bad.jsonl:3: no assistant turn"),
    "half a character": (
        TEXT,
        '{"text": "\\ud83d"}',
        r"bad: bad.jsonl:3: .*a lone surrogate \(\\ud83d\) is not valid text",
    ),
    "half in a message": (CHAT, '{"messages": [{"role": "user", "content": "\\ud83d"}]}', r"jsonl:3: .*lone surrogate"),
    "bad tools": (CHAT, '{"messages": [{"role": "user"}], "tools": "{"}', r"jsonl:3: field 'tools' is text but"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(folder, tmp_path, name):
    fields, line, expected = BAD[name]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": talk} if "messages_field" in fields else {"text": "a"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + f"\n\n{line}\n")
    source = fields | {"path": str(tmp_path / "bad.jsonl")}
    with pytest.raises(HmfError, match=expected):
        prepare(recipe(folder, tmp_path / "out", sources=[source]), TEACHER)
    assert not (tmp_path / "out" / "index.json").exists()


def test_places_and_recipes_that_cannot_be(folder, tmp_path, whole):
    def source(**settings):
        return Source(SourceSettings(**settings))

    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(HmfError, match="nothere: no such file or folder"):
        source(path=str(tmp_path / "nothere"))
    with pytest.raises(HmfError, match="holds jsonl and text files; set format"):
        source(path=str(tmp_path))
    with pytest.raises(HmfError, match="jsonl files have no splits"):
        source(path=str(tmp_path / "a.jsonl"), split="train")
    with pytest.raises(HmfError, match="some/name: the datasets library cannot read it"):
        list(source(dataset="some/name").records())
    with pytest.raises(HmfError, match="none of 0 records gives a document"):
        prepare(recipe(folder, tmp_path / "out", sources=[{"path": str(tmp_path / "a.jsonl")}]), TEACHER)
    with pytest.raises(HmfError, match="holds the rows of another recipe"):
        prepare(recipe(folder, whole, seed=1), TEACHER)
    with pytest.raises(HmfError, match="holds other files; choose another output"):
        prepare(recipe(folder, folder), TEACHER)
    (tmp_path / "out").mkdir(exist_ok=True)
    busy = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(busy, fcntl.LOCK_EX)
    with pytest.raises(HmfError, match="out: another process is using this folder"):
        prepare(recipe(folder, tmp_path / "out"), TEACHER)
    os.close(busy)
    for changes, expected in (
        ({"sources": [{"path": "a", "weigt": 1}]}, "sources.0: unknown key 'weigt'; did you mean 'weight'"),
        ({"sources": [{"path": "a"}, {"path": "b/a"}]}, "two sources have the name 'a'; give each its own name"),
        ({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}, "'b' has no weight"),
        ({"sources": [{}]}, "give either path or dataset"),
        ({"tokens": 5}, "tokens: needs weights"),
    ):
        made = {"output": "x", "tokenizer": "teacher", "sequence_length": 64, "sources": [{"path": "a"}]} | changes
        (tmp_path / "recipe.yaml").write_text(json.dumps(made))
        with pytest.raises(HmfError, match=expected):
            load_recipe(tmp_path / "recipe.yaml", DataRecipe)


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def test_a_damaged_set_is_named(folder, whole, tmp_path):
    for number, place in enumerate((0.1, 0.5, 0.9)):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        flip(copy / "rows" / "00000.arrow", place)
        with pytest.raises(HmfError, match=r"rows/00000.arrow: is damaged \(its hash is not the one in index.json"):
            PreparedDataset(copy)
        with pytest.raises(HmfError, match=r"rows/00000.arrow: is damaged"):
            prepare(recipe(folder, copy), TEACHER)
    os.truncate(tmp_path / "0" / "rows" / "00000.arrow", 100)
    with pytest.raises(HmfError, match=r"rows/00000.arrow: is missing or damaged"):
        PreparedDataset(tmp_path / "0")
    index = json.loads((tmp_path / "1" / "index.json").read_text())
    del index["vocabulary"]
    (tmp_path / "1" / "index.json").write_text(json.dumps(index))
    with pytest.raises(HmfError, match=r"index.json: is damaged; prepare the set again"):
        PreparedDataset(tmp_path / "1")
    (tmp_path / "0" / "index.json").unlink()
    with pytest.raises(HmfError, match=r"is not a finished prepared data set \(there is no index.json\)"):
        PreparedDataset(tmp_path / "0")


@pytest.mark.parametrize("damage", ["a byte", "the end", "one file", "the count"])
def test_a_damaged_cache_is_made_anew(folder, tmp_path, damage, capsys):
    made = {"sources": [{"path": str(folder / "texts.jsonl")}], "cache": tmp_path / "cache"}
    prepare(recipe(folder, tmp_path / "a", **made), TEACHER)
    [first] = (tmp_path / "cache").glob("*/000000.arrow")
    match damage:
        case "a byte":
            flip(first)
        case "the end":
            os.truncate(first, first.stat().st_size // 2)
        case "one file":
            first.with_name("000001.arrow").unlink()
        case "the count":
            first.with_name("shards.json").write_text('{"shards": 2}')
    prepare(recipe(folder, tmp_path / "b", **made), TEACHER)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert ("000000.arrow: it is damaged; it is written again" in capsys.readouterr().err) == (
        damage in ("a byte", "the end")
    )


def test_records_that_changed_between_a_stop_and_the_next_start_are_tokenised_again(folder, tmp_path, capsys):
    """Even where the file has its old name, size and time."""
    source = tmp_path / "texts.jsonl"
    shutil.copy(folder / "texts.jsonl", source)
    made = {"sources": [{"path": str(source)}], "cache": tmp_path / "cache"}
    prepare(recipe(folder, tmp_path / "a", **made), TEACHER)
    [done] = (tmp_path / "cache").glob("*/shards.json")
    done.unlink()  # as a run leaves it that was stopped
    times = source.stat().st_atime_ns, source.stat().st_mtime_ns
    source.write_text(source.read_text().replace("text 9:", "TEXT 9:"))
    os.utime(source, ns=times)
    prepare(recipe(folder, tmp_path / "b", **made), TEACHER)
    assert "000001.arrow: its records have changed; it is written again" in capsys.readouterr().err
    prepare(recipe(folder, tmp_path / "c", sources=made["sources"]), TEACHER)
    assert files(tmp_path / "b") == files(tmp_path / "c") != files(tmp_path / "a")
    source.write_text(source.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(HmfError, match="source texts has changed since the rows were prepared"):
        prepare(recipe(folder, tmp_path / "c", sources=made["sources"]), TEACHER)
    source.unlink()  # rows do not need it any more
    prepare(recipe(folder, tmp_path / "c", sources=made["sources"]), TEACHER)


def _record_states(made, states):
    """Prepare in one process, and copy the folder as it is before each touch."""
    count = 0

    def copy(written):
        nonlocal count
        if made.output.is_dir():
            shutil.copytree(made.output, states / f"{count:03d}")
        count += 1

    on_touch(made.output, copy)
    prepare(made, TEACHER)


def _prepare_and_die(made):
    """Prepare with two processes, and be killed when the third shard is there."""
    results = 0
    add = shards.Progress.add

    def die(self, *args):
        nonlocal results
        add(self, *args)
        results += 1
        if results == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    shards.Progress.add = die
    prepare(made, TEACHER, workers=2)


def _in_a_process(target, *args):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hmf.data.prepare", "tests.training.cutting"])
    process = context.Process(target=target, args=args)
    process.start()
    process.join(120)
    return process.exitcode


def test_a_run_killed_anywhere_ends_like_one_that_was_not(folder, whole, tmp_path):
    states = tmp_path / "states"
    states.mkdir()
    fewer = {"shard_documents": 16}  # no matter for the result
    assert _in_a_process(_record_states, recipe(folder, tmp_path / "out", **fewer), states) == 0
    wanted, found = files(whole), sorted(states.iterdir())
    assert len(found) > 15
    for state in found:
        prepare(recipe(folder, state, **fewer), TEACHER)
        assert files(state) == wanted, state.name


def test_two_processes_killed_and_gone_on_by_one_give_the_same_bytes(folder, whole, tmp_path):
    made = recipe(folder, tmp_path / "out")
    assert _in_a_process(_prepare_and_die, made) == -signal.SIGKILL
    assert not (tmp_path / "out" / "index.json").exists()
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.arrow")}
    assert 3 <= len(there) < 8
    prepare(recipe(folder, tmp_path / "out", cache=None), TEACHER)
    assert files(tmp_path / "out") == files(whole)


def test_a_cache_serves_other_recipes_and_not_other_sources(folder, tmp_path, monkeypatch):
    cache, source = tmp_path / "cache", tmp_path / "texts.jsonl"
    shutil.copy(folder / "texts.jsonl", source)
    one = {"sources": [{"path": str(source)}], "cache": cache}
    prepare(recipe(folder, tmp_path / "a", **one), TEACHER)
    calls = []
    real = shards._write_shard
    monkeypatch.setattr(shards, "_write_shard", lambda *args: calls.append(args) or real(*args))
    prepare(recipe(folder, tmp_path / "b", **one, sequence_length=64, seed=5), TEACHER)
    assert not calls
    assert (tmp_path / "b" / "rows").is_dir()
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    assert prepare(recipe(folder, tmp_path / "c", **one), TEACHER)["sources"][0]["records"] == 25
    assert len(calls) == 4


def test_show_marks_what_is_learnt_and_counts(folder, whole, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe(folder, tmp_path / "out").model_dump_json(exclude_defaults=True))
    runner = CliRunner()
    for place in (tmp_path / "recipe.yaml", whole):
        result = runner.invoke(app, ["data", "show", str(place), "--samples", "2"])
        assert result.exit_code == 0, result.output
        assert "<|im_start|>assistant" in result.output and "chat: chat.jsonl:" in result.output
        learnt = [part.split("⟧")[0] for part in result.output.split("⟦")[1:]]
        assert any(part.endswith("<|im_end|>") for part in learnt) and not any(
            "<|im_start|>" in part for part in learnt
        )
        assert "chat │      24 │" in result.output
    assert not (tmp_path / "out").exists()
    done = runner.invoke(app, ["data", "prepare", str(tmp_path / "recipe.yaml"), "--workers", "1"])
    assert done.exit_code == 0 and "rows of 512 tokens" in done.output
    assert files(tmp_path / "out") == files(whole)


def test_show_prints_no_document_twice(folder, tmp_path):
    texts = ["One.", "Two.", "Three."]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(recipe(folder, tmp_path / "out", sources=[{"path": str(tmp_path / "few.jsonl")}]), TEACHER)
    output = CliRunner().invoke(app, ["data", "show", str(tmp_path / "out"), "--samples", "5"]).output
    assert [output.count(text) for text in texts] == [1, 1, 1]
    assert "1 row of 512 tokens from 3 documents, " in output


def test_show_counts_special_tokens_and_what_follows_the_last_answer(folder, tmp_path):
    talk = [{"role": "user", "content": "a", "id": 3}, {"role": "assistant", "content": "b"}]
    after = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "c", "weight": 0}]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in (talk, [*talk, *after], [*after, *talk])]
    (tmp_path / "talk.jsonl").write_text("".join(lines))
    (tmp_path / "crawl.jsonl").write_text('{"text": "One<|endoftext|>two"}\n{"text": "three"}\n')
    kept = {"path": str(tmp_path / "talk.jsonl"), "messages_field": "messages", "ignore_keys": ["id"]}
    sources = [{"path": str(tmp_path / "crawl.jsonl"), "split_special_tokens": True}, kept]
    made = recipe(folder, tmp_path / "out", sources=sources)
    (tmp_path / "recipe.yaml").write_text(made.model_dump_json(exclude_defaults=True))
    prepare(made, TEACHER)
    for place in ("recipe.yaml", "out"):
        output = CliRunner().invoke(app, ["data", "show", str(tmp_path / place), "--samples", "0"]).output
        assert "talk: 2 records have special tokens" in output and "crawl: 1 records have special tokens" in output
        assert "talk: 2 messages after the last supervised turn of their conversation are not used" in output
    special = load_tokenizer(TEACHER).convert_tokens_to_ids("<|endoftext|>")
    [[(ids, _)], [(other, _)]] = [found for where, found in documents(tmp_path / "out").items() if "crawl" in where]
    assert ids.count(special) == other.count(special) == 2  # around the text
    kept["ignore_keys"] = []
    with pytest.raises(HmfError, match=r"talk: talk.jsonl:1: messages\[0\].id: unknown key 'id'"):
        prepare(recipe(folder, tmp_path / "other", sources=sources), TEACHER)
    with pytest.raises(ValueError, match="role and content are required in a message"):
        SourceSettings(path="a", ignore_keys=["content"])


def test_the_recipe_prepares_what_its_readme_makes(tmp_path, monkeypatch):
    home = Path(__file__).resolve().parents[2] / "recipes" / "data"
    monkeypatch.chdir(tmp_path)
    made = re.search(r"```python\n(.*?)```", (home / "README.md").read_text(), re.DOTALL)[1]
    exec(made.replace("range(500)", "range(10)"), {})
    few = stdlib_documents("train")[:20]
    monkeypatch.setattr("hmf.data.text.stdlib_documents", lambda split: few)  # all of it takes half a minute
    index = prepare(load_recipe(home / "recipe.yaml", DataRecipe, ["tokens=40000"]), TEACHER)
    used = [source["used"]["tokens"] for source in index["sources"]]
    assert used[0] == 30_000 and used[1] == pytest.approx(10_000, rel=0.1)
    assert index["filled"] > 0.9


def test_stage1_trains_on_prepared_rows(folder, tmp_path):
    stage0 = make_tiny_stage0(tmp_path / "model")
    rows = recipe(folder, tmp_path / "rows", sequence_length=32, sources=[{"path": str(folder / "texts.jsonl")}])
    prepare(rows, stage0)
    run = cutting.settings(stage0).model_copy(update={"data": DataSettings(prepared=tmp_path / "rows")})
    saved = distill(stage0, tmp_path / "run", run)
    before, after = (load_file(path / "model.safetensors") for path in (stage0, saved))
    assert any(not torch.equal(before[name], after[name]) for name in before)
