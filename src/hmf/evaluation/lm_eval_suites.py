# SPDX-License-Identifier: Apache-2.0
"""Suites of lm-eval's tasks and their settings. This module does not need lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)  # the lengths for which RULER's tasks define metrics


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval and their settings. `generation` overrides the options that the tasks define."""

    tasks: tuple[str, ...]
    chat: bool = False
    generation: dict[str, Any] = field(default_factory=dict)


SUITES = {
    # Likelihoods of short answers without a chat template: the usual comparison of base models.
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
    # Sampled, as for the example model card. No stop strings, because reasoning may contain "Q:".
    "reasoning": Suite(
        ("gsm8k_cot_zeroshot", "minerva_math500", "aime24", "aime25", "gpqa_diamond_cot_zeroshot", "ifeval"),
        chat=True,
        generation={"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_gen_toks": 32768, "until": []},
    ),
}


@dataclass(frozen=True)
class Options:
    """How tasks are run. None selects the setting of the suite or of the task."""

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
    task_folder: Path | None = None  # task files that replace lm-eval's own
