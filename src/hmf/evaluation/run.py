# SPDX-License-Identifier: Apache-2.0
"""All scores of a model: `evaluate_model`, and `evaluate_checkpoint` for a checkpoint directory."""

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
from hmf.errors import notice
from hmf.evaluation.chunks import Composition
from hmf.evaluation.generation import task_accuracy
from hmf.evaluation.ngram import bits_per_byte
from hmf.evaluation.perplexity import perplexity
from hmf.evaluation.results import describe, versions, wilson
from hmf.folders import shown
from hmf.gpus import available
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
    compose: Composition | None = None,
    answers: Path | None = None,
) -> dict[str, Any]:
    """Score a model on held-out text and generated tasks, in evaluation mode and in its own dtype.

    Args:
        tasks: names of `hmf.data.tasks.TASKS`; may be empty.
        n: samples of each task; they are the same for every model.
        length: largest number of tokens of a conversation, and the window for text.
        thinking: whether the prompts enable reasoning; None means True, the chat template's default.
        corpus: "stdlib", a folder or a file. Its held-out part is scored.
        max_bytes: largest number of bytes of held-out text; None for all, 0 for none.
        name: label of the progress lines.
        compose: how chunks of long prompts are combined. None: prompts are processed as a whole.
        answers: folder for the answers, one file TASK.jsonl for each task. None: answers are not stored.
    Returns:
        {"text": {perplexity, bits_per_byte, tokens, bytes}, "tasks": {name: {accuracy, n, truncated, interval}},
        "length", "seconds"}; with `compose`, also "compose".
    Raises:
        HmfError: the chat template cannot write a task, for example its tools.
    """
    generated.require_template(tasks, tokenizer)
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
        score = task_accuracy(model, tokenizer, samples, batch_size, max_new_tokens, title, compose, file)
        result["tasks"][task] = {**asdict(score), "interval": wilson(score.accuracy, score.n)}
    model.train(was_training)
    if compose is not None:
        result["compose"] = asdict(compose)
    return {**result, "length": length, "seconds": round(time.perf_counter() - started, 1)}


def baselines(
    tokenizer: PreTrainedTokenizerBase, corpus: str = text.STDLIB, max_bytes: int | None = None
) -> dict[str, float]:
    """Bits per byte of order-3 models of bytes and of tokens, trained on the corpus and scored on its held-out part."""
    train = [document.text for document in text.documents(corpus, "train")]
    heldout = [document.text for document in text.documents(corpus, "heldout", max_bytes)]
    train_bytes, heldout_bytes = [[*t.encode()] for t in train], [[*t.encode()] for t in heldout]
    size = sum(map(len, heldout_bytes))
    tokens, heldout_tokens = encode_texts(tokenizer, train), encode_texts(tokenizer, heldout)
    return {
        "order3_bytes": bits_per_byte(train_bytes, heldout_bytes, 256, size),
        "order3_tokens": bits_per_byte(tokens, heldout_tokens, len(tokenizer), size),
    }


def load_for_evaluation(
    path: str | Path, device: str | None, dtype: str | None, generates: bool = True
) -> PreTrainedModel:
    """Load a model onto its device. `device` and `dtype` are as in `evaluate_checkpoint`. Raises HmfError if there is
    no GPU."""
    device = available(device)
    dtype = dtype or ("auto" if device == "cuda" else "float32")
    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    return load_model(path, dtype=weights, generates=generates).to(device)


def evaluate_checkpoint(
    path: str | Path,
    settings: EvaluateSettings,
    device: str | None = None,
    dtype: str | None = None,
    with_baselines: bool = False,
    name: str = "evaluate",
    compose: Composition | None = None,
    answers: Path | None = None,
) -> dict[str, Any]:
    """`hmf evaluate`: the scores of `evaluate_model` and the memory footprint of the checkpoint at `path`.

    Args:
        device: None for "cuda" if a GPU is available, else "cpu".
        dtype: None for the stored dtype on a GPU, and "float32" on a CPU.
        compose, answers: as in `evaluate_model`.
    """
    tokenizer = load_tokenizer(path)
    model = load_for_evaluation(path, device, dtype, generates=bool(settings.tasks))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if compose is None and context is not None and settings.length > context:
        notice(
            f"length: {settings.length:,} tokens exceed the {context:,} that {shown(Path(path))} has "
            "(max_position_embeddings); the scores include positions for which the model was not trained"
        )
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
        compose=compose,
        answers=answers,
    )
    if with_baselines:
        scores["baselines"] = baselines(tokenizer, max_bytes=settings.text_bytes)
    used = {"seed": 0, "sampling": {"temperature": 0.0}, "dtype": str(model.dtype).removeprefix("torch.")}
    about = {"settings": {**settings.model_dump(), **used, "device": model.device.type}, "versions": versions()}
    return {**scores, "footprint": footprint(model), **about, "model": describe(Path(path))}
