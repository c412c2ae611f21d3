# SPDX-License-Identifier: Apache-2.0
"""`hmf evaluate --suite`: evaluates models in turn on the same prompts, and stores the results in a run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hmf.config.strict import parse_sealed, parse_yaml, seal_json
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, require_names, unknown_name
from hmf.evaluation.chunks import Composition
from hmf.evaluation.harness import require_name
from hmf.evaluation.local import Local, Sampling
from hmf.evaluation.paired import Pair, compare_all
from hmf.evaluation.parity import parity
from hmf.evaluation.prompts import Prompter
from hmf.evaluation.results import SERVED, SMALL, describe, versions
from hmf.evaluation.retention import TASKS
from hmf.evaluation.run import load_for_evaluation
from hmf.evaluation.server import Endpoint, Server
from hmf.evaluation.suite import SUITES, Plan, Store, run
from hmf.folders import RECIPE, require_writable
from hmf.model.checkpoint import load_config
from hmf.training.checkpoints import replace_text

ALLOWANCE = 1024  # default of --max-new-tokens: tokens of an answer in addition to those of the expected answer
LENGTH = 4096
PARITY_TASKS, PARITY_PROMPTS = ("needle_single", "instructions"), 4


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    suite: str = "retention"
    tasks: str | None = None
    lengths: tuple[int, ...] = ()  # empty: 4096, or the model's context if that is shorter
    samples: int = 50
    seed: int = 0
    thinking: bool = True
    max_new_tokens: int = ALLOWANCE
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 16
    likelihood: bool = True
    device: str | None = None
    dtype: str | None = None
    url: str | None = None
    endpoint: Endpoint = "completions"
    concurrency: int = 16
    parity: float | None = None  # the bound; None: parity is not measured
    out: Path | None = None
    name: str | None = None
    restart: bool = False

    def plan(self) -> Plan:
        """The tasks to run. Raises HmfError for an unknown suite or task."""
        if self.suite not in SUITES:
            raise HmfError(f"--suite: {unknown_name('suite', self.suite, SUITES)}")
        known = SUITES[self.suite]
        chosen = known if self.tasks is None else tuple(task for task in self.tasks.split(",") if task)
        require_names("--tasks", "task", chosen, known)
        return Plan(self.suite, chosen, tuple(dict.fromkeys(self.lengths)), self.samples, self.seed)


def evaluate(models: Mapping[str, Path], options: Options) -> dict[str, Store]:
    """Evaluate the models; returns their stores by the models' names. Where possible, HmfError is raised before
    anything is loaded."""
    plan = options.plan()
    if options.url and len(models) > 1:
        raise HmfError("--url: takes one model; evaluate the others with their own commands, into the same --out")
    if options.parity is not None and not options.url:
        raise HmfError("--parity: compares a model with a server; give its --url")
    folder, names = _places(models, options)
    stores = {}
    for model, path in models.items():
        try:
            stores[model] = _one(path, names[model], folder, plan, options)
        except KeyboardInterrupt:
            kept = (
                "the same command continues with the remaining prompts" if folder else "nothing is kept without --out"
            )
            raise KeyboardInterrupt(f"at {names[model]}; {kept}") from None
    return stores


def pairs(stores: Mapping[str, Store]) -> dict[str, dict[str, Pair | None]]:
    """The comparison of the first model with each other model, by task."""
    first, *others = stores
    return {other: compare_all(stores[first].answered, stores[other].answered) for other in others}


def task_files(
    models: Mapping[str, Path], out: Path | None, name: str | None, compose: Composition | None = None
) -> dict[str, Path]:
    """The file of each model's scores on the small tasks, in `out` or in the run folder that contains a model.

    Empty if there is no such folder. Raises HmfError if a file has the scores of another suite.
    """
    suite = small_suite(compose)
    folder, names = _places(models, Options(suite=suite, out=out, name=name))
    if folder is None:
        return {}
    files = {model: folder / f"scores.{names[model]}.json" for model in models}
    for file in files.values():
        if file.is_file() and (before := _suite_of(file)) != suite:
            what = f"scores of {before}" if before else "other content"
            raise HmfError(f"{file}: has {what}, not scores of {suite}; give another --name, or remove the file")
    return files


def _suite_of(file: Path) -> str | None:
    """The suite of a file of scores; None if it names none or is no such file."""
    with suppress(OSError, ValueError):
        return parse_sealed(file.read_text(encoding="utf-8")).get("suite")
    return None


def save_tasks(
    scores: Mapping[str, Mapping[str, Any]], files: Mapping[str, Path], compose: Composition | None = None
) -> None:
    """Write the scores of each model to its file."""
    for model, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, seal_json({"suite": small_suite(compose), **scores[model]}))


def small_suite(compose: Composition | None) -> str:
    """The suite of the small tasks; each composition is one of its own, so that it has its own files."""
    return SMALL if compose is None else f"{SMALL}-{compose.keys}-{compose.states}-{compose.chunk}"


def _places(models: Mapping[str, Path], options: Options) -> tuple[Path | None, dict[str, str]]:
    """The folder for the results, and NAME of each model's file. Raises HmfError if two models have the same NAME."""
    if options.name and len(models) > 1:
        raise HmfError("--name: takes one model; omit it, or evaluate the models one by one")
    if options.name:
        require_name("--name", options.name)
    folder = options.out or next((run for model in models.values() if (run := run_of(model))), None)
    if folder is not None:
        require_writable(folder, "--out")
    names = {model: options.name or name_of(model, path, folder, options) for model, path in models.items()}
    if len(set(names.values())) < len(names):
        raise HmfError(
            f"--out: two models would be named {next(iter(names.values()))}; evaluate them one by one, with --name"
        )
    return folder, names


def run_of(model: Path) -> Path | None:
    """The run folder that contains a model, or None."""
    model = model.absolute()
    inside = model.name in ("model", "stage0", "stage1") and (model.parent / RECIPE).is_file()
    run, here = model.parent, Path.cwd()
    return (run.relative_to(here) if run.is_relative_to(here) else run) if inside else None


def name_of(model: str, path: Path, run: Path | None, options: Options) -> str:
    """NAME of scores.NAME.json: the model's role in the run folder, "-server" if a server answered, and the suite."""
    who = path.name if Path(model).exists() else re.sub(r"[^\w.-]+", "--", model)
    recipe: Any = {}
    if run is not None and (run / RECIPE).is_file():
        with suppress(OSError, ValueError):
            recipe = parse_yaml((run / RECIPE).read_text(encoding="utf-8"))
    if isinstance(recipe, dict) and run is not None:
        base = recipe.get("base")
        if base is not None and (model == base or path.resolve() == Path(str(base)).resolve()):
            who = "teacher"
        elif path.resolve() == (run / "model").resolve():
            who = "primed" if base is not None else "model"
    if who == "model" and not recipe:
        who = path.resolve().parent.name
    return f"{who}{SERVED if options.url else ''}-{options.suite}"


def _one(path: Path, name: str, folder: Path | None, plan: Plan, options: Options) -> Store:
    tokenizer = load_tokenizer(path)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    server = None
    if options.url:
        server = Server(options.url, path, options.endpoint, sampling, options.concurrency)
    prompter = _prompter(path, tokenizer, server, options)
    plan = replace(plan, lengths=plan.lengths or (min(LENGTH, prompter.context),))
    if options.parity is not None or any(task not in TASKS or TASKS[task].long for task in plan.tasks):
        prompter.require(list(plan.lengths))
    if options.endpoint == "chat" and not tokenizer.chat_template:
        raise HmfError(f"--endpoint chat: {path} has no chat template; give --endpoint completions")
    local = None
    if server is None or options.parity is not None:
        model = load_for_evaluation(path, options.device, options.dtype).eval()
        local = Local(model, tokenizer, sampling, options.batch_size, options.likelihood)
    store = Store(folder, name, _about(path, plan, options, local, server))
    with store.open(options.restart):
        run(plan, prompter, server or local, store)  # type: ignore[arg-type]  # one of them is not None
        if server is not None and local is not None and options.parity is not None:
            asked = [
                (TASKS[task], length if TASKS[task].long else None) for task in PARITY_TASKS for length in plan.lengths
            ]
            prompts = [
                one for task, length in dict.fromkeys(asked) for one in prompter.prompts(task, length, PARITY_PROMPTS)
            ]
            store.save(parity=parity(local, server, prompts, options.parity))
    return store


def _prompter(path: Path, tokenizer: PreTrainedTokenizerBase, server: Server | None, options: Options) -> Prompter:
    config = load_config(path)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    context, of = getattr(config, "max_position_embeddings", None), f"{path} has (max_position_embeddings)"
    if server is not None and server.context is not None and (context is None or server.context < context):
        context, of = server.context, f"the server at {server.url} takes"
    if context is None:
        context, of = 1 << 40, f"{path} has"  # no positions at all: any length
    return Prompter(tokenizer, options.seed, options.thinking, options.max_new_tokens, context, of)


def _about(path: Path, plan: Plan, options: Options, local: Local | None, server: Server | None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "seed": options.seed,
        "sampling": {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_new_tokens": options.max_new_tokens,
        },
        "thinking": options.thinking,
        "batch": options.batch_size,
        "likelihood": options.likelihood and server is None,
        "dtype": None,
        "device": None,
        "url": options.url,
    }
    package_versions = versions()
    if server is not None:
        settings |= {"endpoint": options.endpoint, "concurrency": options.concurrency, "served": server.name}
        if vllm := server.version():
            package_versions["vllm"] = vllm
    elif local is not None:
        settings |= {"dtype": str(local.model.dtype).removeprefix("torch."), "device": local.model.device.type}
    return {"suite": plan.suite, "settings": settings, "versions": package_versions, "model": describe(path)}
