# SPDX-License-Identifier: Apache-2.0
"""`hmf data answers`: what a model answered becomes training data with exactly the generated tokens."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.data import DataRecipe
from hmf.data.encoding import IGNORED
from hmf.data.prepare import prepare
from hmf.data.prepared import PreparedDataset
from hmf.data.tasks import sample
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.evaluation.conversations import prompts, write_answers
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_model

WEIGHTS = {"recall": 1, "arithmetic": 1, "tool_call": 1}


@pytest.fixture(scope="module")
def teacher():
    base = resolve_base("teacher")
    return load_model(base, dtype=torch.float32).eval(), load_tokenizer(base)


@pytest.fixture(scope="module")
def written(teacher, tmp_path_factory):
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    asked = prompts(teacher[1], WEIGHTS, 12, 128, seed=3)
    return file, asked, write_answers(*teacher, file, asked, max_new_tokens=128)


def test_training_reads_the_tokens_that_were_generated(teacher, written, tmp_path):
    """Each document of the prepared set is a prompt, not supervised, and the teacher's greedy continuation of it."""
    model, tokenizer = teacher
    file, asked, counts = written
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == sum(count["written"] for count in counts.values()) >= 10
    assert {line["messages"][-1]["role"] for line in lines} == {"assistant"}
    source = {"path": str(file), "messages_field": "messages"}
    recipe = {"output": tmp_path / "rows", "tokenizer": "teacher", "sequence_length": 512, "sources": [source]}
    prepare(DataRecipe.model_validate(recipe), resolve_base("teacher"))
    known = {item.prompt(tokenizer) for item in asked}
    documents = 0
    for row in PreparedDataset(tmp_path / "rows", tokenizer):
        starts = [*(row["position_ids"] == 0).nonzero()[:, 0].tolist(), len(row["input_ids"])]
        for start, stop in zip(starts, starts[1:], strict=False):
            ids, labels = row["input_ids"][start:stop], row["labels"][start:stop]
            if (labels == IGNORED).all():
                continue  # the rest of a row
            first = int((labels != IGNORED).nonzero()[0])
            assert tokenizer.decode(ids[:first]) in known
            answer = model.generate(
                ids[None, :first], max_new_tokens=stop - start - first, do_sample=False, pad_token_id=0
            )
            assert torch.equal(answer[0], ids)
            documents += 1
    assert documents == len(lines)


def test_prompts_depend_on_the_seed_and_are_not_those_of_an_evaluation(teacher):
    tokenizer = teacher[1]
    first, again, other = (prompts(tokenizer, WEIGHTS, 20, 128, seed) for seed in (0, 0, 1))
    assert first == again and first != other and prompts(tokenizer, WEIGHTS, 5, 128, 0) == first[:5]
    assert {item.thinking for item in first} == {True, False}
    asked = {item.prompt(tokenizer) for item in first}
    assert asked.isdisjoint(
        sample(task, seed, tokenizer, 128, "heldout", thinking).prompt(tokenizer)
        for task in WEIGHTS
        for seed in range(20)
        for thinking in (True, False)
    )


def test_answers_without_an_end_and_wrong_ones_are_counted_and_left_out(teacher, tmp_path):
    file = tmp_path / "answers.jsonl"
    right = prompts(teacher[1], {"recall": 1}, 4, 96, seed=0)
    wrong = [replace(item, answer="something else") for item in right[:2]]
    counts = write_answers(*teacher, file, [*wrong, *right[2:]], only_correct=True)["recall"]
    assert (counts["asked"], counts["wrong"], counts["written"]) == (4, 2, 2)
    assert [json.loads(line)["correct"] for line in file.read_text().splitlines()] == [True, True]
    with pytest.raises(
        HmfError,
        match=r"none of 4 answers can be written: recall 0 of 4 \(4 wrong, 4 not ended\); raise --max-new-tokens",
    ):
        write_answers(*teacher, tmp_path / "none.jsonl", right, max_new_tokens=1)
    with pytest.raises(HmfError, match=r"recall 0 of 1 \(1 wrong, 1 not ended\)"):
        write_answers(*teacher, tmp_path / "none.jsonl", right[:1], max_new_tokens=1)
    assert not (tmp_path / "none.jsonl").exists()


def test_the_command(tmp_path):
    out = tmp_path / "answers.jsonl"
    options = ["data", "answers", "teacher", "--samples", "2", "--length", "96", "--out", str(out)]
    result = CliRunner().invoke(app, [*options, "--tasks", "tool_call,recall=2"])
    assert result.exit_code == 0 and "messages_field: messages" in result.output
    assert len(out.read_text().splitlines()) == 2
    for wrong, message in (
        (options, "exists"),
        (["--tasks", "recal"], "did you mean 'recall'"),
        (["--tasks", "recall=1,needle,recall=2"], "recall is named twice"),
        (["--tasks", "recall=0"], "give a weight above 0"),
    ):
        arguments = wrong if wrong is options else [*options[:-1], str(tmp_path / "new.jsonl"), *wrong]
        assert message in str(CliRunner().invoke(app, arguments).exception)


@pytest.mark.parametrize("command", [["data", "answers"], ["evaluate"]])
def test_a_task_that_the_template_cannot_write_is_refused_first(tmp_path, command):
    shutil.copytree(resolve_base("teacher"), tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    (tmp_path / "model/model.safetensors").write_bytes(b"")  # not read
    options = ["--tasks", "tool_call", "--out", str(tmp_path / "out.jsonl")]
    error = CliRunner().invoke(app, [*command, str(tmp_path / "model"), *options]).exception
    assert isinstance(error, HmfError) and "--tasks: tool_call: the chat template leaves tools out" in str(error)
    assert not (tmp_path / "out.jsonl").exists()
