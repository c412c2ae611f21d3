# SPDX-License-Identifier: Apache-2.0
import copy
from contextlib import nullcontext
from random import Random

import pytest
import torch

from hmf.config.runs import DataSettings
from hmf.data import tasks
from hmf.data.encoding import IGNORED, encode_document
from hmf.data.mixture import MixtureDataset, PromptDataset, encode_conversation, mixture
from hmf.data.packing import best_fit
from hmf.data.tokenizer import document_separator, encode_texts
from hmf.errors import HmfError
from tests.conftest import ROOT


def test_only_the_last_turn_of_a_conversation_is_supervised(tokenizer):
    for thinking in (True, False):
        sample = tasks.sample("tool_answer", 5, tokenizer, 512, thinking=thinking)
        item = encode_conversation(tokenizer, sample)
        supervised = [label for label in item.labels if label != IGNORED]
        text = tokenizer.decode(supervised)
        assert text.endswith(f"{sample.answer}<|im_end|>")
        assert text.startswith("<think>\nThe tool says" if thinking else "The result is")
        assert item.ids[: -len(supervised)] == encode_texts(tokenizer, [sample.prompt(tokenizer)])[0]


def test_documents_are_separated(tokenizer):
    item = encode_document(tokenizer, "import os\n")
    separator = document_separator(tokenizer)
    assert item.ids[0] == item.ids[-1] == separator == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert item.labels == [IGNORED, *item.ids[1:]]


def test_mixture_rows_depend_on_seed_and_index_alone(tokenizer):
    texts = encode_texts(tokenizer, ["x = 1\n" * 200, "y = 2\n" * 50])
    weights = {"recall": 1.0, "arithmetic": 1.0}
    make = lambda seed: MixtureDataset(texts, tokenizer, 256, weights, rows=6, text_share=0.3, seed=seed)  # noqa: E731
    first, second = make(0), make(0)
    order = list(range(6))
    Random(1).shuffle(order)
    rows = {index: second[index] for index in order}
    for index in range(6):
        assert first[index]["input_ids"].shape == (256,)
        assert all(torch.equal(first[index][name], rows[index][name]) for name in rows[index])
    assert any(not torch.equal(first[i]["input_ids"], make(1)[i]["input_ids"]) for i in range(6))


def test_rows_of_a_mixture_restart_with_each_document(tokenizer):
    texts = encode_texts(tokenizer, ["def f(x):\n    return x\n" * 20, "short"])
    weights = dict.fromkeys(tasks.TASKS, 1.0)
    dataset = MixtureDataset(texts, tokenizer, 256, weights, rows=20, text_share=0.3, seed=0)
    separator, several = document_separator(tokenizer), 0
    for row in (dataset[index] for index in range(len(dataset))):
        assert {name: (tuple(t.shape), t.dtype) for name, t in row.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), ((256,), torch.int64)
        )
        starts = row["position_ids"] == 0
        steps = row["position_ids"][1:] - row["position_ids"][:-1]
        assert starts[0] and torch.all((steps == 1) | starts[1:])
        assert torch.all(row["labels"][starts] == IGNORED)  # no document predicts its own first token
        kept = row["labels"] != IGNORED
        assert kept.any() and torch.equal(row["labels"][kept], row["input_ids"][kept])
        several += int(starts.sum() > 1)
    assert several > 5 and separator in dataset[0]["input_ids"]


def test_rows_too_short_for_a_task_are_refused(tokenizer):
    given = {"text": str(ROOT / "docs"), "text_share": 0.5, "tasks": {"recall": 1.0}}
    row = mixture(DataSettings(**given, sequence_length=tasks.MIN_LENGTH), tokenizer, 1, 0)[0]
    assert len(row["input_ids"]) == tasks.MIN_LENGTH
    for share, refused in ((0.5, True), (1.0, False)):
        short = DataSettings(**given | {"text_share": share}, sequence_length=tasks.MIN_LENGTH - 1)
        with pytest.raises(HmfError, match="data.sequence_length: 95 tokens") if refused else nullcontext():
            mixture(short, tokenizer, 1, 0)


def test_tasks_are_checked_with_the_template_before_the_first_row(tokenizer):
    changed = copy.deepcopy(tokenizer)
    given = {"text": str(ROOT / "docs"), "text_share": 0.1, "sequence_length": 128}
    # It writes neither tools nor thinking.
    changed.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for kind in (MixtureDataset, PromptDataset):
        with pytest.raises(HmfError, match="^data.tasks: tool_call: .* leaves tools out .*, or leave the task out"):
            mixture(DataSettings(**given, tasks={"arithmetic": 1.0, "tool_call": 1e-9}), changed, 1, 0, kind)
    rows = mixture(DataSettings(**given, tasks={"arithmetic": 1.0, "tool_call": 0}), changed, 8, 0)
    texts = "".join(tokenizer.decode(rows[index]["input_ids"]) for index in range(8))
    assert texts.count("assistant: ") > 8 and "<think>" not in texts


def test_prompts_fit_and_depend_on_seed_and_row_alone(tokenizer):
    texts = encode_texts(tokenizer, ["x = 1\n" * 200, "y = 2\n" * 50])
    make = lambda seed: PromptDataset(texts, tokenizer, 200, {"arithmetic": 1.0}, rows=20, text_share=0.5, seed=seed)  # noqa: E731
    first, second = make(0), make(0)
    again = {index: second[index] for index in reversed(range(20))}
    prompts = [first[index]["prompt"] for index in range(20)]
    assert all(again[index]["prompt"] == prompt for index, prompt in enumerate(prompts))
    assert all(1 <= len(prompt) <= 200 for prompt in prompts)
    assert prompts != [make(1)[index]["prompt"] for index in range(20)]
    rendered = [tokenizer.decode(prompt) for prompt in prompts]
    assert 0 < sum(text.endswith("assistant\n") or "<|im_start|>assistant" in text for text in rendered) < 20


def test_the_fullest_rows_are_closed_first():
    """Two rows stay open: of room 1, 2, 3 and 5 those of 3 and 5, which the last two items fill."""
    assert best_fit([9, 5, 8, 7, 5, 3], 10, window=2) == [[0], [1, 4], [2], [3, 5]]
