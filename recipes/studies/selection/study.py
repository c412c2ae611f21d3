# SPDX-License-Identifier: Apache-2.0
"""Prime every choice of layers, and score the choices by each method of `hmf select`. See README.md.

Each result is written at once as a line of JSON to OUT/results.jsonl. An interrupted study continues with the same
command. `report.py` makes the table and the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TASKS = ("recall", "needle", "arithmetic", "tool_call")
# Start and objective of Stage 1: changes of the recipe by name. All except the last two read the same number of tokens.
MSE = ["distill.objective.layerwise_steps=0", "distill.objective.kl=0"]
SUMS = ["distill.data.tasks.arithmetic=6", "distill.data.text_share=0.1"]
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
    "conversations": ["distill.data.text_share=0"],
    "more-arithmetic": SUMS,
    "more-arithmetic-kl": [*SUMS, KL_ALONE],
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
    parser.add_argument(
        "--replaced", default="1,2,3,4", help="numbers of replaced layers; all choices of these sizes run"
    )
    parser.add_argument("--choices", help="only these choices, such as 0,2,3;1,4, instead of --replaced")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=270, help="steps of Stage 1, of which 16 in 27 layer by layer")
    parser.add_argument("--prompts", type=int, default=60, help="of each task")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows for the KL, and for each method's scores")
    parser.add_argument("--methods", default="window,start,aligned,supernet", help="methods to run; may be empty")
    parser.add_argument("--variants", help=f"all, or some of {', '.join(VARIANTS)}; run instead of the methods")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        Job(options, json.loads(options.one)).run()
        return
    options.out.mkdir(parents=True, exist_ok=True)
    plan = list(jobs(options))
    done = finished(options.out / "results.jsonl")
    remaining = [job for job in plan if key(job) not in done]
    print(f"{len(remaining)} of {len(plan)} runs to do, {options.jobs} at a time", flush=True)
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with ThreadPoolExecutor(options.jobs) as pool:
        for name, code in pool.map(lambda job: start(job, options, deadline), remaining):
            print(
                f"{name}: {'done' if code == 0 else 'not started' if code is None else f'failed ({code})'}", flush=True
            )


def jobs(options: Any) -> Any:
    """The runs of the study, the longest first."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    layers = num_layers(options)
    if options.variants is not None:
        names = list(VARIANTS) if options.variants == "all" else options.variants.split(",")
    else:
        names = ["recipe"]
        for seed in seeds:
            for method in reversed([name for name in options.methods.split(",") if name]):
                yield {"kind": "method", "method": method, "seed": seed}
    if options.choices is not None:
        choices = [tuple(int(layer) for layer in choice.split(",")) for choice in options.choices.split(";")]
    else:
        sizes = sorted((int(count) for count in options.replaced.split(",") if count), reverse=True)
        choices = [choice for count in sizes for choice in combinations(range(layers), count)]
    for seed in seeds:
        for replaced in choices:
            for name in names:
                yield {"kind": "prime", "variant": name, "set": VARIANTS[name], "replaced": replaced, "seed": seed}


def num_layers(options: Any) -> int:
    from hmf.config.runs import PrimeRecipe, read_recipe
    from hmf.folders import resolve_base

    recipe = read_recipe(options.recipe, PrimeRecipe, options.overrides)[0]
    return json.loads((resolve_base(recipe.base) / "config.json").read_text())["num_hidden_layers"]


def key(job: dict[str, Any]) -> str:
    if job["kind"] == "method":
        return f"{job['method']}-seed{job['seed']}"
    return f"{job['variant']}-{'_'.join(map(str, job['replaced']))}-seed{job['seed']}"


def finished(results: Path) -> set[str]:
    """Keys of the finished runs. An incomplete line, from an interrupted write, is ignored."""
    return {line["key"] for line in read_lines(results) if line.get("finished")}


def read_lines(results: Path) -> list[dict[str, Any]]:
    lines = []
    for line in results.read_text().splitlines() if results.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def start(job: dict[str, Any], options: Any, deadline: float | None) -> tuple[str, int | None]:
    """Run one job in its own process, with one thread."""
    name = key(job)
    if deadline is not None and time.monotonic() > deadline:
        return name, None
    work = (options.work or options.out / "work") / name
    work.mkdir(parents=True, exist_ok=True)
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, **quiet, "CUDA_VISIBLE_DEVICES": ""}
    with (work.parent / f"{name}.log").open("a") as log:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(job)]
        return name, subprocess.run(command, env=environment, stdout=log, stderr=log).returncode


class Job:
    """The work of one process: prime and score a choice, or score all choices by a method."""

    def __init__(self, options: Any, job: dict[str, Any]):
        import torch

        from hmf.config.runs import PrimeRecipe, read_recipe
        from hmf.data.mixture import mixture
        from hmf.data.tokenizer import load_tokenizer
        from hmf.folders import resolve_base
        from hmf.selection.supernet import training_of

        torch.set_num_threads(1)
        overrides = [*options.overrides, *job.get("set", [])]
        self.options, self.job, self.seed = options, job, job["seed"]
        self.recipe = read_recipe(options.recipe, PrimeRecipe, overrides)[0]
        self.base = resolve_base(self.recipe.base)
        self.tokenizer = load_tokenizer(self.base)
        objective, training = self.recipe.distill.objective, self.recipe.distill.training
        steps = round(options.steps * training.steps / 270)
        layerwise = round(steps * objective.layerwise_steps / training.steps)
        self.stage1 = training_of(self.recipe.distill, layerwise, steps - layerwise)
        rows = mixture(self.recipe.distill.data, self.tokenizer, options.rows, self.seed + HELDOUT)
        self.rows = [rows[index] for index in range(options.rows)]
        self.work = (options.work or options.out / "work") / key(job)
        self.started = time.perf_counter()

    def run(self) -> None:
        if self.job["kind"] == "prime":
            self.prime()
        else:
            self.method()
        shutil.rmtree(self.work, ignore_errors=True)

    def write(self, **result: Any) -> None:
        """Append one line in a single write, because other processes append to the same file."""
        settings = {name: value for name, value in self.job.items() if name != "set"}
        seconds = round(time.perf_counter() - self.started, 1)
        line = json.dumps({"key": key(self.job), **settings, "steps": self.options.steps, **result, "seconds": seconds})
        with (self.options.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    def prime(self) -> None:
        import torch

        from hmf.config.pattern import Pattern
        from hmf.evaluation.run import evaluate_model
        from hmf.model.checkpoint import load_model
        from hmf.priming.stage0 import make_stage0
        from hmf.selection.scores import means
        from hmf.training.distill import distill

        hybrid, replaced = self.recipe.hybrid, self.job["replaced"]
        layers = num_layers(self.options)
        pattern = Pattern.generate(layers, hybrid.mixer, layers=replaced)
        stage0 = self.work / "stage0"
        if not stage0.is_dir():
            make_stage0(self.base, pattern, stage0, hybrid.options_by_key(), self.seed, hybrid.conv_start)
        model = load_model(distill(stage0, self.work, self.stage1, self.seed), dtype=torch.float32)
        # The score of the trained student against its teacher, computed as in the methods.
        kl = means(self.scorer(model)([frozenset(replaced)])[0])
        self.write(kl=kl)
        scores = {}
        for task in TASKS:
            scored = evaluate_model(
                model, self.tokenizer, tasks=[task], n=self.options.prompts, length=512, max_bytes=0
            )
            scores[task] = scored["tasks"][task]["accuracy"]
            self.write(kl=kl, scores=scores, prompts=self.options.prompts, finished=len(scores) == len(TASKS))

    def method(self) -> None:
        from hmf.selection.supernet import align, fused_everywhere, training_of

        method, hybrid = self.job["method"], self.recipe.hybrid
        options, mixer = hybrid.options_by_key(), hybrid.mixer
        if method == "window":
            options, mixer = options | {"swa_config": {"window_size": 64}}, "swa"
        model = fused_everywhere(self.base, mixer, options, self.seed, hybrid.conv_start)
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
            self.write(replaced=sorted(choice), rows=rows, training_seconds=trained, finished=last)

    def scorer(self, model: Any) -> Any:
        from hmf.selection.scores import Scorer

        return Scorer(model, self.rows)


if __name__ == "__main__":
    main()
