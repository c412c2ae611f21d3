# SPDX-License-Identifier: Apache-2.0
"""Compare the layer types: multi-query recall, the embedded teacher, GKA over `num_iter`. See README.md.

Each run writes its results, one JSON line, into OUT/results.jsonl when it has ended. A study that was stopped goes on
with the runs that are missing. `report.py` makes the tables and the plots.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import carry_out, set_environment
from selection import study as selection

TYPES = ("gka", "bmojo", "kda", "gdn", "mamba2", "swa")  # the slowest ones first
WIDE = ("kda-wide", "gdn-wide", "mamba2-wide")
# What each type changes in the recipe. A window is a quarter of the longest prompt, as in docs/layers.md. With 30
# iterations a run of GKA would take twice as long as the others.
TEACHER = {
    **{name: [f"hybrid.mixer={name}"] for name in TYPES},
    "gka": ["hybrid.mixer=gka", "hybrid.options.gka.num_iter=10"],
    "bmojo": ["hybrid.mixer=bmojo", "hybrid.options.bmojo.window_size=128"],
    "swa": ["hybrid.mixer=swa", "hybrid.options.swa.window_size=128"],
}
ATTENTION_RATE = 3e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; default: OUT/work")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time, one thread each")
    parser.add_argument("--parts", default="recall,teacher,iterations")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="0.01,0.003,0.03", help="learning rates of recall; iterations: the first")
    parser.add_argument("--recall-steps", type=int, default=600)
    parser.add_argument("--attention-steps", type=int, default=3000, help="of the attention that is converted")
    parser.add_argument("--iterations", default="15,8,4,2,1", help="of GKA in training, besides the default")
    parser.add_argument("--recipe", default=str(selection.HERE.parents[1] / "quickstart/recipe.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE in that recipe")
    parser.add_argument("--replaced", default="0,1,3", help="layers of the teacher")
    parser.add_argument("--teacher-rates", default="0.005", help="learning rates for the teacher; one after the other")
    parser.add_argument("--steps", type=int, default=270, help="of Stage 1, of which 16 in 27 layer by layer")
    parser.add_argument("--prompts", type=int, default=60, help="of each task")
    parser.add_argument("--rows", type=int, default=48, help="held-out rows for the KL")
    parser.add_argument("--minutes", type=float, help="start no run after this long; those under way go on")
    options = parser.parse_args()
    options.device = "cpu"
    set_environment(options.device)
    sys.exit(carry_out(options, list(jobs(options)), key, lines_of))


def jobs(options: Any) -> Iterator[dict[str, Any]]:
    """Seed by seed, so that a study that is stopped has all types of some seeds. Each rate has all types, too."""
    parts, seeds = options.parts.split(","), [int(seed) for seed in options.seeds.split(",")]
    rates = [float(rate) for rate in options.rates.split(",")]
    replaced = tuple(int(layer) for layer in options.replaced.split(","))
    if {"recall", "iterations"} & set(parts):  # others wait for these
        yield from ({"kind": "attention", "heads": heads, "seed": seed} for heads in (2, 1) for seed in seeds)
    if "teacher" in parts:
        yield {"kind": "teacher", "seed": 0}
    for seed in seeds:
        if "teacher" in parts:
            for rate in options.teacher_rates.split(","):
                for name in TYPES:
                    changes = [*TEACHER[name], f"distill.training.learning_rate={rate}"]
                    about = {"variant": f"{name}-{rate}", "type": name, "rate": float(rate), "set": changes}
                    yield {"kind": "prime", **about, "replaced": replaced, "seed": seed}
        for rate in rates if "recall" in parts else ():
            for name in (*TYPES, *WIDE):
                yield {"kind": "recall", "type": name, "rate": rate, "seed": seed}
        for num_iter in options.iterations.split(",") if "iterations" in parts else ():
            yield {"kind": "recall", "type": "gka", "rate": rates[0], "seed": seed, "num_iter": int(num_iter)}


def key(job: dict[str, Any]) -> str:
    if job["kind"] in ("prime", "teacher"):
        return selection.key(job)
    return "-".join(f"{name}{value}" if name != "kind" else value for name, value in job.items())


def lines_of(options: Any, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results of one run: one line."""
    if job["kind"] in ("prime", "teacher"):
        work = selection.lines_of(options, job)
    else:
        work = recall(options, job)
    cpu = time.process_time()
    for line in work:
        yield line | {"core_seconds": round(time.process_time() - cpu, 1)}


def recall(options: Any, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    import torch
    from recall import TYPES as SHAPES
    from recall import accuracy, attention, converted, over_iterations, sizes, train
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    started, seed, kind = time.perf_counter(), job["seed"], SHAPES.get(job.get("type", ""))
    heads = job["heads"] if kind is None else kind.heads
    base = attention(options.work, heads, 32 // heads, options.attention_steps, ATTENTION_RATE, seed)
    if kind is None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        result = {"accuracy": accuracy(model.eval(), seed), "parameters": model.num_parameters()}
    else:
        model = converted(base, kind, seed, job.get("num_iter"))
        result = {"steps": options.recall_steps, **sizes(model, kind.symbol), "start": accuracy(model.eval(), seed)}
        train(model, options.recall_steps, job["rate"], seed)
        result["accuracy"] = accuracy(model, seed)
        if kind.symbol == "GKA":
            result["over_iterations"] = over_iterations(model, base, kind, seed)
    seconds = round(time.perf_counter() - started, 1)
    yield {"key": key(job), **job, **result, "seconds": seconds, "finished": True}


if __name__ == "__main__":
    main()
