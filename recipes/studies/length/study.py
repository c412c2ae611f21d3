# SPDX-License-Identifier: Apache-2.0
"""Train a teacher for long contexts, prime it, extend the Hybrid, and find needles by depth and length. See README.md.

Every stage is a process: a command of `hmf`, or this program with --stage. Stages start when what they need is there.
Results are lines of OUT/results.jsonl, written as they come; a study that was stopped goes on with what is missing.
`report.py` makes the table and the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from common import append, read_lines

HERE = Path(__file__).resolve().parent
HYBRIDS = ("short", "short-extended", "long", "long-extended")
MODELS = ("embedded", "stretched", "teacher", *HYBRIDS)
UNTRAINED = ("embedded", "stretched")
MAX_NEW_TOKENS = 64  # a right answer has about 25


@dataclass(frozen=True)
class Stage:
    """needs: stages that come before it. settings: of the recipe `name`.yaml; None: this program is the stage."""

    name: str
    needs: tuple[str, ...] = ()
    command: str | None = None
    recipe: str = ""
    settings: tuple[str, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl, and of models in work/")
    parser.add_argument("--jobs", type=int, default=3, help="stages at a time; all share one GPU")
    parser.add_argument("--workers", type=int, default=4, help="processes that make the teacher's rows; others: half")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of every training")
    parser.add_argument("--short", type=int, default=1024, help="tokens in a row of short.yaml")
    parser.add_argument("--long", type=int, default=4096, help="tokens in a row of the other recipes")
    parser.add_argument("--lengths", default="1024,2048,4096,8192", help="of the prompts")
    parser.add_argument("--depths", type=int, default=8, help="places of the needle, from start to end")
    parser.add_argument("--prompts", type=int, default=25, help="for each depth and length; twice as many for recall")
    parser.add_argument("--windows", type=int, default=16, help="texts for the perplexity, of the longest length")
    parser.add_argument("--models", default=",".join(MODELS), help="which are made and scored")
    parser.add_argument("--minutes", type=float, help="stop after this long; the same command goes on")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.lengths = [int(length) for length in options.lengths.split(",")]
    options.work, options.results = options.out / "work", options.out / "results.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    # Kernels that are compiled and tuned in every process would take longer than these runs.
    os.environ.setdefault("HMF_OPS", "chunked")
    if options.stage == "prompts":
        write_prompts(options)
    elif options.stage:
        score(options, options.stage.removeprefix("score-"))
    else:
        sys.exit(not run_all(options, stages(options)))


# ---- stages


def stages(options: Any) -> list[Stage]:
    """All stages, those first that others wait for."""
    found = [Stage("prompts"), trained(options, "teacher", "pretrain", "teacher", (), options.workers)]
    for name in ("short", "long"):
        made = trained(options, name, "prime", name, ("teacher",), max(1, options.workers // 2))
        found += [made, extended(options, name)]
    wanted, chosen = options.models.split(","), set[str]()
    for name in wanted:  # with the models that they are made from
        chosen |= {name, name.removesuffix("-extended"), "teacher"} if name not in UNTRAINED else set()
    found = [stage for stage in found if stage.name in {"prompts", *chosen}]
    for name in wanted:
        found.append(Stage(f"score-{name}", ("prompts",) if name in UNTRAINED else ("prompts", name)))
    return found


def extended(options: Any, name: str) -> Stage:
    model = f"model={options.work / name / 'model'}"
    workers = max(1, options.workers // 2)
    return trained(options, f"{name}-extended", "finetune", "extend", (name,), workers, model)


def trained(
    options: Any, name: str, command: str, recipe: str, needs: tuple[str, ...], workers: int, *settings: str
) -> Stage:
    """A command of `hmf` with `recipe`.yaml, its steps, rows, workers and folders changed by the options."""
    import yaml

    content = yaml.safe_load((HERE / f"{recipe}.yaml").read_text())
    section = "distill." if command == "prime" else ""
    training = content["distill"]["training"] if section else content["training"]
    counts = {f"training.{key}": training[key] for key in ("max_steps", "warmup_steps")}
    if section:
        counts["objective.layerwise_steps"] = content["distill"]["objective"]["layerwise_steps"]
        settings += (f"base={options.work / 'teacher'}",)
    if command == "pretrain":
        settings += (f"start_from={HERE.parents[2] / 'src/hmf/assets/teacher'}",)
    settings += tuple(f"{section}{key}={max(1, round(options.share * count))}" for key, count in counts.items())
    settings += (
        f"output={options.work / name}",
        f"{section}data.sequence_length={options.short if recipe == 'short' else options.long}",
        f"{section}training.workers={workers}",
    )
    return Stage(name, needs, command, recipe, settings)


def run_all(options: Any, plan: Sequence[Stage]) -> bool:
    """Run the stages that are not finished, up to `options.jobs` at a time. Returns whether all have been run."""
    deadline = float("inf") if options.minutes is None else time.time() + 60 * options.minutes
    done = {line["stage"] for line in read_lines(options.results) if line["kind"] == "stage"}
    left = [stage for stage in plan if stage.name not in done]
    failed, running = set[str](), dict[str, tuple[subprocess.Popen, float, Stage]]()
    print(f"{len(left)} of {len(plan)} stages to do, {options.jobs} at a time", flush=True)
    while (left or running) and time.time() < deadline:
        for stage in [stage for stage in left if set(stage.needs) <= done][: options.jobs - len(running)]:
            left.remove(stage)
            running[stage.name] = start(options, stage), time.time(), stage
            print(f"{stage.name}: started", flush=True)
        if not running:
            break  # what is left needs a stage that failed
        time.sleep(0.2)
        for name, (process, started, stage) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            seconds = round(time.time() - started, 1)
            if process.returncode:
                failed.add(name)
                print(f"{name}: failed after {seconds} s; see {options.work / name}.log", flush=True)
                continue
            done.add(name)
            append(options.results, [{"kind": "stage", "stage": name, "seconds": seconds, **about(options, stage)}])
            print(f"{name}: done in {seconds} s", flush=True)
    for name, (process, _, _) in running.items():
        process.send_signal(signal.SIGINT)
        print(f"{name}: stopped; the same command goes on", flush=True)
    for process, _, _ in running.values():
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    return not (left or running or failed)


def start(options: Any, stage: Stage) -> subprocess.Popen:
    if stage.command is None:
        command = [str(HERE / "study.py"), *sys.argv[1:], "--stage", stage.name]
    else:
        command = ["-m", "hmf.cli", stage.command, str(written(options, stage))]
    with (options.work / f"{stage.name}.log").open("a") as log:
        return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)


def written(options: Any, stage: Stage) -> Path:
    """The recipe with the stage's settings, beside the stage's folder."""
    from hmf.config.recipes import read_recipe
    from hmf.config.runs import FinetuneRecipe, PrimeRecipe
    from hmf.training.pretrain import PretrainRecipe

    kinds: dict[str | None, Any] = {"pretrain": PretrainRecipe, "prime": PrimeRecipe, "finetune": FinetuneRecipe}
    file = options.work / f"{stage.name}.yaml"
    file.write_text(read_recipe(HERE / f"{stage.recipe}.yaml", kinds[stage.command], stage.settings)[1])
    return file


def about(options: Any, stage: Stage) -> dict[str, Any]:
    """Tokens that a stage's training read, and versions."""
    import torch

    from hmf.evaluation.results import versions

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"device": device, "versions": versions()}
    if stage.command is not None:
        values = dict(setting.removeprefix("distill.").split("=", 1) for setting in stage.settings)
        import yaml

        content = yaml.safe_load((HERE / f"{stage.recipe}.yaml").read_text())
        rows = content.get("distill", content)["training"]["per_device_train_batch_size"]
        found["tokens"] = int(values["training.max_steps"]) * rows * int(values["data.sequence_length"])
    return found


# ---- scores


def write_prompts(options: Any) -> None:
    """The prompts of all models, which have one tokenizer: a line for each, with task, length, depth and answer."""
    from dataclasses import asdict

    from hmf.data.tasks import sample
    from hmf.data.tokenizer import load_tokenizer
    from hmf.folders import resolve_base

    tokenizer = load_tokenizer(resolve_base("teacher"))
    part = options.work / "prompts.part"
    with part.open("w") as file:
        for length in options.lengths:
            for depth in depths(options):
                for index in range(options.prompts):
                    made = needle(Random(f"{length}:{depth}:{index}"), tokenizer, length, depth)
                    file.write(json.dumps({"length": length, "depth": depth, **asdict(made)}) + "\n")
            for index in range(2 * options.prompts):
                made = sample("recall", index, tokenizer, length, split="heldout")
                file.write(json.dumps({"length": length, "depth": None, **asdict(made)}) + "\n")
    part.rename(options.work / "prompts.jsonl")


def depths(options: Any) -> list[float]:
    return [round(place / max(1, options.depths - 1), 4) for place in range(options.depths)]


def needle(rng: Random, tokenizer: Any, length: int, depth: float) -> Any:
    """The task `needle` with the fact at a depth: 0 is before the first line of library source, 1 after the last.

    A second fact of the same kind, about another name, is anywhere. The conversation has at most `length` tokens.
    """
    from hmf.data import phrases
    from hmf.data.tasks import Sample, fitting, library_lines

    statement, question = rng.choice(phrases.NEEDLE)
    names, values = [phrases.word(rng).capitalize() for _ in range(2)], [phrases.value(rng) for _ in range(2)]
    fact, other = (statement.format(name=name, value=value) for name, value in zip(names, values, strict=True))
    lines = library_lines(rng, "heldout", characters=4 * length)
    lines = lines[: max(1, fitting(tokenizer, lines, length - 120))]  # facts, question, thinking, answer
    lines.insert(rng.randrange(len(lines) + 1), other)
    lines.insert(round(depth * len(lines)), fact)
    user = "\n".join(lines) + "\n\n" + question.format(name=names[0])
    reply = {"role": "assistant", "content": values[0], "reasoning_content": fact}
    return Sample("needle", [{"role": "user", "content": user}, reply], values[0], thinking=True)


def score(options: Any, name: str) -> None:
    """Answer the prompts and score texts with one model, shortest first; cells that have results are left out."""
    from hmf.data.tokenizer import load_tokenizer
    from hmf.evaluation.local import Local, Sampling
    from hmf.evaluation.positions import nats_by_range, window
    from hmf.evaluation.run import load_for_evaluation
    from hmf.folders import resolve_base

    path = stretched(options) if name == "stretched" else options.work / name
    path = resolve_base("teacher") if name == "embedded" else path / "model" if name in HYBRIDS else path
    tokenizer, model = load_tokenizer(path), load_for_evaluation(path, None, None).eval()
    done = [line for line in read_lines(options.results) if line["kind"] != "stage" and line["model"] == name]
    cells = {(line["kind"], line["length"], line["depth"]) for line in done}
    prompts = [json.loads(line) for line in (options.work / "prompts.jsonl").read_text().splitlines()]
    for length in options.lengths:
        chosen = [x for x in prompts if x["length"] == length and (x["task"], length, x["depth"]) not in cells]
        if chosen:
            append(options.results, list(answered(model, tokenizer, name, length, chosen)))
    longest = max(options.lengths)
    if ("text", longest, None) not in cells:
        engine, started = Local(model, tokenizer, Sampling(), 1), time.perf_counter()
        texts = [nats_by_range(engine, window(tokenizer, 0, index, longest)) for index in range(options.windows)]
        line = {"kind": "text", "model": name, "length": longest, "depth": None, "texts": texts}
        append(options.results, [{**line, "seconds": round(time.perf_counter() - started, 1)}])


def stretched(options: Any) -> Path:
    """The embedded teacher with the positions of teacher.yaml, not trained."""
    from transformers import AutoConfig

    from hmf.config.recipes import load_recipe
    from hmf.folders import resolve_base
    from hmf.model.rope import with_rope
    from hmf.training.pretrain import PretrainRecipe

    source, folder = resolve_base("teacher"), options.work / "stretched"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    rope = load_recipe(HERE / "teacher.yaml", PretrainRecipe).rope
    with_rope(AutoConfig.from_pretrained(source), rope).save_pretrained(folder)
    return folder


def answered(model: Any, tokenizer: Any, name: str, length: int, prompts: list[dict[str, Any]]) -> Iterator[dict]:
    """The results of all cells of one length: a line for each."""
    from hmf.data.tasks import Sample
    from hmf.evaluation.generation import generate_answers

    started = time.perf_counter()
    samples = [Sample(**{key: x for key, x in one.items() if key not in ("length", "depth")}) for one in prompts]
    batch = max(1, (16_384 if model.device.type == "cpu" else 262_144) // length)
    answers = generate_answers(model, tokenizer, samples, batch, MAX_NEW_TOKENS, f"{name}: {length}")
    seconds = round(time.perf_counter() - started, 1)
    for task, depth in dict.fromkeys((one["task"], one["depth"]) for one in prompts):
        places = [i for i, one in enumerate(prompts) if (one["task"], one["depth"]) == (task, depth)]
        yield {
            "kind": task,
            "model": name,
            "length": length,
            "depth": depth,
            "n": len(places),
            "correct": [int(samples[i].is_correct(answers[i].text)) for i in places],
            "cut_off": sum(not answers[i].ended for i in places),
            "seconds": seconds,  # of all cells of this length
        }


if __name__ == "__main__":
    main()
