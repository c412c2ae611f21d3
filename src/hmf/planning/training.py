# SPDX-License-Identifier: Apache-2.0
"""Plans of the training recipes in files and folders, and their output. plan.py computes a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hmf.config.data import DataRecipe
from hmf.config.pattern import require_fused
from hmf.config.recipes import load_recipe
from hmf.config.runs import DataSettings, DistillRecipe, DistillSettings, FinetuneRecipe, PrimeRecipe
from hmf.config.strict import Settings, parse_yaml
from hmf.data.mixture import row_length
from hmf.data.prepared import read_index
from hmf.errors import HmfError, notice
from hmf.gpus import MFU, parse_gpus
from hmf.layers.base import Mixer
from hmf.model.checkpoint import load_config
from hmf.model.convert import base_pattern, hybrid_config
from hmf.model.files import opened, weight_files
from hmf.model.rope import with_rope
from hmf.model.text_only import language_config
from hmf.priming.objectives import check_objective, train_only_mixers
from hmf.training.distill import check_positions
from hmf.training.evaluation import held_out_from
from hmf.training.finetune import check_model
from hmf.training.groups import adapter_targets, choose
from hmf.training.run import frozen_matrices

from .plan import USABLE, Job, TrainingPlan, without_memory
from .serving import size_of


def find_recipes(places: Iterable[Path]) -> list[Path]:
    """The recipe files among `places`; those of a folder are sorted by name."""
    paths = []
    for place in places:
        if place.is_dir():
            files = sorted(place.glob("*.yaml"))
            if not files:
                raise HmfError(f"{place}: has no recipes (*.yaml); give a recipe or a folder of recipes")
            paths += files
        else:
            paths.append(place)
    return paths


def read_any(path: Path, overrides: Sequence[str] = ()) -> Settings | None:
    """A recipe of any kind, recognised by its keys; None for one of `hmf pretrain`."""
    content: Any = {}
    if path.is_file():
        with suppress(ValueError, OSError):  # load_recipe reports the error with its line
            content = parse_yaml(path.read_text(encoding="utf-8"))
    keys: set[str] = set(content) if isinstance(content, dict) else set()
    if "start_from" in keys or {"tokenizer", "model"} <= keys:
        return None
    kinds: dict[str, type[Settings]] = {"sources": DataRecipe, "method": FinetuneRecipe, "hybrid": PrimeRecipe}
    kind: type[Settings] = next((kind for key, kind in kinds.items() if key in keys), DistillRecipe)
    return load_recipe(path, kind, overrides)


class Recipes:
    """The recipes to plan, and other recipes in and beside their folders.

    A planned recipe may use the output of another recipe before this output exists.

    Args:
        resolve_base: returns the directory of a base checkpoint for its name in a recipe.
    """

    def __init__(self, paths: Iterable[Path], resolve_base: Callable[[str], Path], overrides: Sequence[str] = ()):
        self.resolve_base = resolve_base
        self.read = {path: read_any(path, overrides) for path in paths}

    def all(self) -> Iterator[tuple[Path, Settings | None]]:
        """The recipes to plan, then the other recipes, which are read lazily."""
        yield from list(self.read.items())
        for folder in dict.fromkeys(path.parent for path in self.read):
            for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.parent.glob("*/*.yaml"))]:
                if path not in self.read:
                    with suppress(HmfError):  # errors in other recipes do not matter
                        self.read[path] = read_any(path)
                        yield path, self.read[path]

    def plan(self, path: Path, gpus: str | None = None, mfu: float = MFU) -> TrainingPlan | None:
        """The plan of one of the recipes; None if it does not train a Hybrid."""
        if not 0 < mfu <= 1:
            raise HmfError(f"--mfu: {mfu} is not in (0, 1]; give a share such as {MFU}")
        if (job := self.job(path)) is None:
            return None
        if (named := gpus or job.training.gpus) is None:
            raise HmfError(f"{path}: {job.section}.gpus: is not set; set it, or give --gpu, for example h200x8")
        device, ranks = parse_gpus(named)
        if ranks % (degree := job.training.sequence_parallel):
            raise HmfError(
                f"{path}: {job.section}.sequence_parallel: {degree} does not divide {ranks} GPUs; choose a divisor"
            )
        if job.training.strategy == "fsdp2" and ranks < 2:
            raise HmfError(f"{path}: {job.section}.strategy: fsdp2 needs several GPUs; choose ddp, or more GPUs")
        plan = TrainingPlan(job, device, ranks, job.training, mfu)
        if job.training.num_train_epochs is None:
            return plan
        try:
            return replace(plan, training=job.training.with_steps(self._epoch_rows(job.recipe), plan.rows_per_step))
        except HmfError as error:
            raise HmfError(f"{path}: {error}") from None

    def job(self, path: Path) -> Job | None:
        """The training of a recipe; None for a recipe without training, such as one of `hmf data prepare`."""
        recipe = self.read[path]
        try:
            if isinstance(recipe, PrimeRecipe):
                job = self._stage1(
                    path.stem, recipe.distill, self._prime_config(path, recipe), recipe.output / "stage0"
                )
                return replace(job, section="distill.training")
            if isinstance(recipe, DistillRecipe):
                return self._stage1(path.stem, recipe, self._config(recipe.model), recipe.model)
            if isinstance(recipe, FinetuneRecipe):
                return self._stage2(path.stem, recipe)
        except HmfError as error:
            raise HmfError(f"{path}: {error}") from None
        return None

    def _stage1(self, title: str, recipe: DistillSettings, config: Any, source: Path) -> Job:
        require_fused(config, "model")
        model = without_memory(config)
        train_only_mixers(model)
        length = self._row(recipe.data)
        check_positions(config, length)
        check_objective(recipe.objective, config.vocab_size)
        return Job(title, recipe, model, self._narrow(source, model, config.dtype), length)

    def _stage2(self, title: str, recipe: FinetuneRecipe) -> Job:
        config = self._config(recipe.model)
        length = self._row(recipe.data) if recipe.data is not None else recipe.pairs.sequence_length  # type: ignore[union-attr]
        check_model(recipe, config, length)
        model = without_memory(with_rope(config, recipe.rope))
        groups = choose(model, recipe.trainable, recipe.lora)
        adapters = 0
        if recipe.lora is not None:
            layers = [model.get_submodule(name) for name in adapter_targets(model, groups, recipe.lora)]
            adapters = sum(recipe.lora.rank * (x.in_features + x.out_features) for x in layers)
        return Job(title, recipe, model, self._narrow(recipe.model, model, config.dtype), length, adapters)

    def _narrow(self, source: Path, model: PreTrainedModel, dtype: torch.dtype | None) -> frozenset[nn.Parameter]:
        """The frozen matrices of `model` that are exact in bfloat16: by the first values in the files of the checkpoint
        `source`, or by the `dtype` of its config if there are no files yet."""
        names = {x: name for name, x in model.named_parameters()}
        if any(source.glob("*.safetensors")):
            exact = _exact(source, {names[x] for x in frozen_matrices(model)})
        else:
            wide = self._has_wide_mixers(source)
            of_mixers = {x for module in model.modules() if isinstance(module, Mixer) for x in module.parameters()}
            exact = {name: not (wide and x in of_mixers) for x, name in names.items() if dtype == torch.bfloat16}
        return frozenset(x for x in frozen_matrices(model) if exact.get(names[x], False))

    def _has_wide_mixers(self, model: Path) -> bool:
        """Whether the recipe that creates the checkpoint `model` stores trained mixers in float32, as Stage 1 does."""
        for _, recipe in self.all():
            if isinstance(recipe, PrimeRecipe) and model in (recipe.output / "model", recipe.output / "stage1"):
                return True
            if isinstance(recipe, FinetuneRecipe) and model == recipe.output / "model":
                return recipe.dtype == "float32" or (recipe.dtype is None and self._has_wide_mixers(recipe.model))
        return False

    def _row(self, data: DataSettings) -> int:
        """Tokens of a row. If the rows are not prepared yet, the value comes from the recipe that prepares them."""
        if data.prepared is None or data.prepared.is_dir():
            return row_length(data)
        for _, recipe in self.all():
            if isinstance(recipe, DataRecipe) and recipe.output == data.prepared:
                return recipe.sequence_length
        raise HmfError(
            f"data.prepared: {data.prepared} does not exist, and no recipe in or beside this folder creates it; "
            "correct the path, or prepare the rows"
        )

    def _epoch_rows(self, recipe: DistillSettings | FinetuneRecipe) -> int:
        """Rows of an epoch, from the prepared data set or from the recipe that prepares it."""
        prepared, rows = recipe.data.prepared if recipe.data is not None else None, None
        if prepared is not None and prepared.is_dir():
            rows = read_index(prepared)["rows"]
        elif prepared is not None:
            for _, other in self.all():
                if isinstance(other, DataRecipe) and other.output == prepared and other.tokens is not None:
                    rows = math.ceil(other.tokens / other.sequence_length)
        if rows is None:
            data = "pairs" if prepared is None else f"{prepared}, which does not exist yet,"
            raise HmfError(
                f"training.num_train_epochs: the number of rows of {data} is unknown before packing; plan with --set "
                f"{'distill.' if type(recipe) is DistillSettings else ''}training.max_steps=N"
            )
        if recipe.training.eval_strategy != "no" and recipe.eval_data is None:
            rows = held_out_from(rows, recipe.training)
        return rows

    def _config(self, model: Path) -> Any:
        """A checkpoint's config. If the checkpoint does not exist yet, it comes from the recipe that creates it."""
        if model.is_dir():
            return load_config(model, weights=False)
        for path, recipe in self.all():
            if isinstance(recipe, PrimeRecipe) and model == recipe.output / "model":
                config = self._prime_config(path, recipe)
                return hybrid_config(config, config.pattern.with_fused(False))
            if isinstance(recipe, PrimeRecipe) and model in (recipe.output / "stage0", recipe.output / "stage1"):
                return self._prime_config(path, recipe)
            if isinstance(recipe, FinetuneRecipe) and model == recipe.output / "model":
                return with_rope(self._config(recipe.model), recipe.rope)
        try:
            return load_config(self.resolve_base(str(model)), weights=False)
        except HmfError as error:
            raise HmfError(f"model: {error}; and no recipe in or beside this folder creates it") from None

    def _prime_config(self, path: Path, recipe: PrimeRecipe) -> Any:
        planned = recipe.base_config is not None and not Path(recipe.base).is_dir()
        base = path.parent / str(recipe.base_config) if planned else self.resolve_base(recipe.base)
        config = load_config(base, weights=False)
        if recipe.text_only:
            config = language_config(config, base)
        if recipe.hybrid.layers == "auto":
            notice(
                f"{path}: hybrid.layers: auto is planned as if the layers were spread evenly; `hmf prime` chooses them"
            )
        pattern = base_pattern(config, recipe.hybrid.spread_evenly())
        return hybrid_config(config, pattern.with_fused(True), recipe.hybrid.options_by_key())


def plans(
    places: Iterable[Path],
    resolve_base: Callable[[str], Path],
    gpus: str | None = None,
    mfu: float = MFU,
    overrides: Sequence[str] = (),
) -> list[TrainingPlan]:
    """A plan for each training recipe in files and folders. `gpus`, such as "h200x8", overrides the recipes' GPUs.

    Raises:
        HmfError: a recipe is invalid, or has no GPUs; no recipe trains a Hybrid.
    """
    paths = find_recipes(places)
    recipes = Recipes(paths, resolve_base, overrides)
    made = [plan for path in paths if (plan := recipes.plan(path, gpus, mfu)) is not None]
    if not made:
        raise HmfError(f"{', '.join(map(str, paths))}: no recipe here trains a Hybrid; give one that does")
    return made


def figures(plan: TrainingPlan) -> dict[str, Any]:
    """The output of `hmf plan-training --json` for one plan. Bytes are those of one GPU."""
    job, training, hours = plan.job, plan.training, plan.gpu_hours
    return {
        "recipe": job.title,
        "method": "stage 1" if job.distils else job.recipe.method,  # type: ignore[union-attr]
        "parameters": sum(x.numel() for x in job.model.parameters()) + job.adapters,
        "trained": plan.trained,
        "gpus": f"{plan.ranks} x {plan.device.name}" if plan.ranks > 1 else plan.device.name,
        "strategy": training.strategy,
        "sequence_parallel": training.sequence_parallel,
        "tokens_per_row": job.sequence_length,
        "tokens_per_step": plan.tokens_per_step,
        "steps": training.steps,
        "tokens": plan.tokens,
        "memory_bytes": plan.memory,
        "sum_bytes": sum(plan.memory.values()),
        "usable_bytes": USABLE * plan.device.memory,
        "fits": plan.fits,
        "advice": None if plan.fits else plan.advice(),
        "mfu": plan.mfu,
        "gpu_hours": hours,  # None: not known
        "days": None if hours is None else hours / plan.ranks / 24,
    }


def rows(plan: TrainingPlan) -> dict[str, str]:
    """The column that `hmf plan-training` prints for one plan, by row name."""
    numbers = figures(plan)
    hours = numbers["gpu_hours"]
    return {
        "method": numbers["method"],
        "parameters": billions(numbers["parameters"]),
        "trained": billions(numbers["trained"]),
        "GPUs": numbers["gpus"],
        "strategy": f"{numbers['strategy']}, sequence / {numbers['sequence_parallel']}",
        "tokens of a row": f"{numbers['tokens_per_row']:,}",
        "tokens of a step": f"{numbers['tokens_per_step']:,}",
        "steps": f"{numbers['steps']:,}",
        "tokens": billions(numbers["tokens"]),
        **{name: size_of(size) for name, size in numbers["memory_bytes"].items()},
        "sum, of each GPU": size_of(numbers["sum_bytes"]),
        "usable": size_of(numbers["usable_bytes"]),
        "fits": "yes" if numbers["fits"] else "NO",
        "GPU-hours": "unknown" if hours is None else f"{hours:,.0f}" if hours >= 10 else f"{hours:,.2f}",
        "days": "unknown" if hours is None else f"{numbers['days']:,.2f}",
    }


def billions(number: float) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"


def _exact(checkpoint: Path, names: set[str]) -> dict[str, bool]:
    """Whether the first values of those of the tensors `names` that are in the files are exact in bfloat16."""
    exact = {}
    for file in weight_files(checkpoint):
        with opened(checkpoint / file) as weights:
            for name in names.intersection(weights.keys()):
                values = weights.get_slice(name)[:8].double()
                exact[name] = values.bfloat16().double().equal(values)
    return exact


def print_plans(plans: Sequence[TrainingPlan]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Planned, not measured",
        title_justify="left",
        caption_justify="left",
        caption=f"GPU-hours assume a model FLOPs utilisation (MFU) of {plans[0].mfu:.0%}. Weights, "
        "gradients and moments are counted exactly. They are float32, except that frozen matrices that are exact in "
        "bfloat16 are bfloat16 with precision bfloat16. The rest of the memory is estimated.",
    )
    table.add_column("")
    for plan in plans:
        table.add_column(plan.job.title, justify="right")
    columns = [rows(plan) for plan in plans]
    for name in columns[0]:
        table.add_row(name, *(row[name] for row in columns))
    console = Console(width=max(80 + 16 * len(plans), Console().width), markup=False, emoji=False)
    console.print(table)
    for plan in plans:
        if not plan.fits:
            console.print(f"{plan.job.title} does not fit; it needs {plan.advice()}", soft_wrap=True)
