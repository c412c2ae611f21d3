# SPDX-License-Identifier: Apache-2.0
"""The embedded teacher can do what its record says, on a reduced score."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hmf
from hmf.config.runs import EvaluateSettings
from hmf.data import tasks, text
from hmf.evaluation import evaluate_model
from hmf.evaluation.generation import generate_answers, task_accuracy
from hmf.evaluation.perplexity import perplexity
from hmf.evaluation.run import evaluate_checkpoint

TEACHER = Path(hmf.__file__).parent / "assets" / "teacher"


@pytest.fixture(scope="module")
def teacher():
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TEACHER)


def test_the_folder_is_small_and_whole():
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 8_000_000
    record = json.loads((TEACHER / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(TEACHER)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == record["parameters"] <= 4_000_000
    assert model.config.max_position_embeddings >= 4096 and model.config.tie_word_embeddings


def test_library_text(teacher):
    heldout = [document.text for document in text.stdlib_documents("heldout", max_bytes=20_000)]
    # An order-3 model of tokens needs more than 1.9 bits a byte on the whole held-out part.
    assert perplexity(*teacher, heldout, window=512).bits_per_byte < 1.75


@pytest.mark.parametrize(
    ("task", "length", "least"),
    [("recall", 256, 7), ("needle", 256, 7), ("arithmetic", 128, 6), ("tool_call", 512, 7)],
)
def test_tasks(teacher, task, length, least):
    samples = [tasks.sample(task, seed, teacher[1], length, split="heldout") for seed in range(8)]
    score = task_accuracy(*teacher, samples, batch_size=8)
    assert (score.n, score.truncated) == (8, 0.0)
    assert score.accuracy * 8 >= least


def test_answers_come_back_in_order_whatever_the_batch(teacher):
    samples = [tasks.sample("recall", seed, teacher[1], 96 + 30 * (seed % 3), thinking=False) for seed in range(5)]
    together = generate_answers(*teacher, samples, batch_size=5)
    assert together == generate_answers(*teacher, samples, batch_size=2)
    # Cut short, an answer counts as truncated.
    assert not any(one.ended for one in generate_answers(*teacher, samples, batch_size=5, max_new_tokens=1))


@pytest.mark.parametrize("published", ["ends with the text", "names no padding", "no end but the model's"])
def test_answers_end_where_the_model_ends_them(teacher, published):
    """As in tokenizers of Gemma, whose EOS ends texts, of Llama, without padding, and of base models without a chat."""
    model, tokenizer = copy.deepcopy(teacher[0]), copy.deepcopy(teacher[1])
    samples = [tasks.sample("arithmetic", seed, tokenizer, 128) for seed in range(3)]
    expected = generate_answers(*teacher, samples)
    match published:
        case "ends with the text":
            tokenizer.eos_token = "<|endoftext|>"
        case "names no padding":
            tokenizer.pad_token = None
        case _:
            tokenizer.eos_token = tokenizer.pad_token = model.generation_config.pad_token_id = None
    assert generate_answers(model, tokenizer, samples) == expected
    assert {one.end for one in expected} == {"<|im_end|>"}


def test_an_answer_that_is_cut_off_is_not_correct(teacher):
    """It could go on: 12 might become 125."""
    samples = [tasks.sample("arithmetic", 1, teacher[1], 128, split="heldout", thinking=False)]
    [whole] = generate_answers(*teacher, samples)
    right = [replace(samples[0], answer=whole.text.strip())]
    assert task_accuracy(*teacher, right).accuracy == 1
    score = task_accuracy(*teacher, right, max_new_tokens=whole.tokens)
    assert (score.accuracy, score.truncated) == (0, 1)


def test_a_length_beyond_the_context_is_named(capsys):
    settings = EvaluateSettings(tasks=[], length=8192, text_bytes=1)
    evaluate_checkpoint(TEACHER, settings)
    assert "length: 8,192 tokens exceed the 4,096" in capsys.readouterr().err


def test_answers_are_kept_with_their_prompts(teacher, tmp_path):
    samples = [tasks.sample("recall", seed, teacher[1], 128, split="heldout", thinking=False) for seed in range(3)]
    file = tmp_path / "evaluation" / "recall.jsonl"
    score = task_accuracy(*teacher, samples, answers_file=file)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [one["prompt"] for one in kept] == [sample.prompt(teacher[1]) for sample in samples]
    assert [(one["index"], one["expected"]) for one in kept] == [(n, one.answer) for n, one in enumerate(samples)]
    assert sum(one["correct"] for one in kept) == round(score.accuracy * 3)
    assert all(sample.is_correct(one["answer"]) == one["correct"] for sample, one in zip(samples, kept, strict=True))
    long = tasks.sample("needle", 0, teacher[1], 4000, split="heldout")
    task_accuracy(*teacher, [long], max_new_tokens=1, answers_file=file)
    one = json.loads(file.read_text())
    assert len(one["prompt"]) < 4100 < len(long.prompt(teacher[1])) and "characters are left out" in one["prompt"]
    assert (one["truncated"], one["tokens"]) == (True, 1)


def test_all_scores_in_one_dict(teacher):
    model, tokenizer = teacher
    model.train()
    scores = evaluate_model(model, tokenizer, tasks=["chat"], n=2, length=128, max_bytes=2_000)
    assert model.training
    model.eval()
    assert set(scores) == {"text", "tasks", "length", "seconds"}
    assert scores["tasks"]["chat"]["n"] == 2 and scores["text"]["bytes"] <= 2_000
