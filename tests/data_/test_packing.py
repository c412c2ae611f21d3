# SPDX-License-Identifier: Apache-2.0
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf.data import tasks
from hmf.data.encoding import IGNORED, Encoded, encode_document
from hmf.data.packing import (
    MixtureDataset,
    PromptDataset,
    best_fit,
    build_dataset,
    cu_seqlens,
    encode_conversation,
    pack,
)
from hmf.data.tokenizer import document_separator, encode_texts
from hmf.errors import HmfError

FILLER = -1
LENGTHS = st.lists(st.integers(1, 40), max_size=12)


def _items(lengths, first):
    """Items of tokens that are all different, everything but the first token of each supervised."""
    items = []
    for length in lengths:
        ids = list(range(first, first + length))
        items.append(Encoded(ids, [IGNORED, *ids[1:]]))
        first += length
    return items


@given(whole=LENGTHS, divisible=LENGTHS, sequence_length=st.integers(1, 24))
@settings(deadline=None)
def test_packing_keeps_every_token_once(whole, divisible, sequence_length):
    turns, texts = _items(whole, 0), _items(divisible, 10_000)
    rows = pack(turns, texts, sequence_length, FILLER)
    assert all(sum(map(len, row)) == sequence_length for row in rows)
    packed = [token for row in rows for item in row for token in item.ids]
    real = [token for token in packed if token != FILLER]
    assert sorted(real) == sorted(token for item in turns + texts for token in item.ids)
    assert len(packed) - len(real) < sequence_length
    for item in (item for row in rows for item in row):
        # Labels are the tokens themselves, and a piece never predicts its own first token.
        assert item.labels[0] == IGNORED
        assert all(label in (IGNORED, token) for token, label in zip(item.ids, item.labels, strict=True))


@given(whole=st.lists(st.integers(1, 16), max_size=12), divisible=st.integers(200, 300))
@settings(deadline=None)
def test_what_fits_stays_whole_while_there_is_text_to_fill_with(whole, divisible):
    turns = _items(whole, 0)
    rows = pack(turns, _items([divisible], 10_000), 16, FILLER)
    pieces = [item.ids for row in rows for item in row]
    assert all(turn.ids in pieces for turn in turns)


def test_rows_of_text_and_conversations(tokenizer):
    samples = [tasks.sample(task, 1, tokenizer, 200) for task in tasks.TASKS]
    texts = ["def f(x):\n    return x\n" * 20, "short"]
    dataset = build_dataset(texts, samples, tokenizer, sequence_length=256, seed=0)
    again = build_dataset(texts, samples, tokenizer, sequence_length=256, seed=0)
    total = 0
    for index in range(len(dataset)):
        row = dataset[index]
        assert all(torch.equal(row[name], again[index][name]) for name in row)
        assert {name: (tuple(t.shape), t.dtype) for name, t in row.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), ((256,), torch.int64)
        )
        assert row["position_ids"][0] == 0
        starts = row["position_ids"] == 0
        steps = row["position_ids"][1:] - row["position_ids"][:-1]
        assert torch.all((steps == 1) | starts[1:])
        assert torch.all(row["labels"][starts] == IGNORED)
        kept = row["labels"] != IGNORED
        assert torch.equal(row["labels"][kept], row["input_ids"][kept])
        total += int(kept.sum())
    expected = [encode_document(tokenizer, text) for text in texts]
    expected += [encode_conversation(tokenizer, sample) for sample in samples]
    supervised = sum(label != IGNORED for item in expected for label in item.labels)
    assert supervised - len(dataset) * 2 <= total <= supervised  # a cut costs the label of one token


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


def test_boundaries_of_rows_laid_end_to_end():
    positions = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    assert cu_seqlens(positions).tolist() == [0, 3, 4, 5, 8]
    assert cu_seqlens(positions).dtype == torch.int32


def test_nothing_to_pack(tokenizer):
    with pytest.raises(HmfError, match="no text and no conversations"):
        build_dataset([], [], tokenizer, 64, 0)


def test_the_fullest_rows_are_closed_first():
    """Two rows stay open: of room 1, 2, 3 and 5 those of 3 and 5, which the last two items fill."""
    assert best_fit([9, 5, 8, 7, 5, 3], 10, window=2) == [[0], [1, 4], [2], [3, 5]]
