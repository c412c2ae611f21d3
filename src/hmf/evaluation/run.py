# SPDX-License-Identifier: Apache-2.0
"""All scores of a model in one dict: `evaluate_model`, and `evaluate_checkpoint` for a directory."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hmf.config.runs import EvaluateSettings
from hmf.data import tasks as generated
from hmf.data import text
from hmf.data.tokenizer import encode_texts, load_tokenizer
from hmf.errors import HmfError
from hmf.evaluation.generation import task_accuracy
from hmf.evaluation.ngram import bits_per_byte
from hmf.evaluation.perplexity import perplexity
from hmf.model.checkpoint import load_model
from hmf.model.convert import footprint

DEFAULT_TASKS = ("recall", "needle", "arithmetic", "tool_call")


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = DEFAULT_TASKS,
    n: int = 100,
    length: int = 1024,
    *,
    thinking: bool | None = None,
    corpus: str = text.STDLIB,
    max_bytes: int | None = 200_000,
    batch_size: int = 16,
    max_new_tokens: int = 160,
    seed: int = 0,
    name: str = "evaluate",
    answers: Path | None = None,
) -> dict[str, Any]:
    """Held-out text and task accuracy of a model, in evaluation mode and in the dtype that it has.

    Args:
        tasks: names of `hmf.data.tasks.TASKS`; may be empty.
        n: samples of each task; they are the same for every model.
        length: tokens of the longest conversations, and of the window for text.
        thinking: with reasoning or without; None is as without the choice in the chat template: with.
        corpus: "stdlib", or a folder or file; its held-out part is scored.
        max_bytes: held-out text at most; None for all, 0 for none.
        name: what lines of progress begin with.
        answers: folder for a file of answers by task, TASK.jsonl; None keeps none.
    Returns:
        {"text": {perplexity, bits_per_byte, tokens, bytes}, "tasks": {name: {accuracy, n, truncated}}, "seconds"}
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    result: dict[str, Any] = {}
    if max_bytes is None or max_bytes > 0:
        heldout = [document.text for document in text.documents(corpus, "heldout", max_bytes)]
        title = f"{name}: text"
        score = perplexity(model, tokenizer, heldout, window=length, batch_size=batch_size, title=title)
        result["text"] = asdict(score)
    result["tasks"] = {}
    for task in tasks:
        samples = [
            generated.sample(task, seed + index, tokenizer, length, split="heldout", thinking=thinking is not False)
            for index in range(n)
        ]
        title = f"{name}: {task}"
        file = answers / f"{task}.jsonl" if answers else None
        accuracy = task_accuracy(model, tokenizer, samples, batch_size, max_new_tokens, title, file)
        result["tasks"][task] = asdict(accuracy)
    model.train(was_training)
    return {**result, "length": length, "seconds": round(time.perf_counter() - started, 1)}


def baselines(
    tokenizer: PreTrainedTokenizerBase, corpus: str = text.STDLIB, max_bytes: int | None = None
) -> dict[str, float]:
    """Bits per byte of order-3 models of bytes and of tokens, trained and scored on the corpus that models see."""
    train = [document.text for document in text.documents(corpus, "train")]
    heldout = [document.text for document in text.documents(corpus, "heldout", max_bytes)]
    train_bytes, heldout_bytes = [[*t.encode()] for t in train], [[*t.encode()] for t in heldout]
    size = sum(map(len, heldout_bytes))
    tokens, heldout_tokens = encode_texts(tokenizer, train), encode_texts(tokenizer, heldout)
    return {
        "order3_bytes": bits_per_byte(train_bytes, heldout_bytes, 256, size),
        "order3_tokens": bits_per_byte(tokens, heldout_tokens, len(tokenizer), size),
    }


def evaluate_checkpoint(
    path: str | Path,
    settings: EvaluateSettings,
    device: str | None = None,
    dtype: str | None = None,
    with_baselines: bool = False,
    name: str = "evaluate",
    answers: Path | None = None,
) -> dict[str, Any]:
    """`hmf evaluate`: the scores of `evaluate_model`, and the footprint, of the checkpoint at `path`.

    device, dtype: None is "cuda" if there is one and the stored dtype, else "cpu" and "float32". answers: as in
    `evaluate_model`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise HmfError("--device cuda: PyTorch finds no GPU here; leave --device out")
    dtype = dtype or ("auto" if device == "cuda" else "float32")
    tokenizer = load_tokenizer(path)
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    model = load_model(path, dtype=weights, generates=bool(settings.tasks)).to(device)
    scores = evaluate_model(
        model,
        tokenizer,
        tasks=settings.tasks,
        n=settings.samples,
        length=settings.length,
        thinking=settings.thinking,
        max_new_tokens=settings.max_new_tokens,
        max_bytes=settings.text_bytes,
        batch_size=settings.batch_size,
        name=name,
        answers=answers,
    )
    if with_baselines:
        scores["baselines"] = baselines(tokenizer, max_bytes=settings.text_bytes)
    return {**scores, "footprint": footprint(model)}
