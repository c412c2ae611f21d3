# SPDX-License-Identifier: Apache-2.0
"""Suites of lm-eval's tasks, and how they are run. Does not need lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # of the metrics that its tasks define


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval, and how models of this kind are asked. `generation` goes over what the tasks define."""

    tasks: tuple[str, ...]
    chat: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


SUITES = {
    # Likelihoods of short answers, without a chat template, as base models are compared.
    "short": Suite(
        (
            "arc_easy",
            "arc_challenge",
            "boolq",
            "hellaswag",
            "lambada_openai",
            "mmlu",
            "openbookqa",
            "piqa",
            "winogrande",
        )
    ),
    "long": Suite(("ruler",), chat=True),
    # Sampled as the models of the example card are. No stop strings: a thought may well hold "Q:".
    "reasoning": Suite(
        ("gsm8k_cot_zeroshot", "minerva_math500", "aime24", "aime25", "gpqa_diamond_cot_zeroshot", "ifeval"),
        chat=True,
        generation={"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_gen_toks": 32768, "until": []},
    ),
}


@dataclass(frozen=True)
class Options:
    """How tasks are run. None: as the suite or the task defines it."""

    url: str | None = None
    chat: bool | None = None
    thinking: bool = True
    batch_size: int = 8
    concurrency: int = 16
    limit: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    lengths: tuple[int, ...] = ()
    shots: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    task_folder: Path | None = None  # of task files that are used in place of lm-eval's own
