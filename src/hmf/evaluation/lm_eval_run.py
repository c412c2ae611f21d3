# SPDX-License-Identifier: Apache-2.0
"""Run lm-eval's tasks on a local model or on an OpenAI-compatible server: `hmf harness lm-eval`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hmf.errors import HmfError, require_names
from hmf.evaluation.harness import copy_name, write_scores
from hmf.evaluation.lm_eval_suites import RULER_LENGTHS, SUITES, Options


def evaluate(source: Path, tasks: Sequence[str], run: Path, name: str, options: Options) -> Path:
    """Run `tasks`, or one suite, on the model at `source`; write RUN/scores.NAME-SUITE.json and return its path.

    Raises:
        HmfError: lm-eval is missing; a task or a setting is unknown or does not fit the model; the server does not
            answer; lm-eval fails, for example because a data set cannot be fetched.
    """
    try:
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable

        from . import lm_eval_models
    except ImportError as error:
        raise HmfError(f"lm-eval is not installed ({error}); pip install 'hybrid-model-factory[eval]'") from None
    suite = SUITES.get(tasks[0]) if len(tasks) == 1 else None
    names = list(suite.tasks if suite else tasks)
    if unknown := [length for length in options.lengths if length not in RULER_LENGTHS]:
        raise HmfError(f"--lengths: {unknown[0]}: RULER's tasks have {', '.join(map(str, RULER_LENGTHS))}")
    if options.limit and len(options.lengths) > 1:
        raise HmfError(
            "--limit: selects the first prompts, which all have the first length; give one length in --lengths"
        )
    metadata: dict[str, Any] = {"tokenizer": str(source)}
    if options.lengths or list(tasks) == ["long"]:
        metadata["max_seq_lengths"] = list(options.lengths or RULER_LENGTHS[:1])
    manager = TaskManager(
        include_path=str(options.task_folder) if options.task_folder else None,
        include_defaults=options.task_folder is None,
        metadata=metadata,
    )
    require_names("--tasks", "task", names, manager.all_tasks)
    chat = options.chat if options.chat is not None else bool(suite and suite.chat)
    generation = dict(suite.generation if suite else {})
    if options.max_new_tokens is not None:
        generation["max_gen_toks"] = options.max_new_tokens
    if options.temperature is not None:
        generation |= {"do_sample": options.temperature > 0, "temperature": options.temperature}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = (
        lm_eval_models.here(source, chat, options)
        if options.url is None
        else lm_eval_models.served(source, options.url, chat, options)
    )
    target = None
    for task in names:  # one at a time, so that finished tasks are saved if a later one fails
        tracker = EvaluationTracker()
        model.asked.clear()
        model.cut.clear()
        try:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=manager,
                num_fewshot=options.shots,
                limit=options.limit,
                gen_kwargs=dict(generation) or None,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                log_samples=False,
                batch_size=options.batch_size,
                evaluation_tracker=tracker,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
        except (HmfError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # any type: from data sets, from tasks' own code, from the server
            why = " ".join(str(error).split()) or "no reason given"
            saved = f"; the tasks before it are in {target}" if target else ""
            raise HmfError(f"--tasks: {task}: lm-eval stopped: {type(error).__name__}: {why:.300}{saved}") from error
        assert results is not None  # it is None only in processes other than the first
        results |= {
            **asdict(tracker.general_config_tracker),
            "truncated": {part: model.cut[part] / asked for part, asked in model.asked.items()},
            "hmf": {
                "checkpoint": str(source),
                "url": options.url,
                "chat_template_applied": chat,
                "thinking": options.thinking if chat else None,
                "dtype": options.dtype,
            },
        }
        text = json.dumps(results, indent=1, default=handle_non_serializable)
        file = run / copy_name("lm-eval", name, text.encode(), ".json")
        file.write_text(text, encoding="utf-8")
        target = write_scores(run, name, f"lm-eval-{tasks[0]}" if suite else "lm-eval", [file])
    assert target is not None
    return target
