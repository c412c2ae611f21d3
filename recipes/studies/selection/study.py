# SPDX-License-Identifier: Apache-2.0
"""Prime every choice of layers, and score the choices by each method of `hmf select`. See README.md.

Each run writes its results, one JSON line each, into OUT/results.jsonl when it has ended. A study that was stopped goes
on with the runs that are missing. `report.py` makes the table and the plot.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import carry_out, set_environment

HERE = Path(__file__).resolve().parent
TASKS = ("recall", "needle", "arithmetic", "tool_call")
# Start and objective of Stage 1, by name: what each changes in the recipe. All read as many tokens, but the last ones.
MSE = ["distill.objective.layerwise_steps=0", "distill.objective.kl=0"]
SUMS = ["distill.data.tasks.arithmetic=6", "distill.data.text_share=0.1"]
FIFTH = ["distill.training.max_steps=54", "distill.training.warmup_steps=4", "distill.objective.layerwise_steps=32"]
CALIBRATED = "hybrid.start=calibrated"
ANSWERS = "TEACHER_ANSWERS"  # stands for a prepared set with the teacher's own answers
KL_ALONE = "distill.objective.pre_lm_head=0"
VARIANTS = {
    "recipe": [],
    "random-convolutions": ["hybrid.conv_start=random"],
    "mse": MSE,
    "mse-random-convolutions": [*MSE, "hybrid.conv_start=random"],
    "kl-all-tokens": ["distill.objective.kl_tokens=all"],
    "layerwise-then-kl": [KL_ALONE],
    "kl-throughout": ["distill.objective.layerwise_steps=0", KL_ALONE],
    "layerwise-then-reverse-kl": [KL_ALONE, "distill.objective.kl_direction=reverse"],
    "kl-answers-more-where-different": [KL_ALONE, "distill.objective.kl_differing_weight=4"],
    "teacher-answers": [f"distill.data={{prepared: {ANSWERS}}}"],
    "teacher-answers-kl": [f"distill.data={{prepared: {ANSWERS}}}", KL_ALONE],
    "on-policy-reverse": [
        *(KL_ALONE, "distill.objective.kl_direction=reverse", "distill.objective.layerwise_steps=0"),
        "distill.training.max_steps=110",
        "distill.on_policy={max_new_tokens: 128}",
    ],
    "conversations": ["distill.data.text_share=0"],
    "more-arithmetic": SUMS,
    "more-arithmetic-kl": [*SUMS, KL_ALONE],
    # The start that is fitted, with the recipe's steps, and one fifth of them with and without it.
    "calibrated": [CALIBRATED],
    "calibrated-short-layerwise": [CALIBRATED, "distill.objective.layerwise_steps=60"],
    "fifth": FIFTH,
    "calibrated-fifth": [CALIBRATED, *FIFTH],
    "calibrated-fifth-no-layerwise": [CALIBRATED, *FIFTH, "distill.objective.layerwise_steps=0"],
    "twice": ["distill.training.max_steps=540", "distill.objective.layerwise_steps=320"],
    "four-times": ["distill.training.max_steps=1080", "distill.objective.layerwise_steps=640"],
}
HELDOUT = 2**31  # added to a seed, to draw rows that no training reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; default: OUT/work")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, one thread each")
    parser.add_argument("--recipe", default=str(HERE.parents[1] / "quickstart/recipe.yaml"), help="prime recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE in that recipe")
    parser.add_argument("--replaced", default="1,2,3,4", help="how many layers are replaced, in all ways")
    parser.add_argument("--choices", help="these alone, as 0,2,3;1,4, in place of all of some sizes")
    parser.add_argument("--sample", type=int, help="most choices of a size, drawn at random, the same for every seed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=270, help="steps of Stage 1, of which 16 in 27 layer by layer")
    parser.add_argument("--prompts", type=int, default=60, help="of each task")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows for the KL, and for each method's scores")
    parser.add_argument("--methods", default="window,start,aligned,supernet", help="what is run of them; may be empty")
    parser.add_argument("--answers", type=int, default=600, help="of the teacher, for the variants that read them")
    parser.add_argument("--variants", help=f"all, or some of {', '.join(VARIANTS)}; run in place of the methods")
    parser.add_argument("--minutes", type=float, help="start no run after this long; those under way go on")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="all processes share one GPU")
    options = parser.parse_args()
    set_environment(options.device)
    sys.exit(carry_out(options, list(jobs(options)), key, lines_of))


def lines_of(options: Any, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return Job(options, job).run()


def jobs(options: Any) -> Any:
    """What is to be run: seed by seed, so that a study that is stopped has all of some seeds; of each the longest runs
    first."""
    layers = num_layers(options)
    if options.variants is not None:
        names = list(VARIANTS) if options.variants == "all" else options.variants.split(",")
        names.sort(key=lambda name: "max_steps" not in "".join(VARIANTS[name]))
        methods = []
    else:
        names = ["recipe"]
        methods = [name for name in reversed(options.methods.split(",")) if name]
    if options.choices is not None:
        choices = [tuple(int(layer) for layer in choice.split(",")) for choice in options.choices.split(";")]
    else:
        sizes = sorted((int(count) for count in options.replaced.split(",") if count), reverse=True)
        choices = [
            choice for count in sizes for choice in drawn(list(combinations(range(layers), count)), options.sample)
        ]
    yield {"kind": "teacher", "seed": 0}
    for seed in map(int, options.seeds.split(",")):
        for method in methods:
            yield {"kind": "method", "method": method, "seed": seed}
        for name in names:
            for replaced in choices:
                yield {"kind": "prime", "variant": name, "set": VARIANTS[name], "replaced": replaced, "seed": seed}


def drawn(choices: list[tuple[int, ...]], count: int | None) -> list[tuple[int, ...]]:
    return choices if count is None or count >= len(choices) else sorted(Random(0).sample(choices, count))


def num_layers(options: Any) -> int:
    from hmf.config.recipes import read_recipe
    from hmf.config.runs import PrimeRecipe
    from hmf.folders import resolve_base

    recipe = read_recipe(options.recipe, PrimeRecipe, options.overrides)[0]
    return json.loads((resolve_base(recipe.base) / "config.json").read_text())["num_hidden_layers"]


def key(job: dict[str, Any]) -> str:
    if job["kind"] == "teacher":
        return "teacher"
    if job["kind"] == "method":
        return f"{job['method']}-seed{job['seed']}"
    return f"{job['variant']}-{'_'.join(map(str, job['replaced']))}-seed{job['seed']}"


@cache
def scored_rows(recipe: str, overrides: tuple[str, ...], count: int, seed: int) -> list[Any]:
    """Held-out rows. They are kept, because the next run of this process reads the same ones."""
    from hmf.config.recipes import read_recipe
    from hmf.config.runs import PrimeRecipe
    from hmf.data.mixture import mixture
    from hmf.data.tokenizer import load_tokenizer
    from hmf.folders import resolve_base

    settings = read_recipe(recipe, PrimeRecipe, overrides)[0]
    rows = mixture(settings.distill.data, load_tokenizer(resolve_base(settings.base)), count, seed + HELDOUT)
    return [rows[index] for index in range(count)]


def batch_size(options: Any) -> int:
    """Prompts that are answered together."""
    return 16 if options.device == "cpu" else 64


class Job:
    """The teacher's scores, a choice that is primed and scored, or a method that scores all choices."""

    def __init__(self, options: Any, job: dict[str, Any]):
        import torch

        from hmf.config.recipes import read_recipe
        from hmf.config.runs import PrimeRecipe
        from hmf.data.tokenizer import load_tokenizer
        from hmf.folders import resolve_base
        from hmf.selection.supernet import training_of

        torch.set_num_threads(1)
        self.options, self.job, self.seed = options, job, job["seed"]
        self.plain = read_recipe(options.recipe, PrimeRecipe, options.overrides)[0]
        changes = job.get("set", [])
        if any(ANSWERS in change for change in changes):
            folder = str(self.teacher_answers())
            changes = [change.replace(ANSWERS, folder) for change in changes]
        self.recipe = read_recipe(options.recipe, PrimeRecipe, [*options.overrides, *changes])[0]
        self.base = resolve_base(self.recipe.base)
        self.tokenizer = load_tokenizer(self.base)
        objective, training = self.recipe.distill.objective, self.recipe.distill.training
        steps = round(options.steps * training.steps / 270)
        layerwise = round(steps * objective.layerwise_steps / training.steps)
        self.stage1 = training_of(self.recipe.distill, layerwise, steps - layerwise)
        # Of the recipe without the job's changes: all variants are scored on the same rows.
        self.rows = scored_rows(options.recipe, tuple(options.overrides), options.rows, self.seed)
        self.work = options.work / key(job)
        self.work.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()

    def run(self) -> Iterator[dict[str, Any]]:
        """The results, of which the last one says that the run has ended."""
        yield from {"prime": self.prime, "method": self.method, "teacher": self.teacher}[self.job["kind"]]()
        shutil.rmtree(self.work, ignore_errors=True)

    def line(self, **result: Any) -> dict[str, Any]:
        given = {name: value for name, value in self.job.items() if name != "set"}
        seconds = round(time.perf_counter() - self.started, 1)
        return {"key": key(self.job), **given, "steps": self.options.steps, **result, "seconds": seconds}

    def prime(self) -> Iterator[dict[str, Any]]:
        import torch

        from hmf.config.pattern import Pattern
        from hmf.model.checkpoint import load_model
        from hmf.priming.stage0 import make_stage0
        from hmf.selection.scores import means
        from hmf.selection.supernet import training_of
        from hmf.training.distill import distill

        hybrid, replaced = self.recipe.hybrid, self.job["replaced"]
        layers = num_layers(self.options)
        pattern = Pattern.generate(layers, hybrid.mixer, layers=replaced)
        stage0 = self.work / "stage0"
        if not stage0.is_dir():
            options = hybrid.options_by_key()
            data = self.recipe.distill.data
            make_stage0(self.base, pattern, stage0, options, self.seed, hybrid.conv_start, hybrid.calibrated, data)
        if self.stage1.on_policy is not None:  # which cannot begin layer by layer
            training, first = self.plain.distill.training, self.plain.distill.objective.layerwise_steps
            first = round(self.options.steps * first / training.steps)
            stage0 = distill(stage0, self.work / "layerwise", training_of(self.plain.distill, first, 0), self.seed)
        model = load_model(distill(stage0, self.work, self.stage1, self.seed), dtype=torch.float32)
        model.to(self.options.device)
        trained = round(time.perf_counter() - self.started, 1)
        # Score of the whole student beside its teacher, in the way of the methods.
        kl = means(self.scorer(model)([frozenset(replaced)])[0])
        scores = self.scores(model)
        yield self.line(kl=kl, scores=scores, prompts=self.options.prompts, training_seconds=trained, finished=True)

    def teacher(self) -> Iterator[dict[str, Any]]:
        from hmf.evaluation.run import load_for_evaluation

        scores = self.scores(load_for_evaluation(self.base, self.options.device, "float32"))
        yield self.line(scores=scores, prompts=self.options.prompts, finished=True)

    def scores(self, model: Any) -> dict[str, float]:
        """Accuracy of greedy answers by task, on the same prompts for every model."""
        from hmf.evaluation.run import evaluate_model

        count, size = self.options.prompts, batch_size(self.options)
        scored = evaluate_model(model, self.tokenizer, TASKS, count, 512, max_bytes=0, batch_size=size)
        return {task: scored["tasks"][task]["accuracy"] for task in TASKS}

    def teacher_answers(self) -> Path:
        """A prepared set of text and of the teacher's own answers, made once for each seed."""
        from hmf.config.data import DataRecipe
        from hmf.data.prepare import prepare
        from hmf.data.prepared import INDEX
        from hmf.data.tokenizer import load_tokenizer
        from hmf.evaluation.conversations import prompts, write_answers
        from hmf.evaluation.run import load_for_evaluation
        from hmf.folders import resolve_base

        plain, options = self.plain.distill, self.options
        base, folder = resolve_base(self.plain.base), options.work / f"answers-seed{self.seed}"
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / INDEX).is_file():
                return folder
            tokenizer, file = load_tokenizer(base), folder.with_suffix(".jsonl")
            model = load_for_evaluation(base, options.device, "float32").eval()
            asked = prompts(tokenizer, plain.data.tasks, options.answers, plain.data.sequence_length, self.seed)
            write_answers(model, tokenizer, file, asked, batch_size(options), 256)
            rows = options.steps * plain.training.per_device_train_batch_size
            sources = [
                {"path": str(file), "messages_field": "messages", "weight": 1 - plain.data.text_share},
                {"path": plain.data.text, "split": "train", "weight": plain.data.text_share},
            ]
            recipe = {
                "output": folder,
                "tokenizer": str(base),
                "sequence_length": plain.data.sequence_length,
                "sources": sources,
                "tokens": rows * plain.data.sequence_length,
                "turns": "last",
                "seed": self.seed,
            }
            prepare(DataRecipe.model_validate(recipe), base)
        return folder

    def method(self) -> Iterator[dict[str, Any]]:
        from hmf.selection.supernet import align, fused_everywhere, training_of

        method, hybrid = self.job["method"], self.recipe.hybrid
        options, mixer = hybrid.options_by_key(), hybrid.mixer
        if method == "window":
            options, mixer = options | {"swa_config": {"window_size": 64}}, "swa"
        model = fused_everywhere(
            self.base,
            mixer,
            options,
            self.seed,
            hybrid.conv_start,
            None if method == "window" else hybrid.calibrated,
            self.recipe.distill.data,
        ).to(self.options.device)
        layerwise = self.stage1.objective.layerwise_steps
        subsets = {"aligned": 0, "supernet": 2 * (self.stage1.training.steps - layerwise)}
        if method in subsets:
            settings = training_of(self.stage1, layerwise, subsets[method])
            align(model, self.tokenizer, settings, self.work, self.seed)
        trained = round(time.perf_counter() - self.started, 1)
        layers = range(num_layers(self.options))
        scorer = self.scorer(model)
        counts = [1] if method == "window" else layers[1:]
        choices = [frozenset(choice) for count in counts for choice in combinations(layers, count)]
        for choice, sums in zip(choices, scorer(choices), strict=True):
            rows = [[[round(x, 5) for x in pair] for pair in row] for row in sums.tolist()]
            last = choice == choices[-1]
            yield self.line(replaced=sorted(choice), rows=rows, training_seconds=trained, finished=last)

    def scorer(self, model: Any) -> Any:
        from hmf.selection.scores import Scorer

        return Scorer(model, self.rows)


if __name__ == "__main__":
    main()
