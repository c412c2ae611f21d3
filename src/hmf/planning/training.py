# SPDX-License-Identifier: Apache-2.0
"""A plan of a training recipe, from the recipe and a config alone: memory of each GPU, tokens, steps, GPU-hours.

The model is built on the meta device, and its tensors are counted as in training: weights in float32, and for trained
weights gradients and AdamW's two moments in float32. Activations are estimated. No GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from hmf.config.data import DataRecipe
from hmf.config.layers import base_head_dim
from hmf.config.pattern import ATTENTION, require_fused
from hmf.config.runs import DataSettings, DistillRecipe, DistillSettings, FinetuneRecipe, PrimeRecipe, load_recipe
from hmf.config.strict import Settings, parse_yaml
from hmf.config.training import ParallelSettings
from hmf.data.mixture import row_length
from hmf.data.prepare import read_index
from hmf.errors import HmfError, notice
from hmf.gpus import GIB, Device, parse_gpus
from hmf.model.checkpoint import load_config
from hmf.model.configuration import building
from hmf.model.convert import attention_layers, hybrid_config
from hmf.model.rope import with_rope
from hmf.priming.distance import stage1_flops_per_token
from hmf.priming.objectives import LOGITS_AT_ONCE, train_only_mixers
from hmf.training.evaluation import held_out_from
from hmf.training.finetune import check_model, flops_per_token
from hmf.training.groups import adapter_targets, choose

from .serving import size_of

MFU = 0.35  # assumed model FLOPs utilisation; a guess, not a measurement
USABLE = 0.92  # usable share of a GPU's memory; the rest is lost to fragmentation
WIDE = 4  # bytes of a master weight, of a gradient, of a moment
# Activations that a layer stores for the backward pass, in multiples of the inputs and outputs of its linear layers:
# norms, rotary positions, gates and casts create further tensors of the same widths.
COPIES = 2.0
LOGITS = 4 * WIDE * LOGITS_AT_ONCE  # four tensors of the size of a chunk of logits
FRAMEWORK = 3 * GIB  # CUDA context, kernel workspaces, buffers of the communication library


@dataclass(frozen=True)
class Job:
    """One stage of training of a recipe."""

    title: str
    recipe: DistillSettings | FinetuneRecipe
    model: PreTrainedModel  # on the meta device; trained parameters require a gradient
    sequence_length: int
    adapters: int = 0  # number of parameters that low-rank adapters add
    section: str = "training"  # key path of the `training` section in the recipe

    @property
    def training(self) -> ParallelSettings:
        return self.recipe.training

    @property
    def distils(self) -> bool:
        return isinstance(self.recipe, DistillSettings)


@dataclass(frozen=True)
class TrainingPlan:
    """The plan of a job on `ranks` GPUs. All bytes are those of one GPU."""

    job: Job
    device: Device
    ranks: int
    training: ParallelSettings
    mfu: float = MFU

    @property
    def divisors(self) -> tuple[int, int]:
        """The number of GPUs over which the strategy divides weights, and gradients and moments."""
        return {"ddp": (1, 1), "deepspeed": (1, self.ranks), "fsdp2": (self.ranks, self.ranks)}[self.training.strategy]

    @property
    def rows_per_step(self) -> int:
        streams = self.ranks // self.training.sequence_parallel
        return self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps * streams

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.job.sequence_length

    @property
    def tokens(self) -> int:
        return self.training.steps * self.tokens_per_step

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return self.job.adapters + sum(x.numel() for x in self.job.model.parameters() if x.requires_grad)

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes of one GPU by use. The first three are exact, the others are estimates."""
        total = self.job.adapters + sum(x.numel() for x in self.job.model.parameters())
        weights, rest = self.divisors
        return {
            "weights": WIDE * total / weights,
            "gradients": WIDE * self.trained / rest,
            "moments of AdamW": 2 * WIDE * self.trained / rest,
            "buffers and casts": self._copies(),
            "activations": self._activations(),
            "logits": float(self._logits()),
            "CUDA and communication": float(FRAMEWORK),
        }

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= USABLE * self.device.memory

    @property
    def _width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.training.precision == "bfloat16" else 4

    def _copies(self) -> float:
        """Buckets of gradients and cached casts of weights. If the weights are divided, the gathered ones: those
        outside the layers, two layers, and the gradients of a layer."""
        layers = [sum(x.numel() for x in layer.parameters()) for layer in self.job.model.model.layers]
        outside = sum(x.numel() for x in self.job.model.parameters()) - sum(layers)
        if self.divisors[0] > 1:
            return WIDE * (outside + 3 * max(layers)) + (2 * (outside + max(layers)) if self._width == 2 else 0)
        buckets = WIDE * self.trained if self.ranks > 1 else 0
        casts = 2 * (self.trained + max(layers) + outside) if self._width == 2 else 0
        return buckets + casts

    @property
    def _backward_layers(self) -> list[nn.Module]:
        """The layers that store activations for the backward pass."""
        layers = list(self.job.model.model.layers)
        return layers[self.job.model.config.pattern.replaced[0] :] if self.job.distils else layers

    def _activations(self) -> float:
        tokens = self.training.per_device_train_batch_size * self.job.sequence_length / self.training.sequence_parallel
        stream = WIDE * self.job.model.config.hidden_size  # the residual stream is in float32
        inside = [COPIES * self._width * linear_widths(layer, self.job.model.config) for layer in self._backward_layers]
        if self.training.gradient_checkpointing:
            kept = len(inside) * stream + max(inside)
        else:
            kept = len(inside) * stream + sum(inside)
        return tokens * (kept + 4 * stream)  # embeddings, last norm, the teacher's and their difference

    def _logits(self) -> int:
        recipe = self.job.recipe
        if isinstance(recipe, DistillSettings) and not has_kl(recipe):
            return 0
        tokens = self.training.per_device_train_batch_size * self.job.sequence_length // self.training.sequence_parallel
        return min(LOGITS, 4 * WIDE * tokens * self.job.model.config.vocab_size)

    @cached_property
    def flops_per_token(self) -> float | None:
        """FLOPs of the model per token, with attention scores, without recomputation and without the recurrences
        (their projections are included). None for mixtures of experts."""
        model, length = self.job.model, self.job.sequence_length
        config, replaced = model.config, model.config.pattern.replaced
        if isinstance(self.job.recipe, DistillSettings):
            total = stage1_flops_per_token(model, head=has_kl(self.job.recipe))
        else:
            total = flops_per_token(model)
        if total is None:
            return None
        for index, window in enumerate(config.attention_windows):
            reach = min(length / 2, window or length)  # a causal mask leaves half of the pairs
            forward = 4 * config.num_attention_heads * base_head_dim(config) * reach
            keeps = config.pattern.symbols[index] == ATTENTION
            if not self.job.distils:
                total += 3 * forward if keeps else 0
            elif index < replaced[0]:
                total += forward
            else:  # the teacher's path, and the student's with its backward pass
                total += (4 if keeps else 1) * forward
        return total

    @property
    def gpu_hours(self) -> float | None:
        if not self.device.peak or self.flops_per_token is None:
            return None
        return self.tokens * self.flops_per_token / (self.device.peak * self.mfu) / 3600

    def advice(self) -> str:
        """The smallest change to the recipe with which it fits, as options of the commands that read it."""
        for change in _changes(self.training, self.ranks):
            plan = replace(self, training=self.training.model_copy(update=change))
            if plan.fits and self._valid(change):
                return " ".join(f"--set {self.job.section}.{key}={str(value).lower()}" for key, value in change.items())
        return "more GPUs or larger ones, by --gpu"

    def _valid(self, change: dict[str, Any]) -> bool:
        """Whether the recipe is valid with this change of its `training` section."""
        recipe = self.job.recipe
        content = recipe.model_dump(exclude_unset=True)
        content["training"] |= change
        with suppress(ValidationError):
            return type(recipe).model_validate(content) is not None
        return False


def _changes(training: ParallelSettings, ranks: int) -> Iterator[dict[str, Any]]:
    """Changes that need less memory, the smallest first; the total batch does not change."""
    change: dict[str, Any] = {}
    if training.precision == "float32":
        change["precision"] = "bfloat16"
        yield dict(change)
    if not training.gradient_checkpointing:
        change["gradient_checkpointing"] = True
        yield dict(change)
    if training.per_device_train_batch_size > 1:
        change["per_device_train_batch_size"] = 1
        change["gradient_accumulation_steps"] = (
            training.gradient_accumulation_steps * training.per_device_train_batch_size
        )
        yield dict(change)
    if training.strategy == "ddp" and ranks > 1:
        change["strategy"] = "fsdp2"
        yield dict(change)
    accumulation = change.get("gradient_accumulation_steps", training.gradient_accumulation_steps)
    degree = 2 * training.sequence_parallel
    while degree <= ranks:
        factor = degree // training.sequence_parallel
        if ranks % degree == 0:
            yield change | {"sequence_parallel": degree, "gradient_accumulation_steps": accumulation * factor}
        degree *= 2


def has_kl(recipe: DistillSettings) -> bool:
    """Whether Stage 1 computes logits at any step."""
    return any(recipe.objective.kl.values())


def linear_widths(layer: nn.Module, config: Any) -> float:
    """The summed widths of inputs and outputs of a layer's linear layers for one token, without the teacher's
    attention. Of experts, only those of one token count."""
    total = sum(
        x.in_features + x.out_features
        for name, x in layer.named_modules()
        if isinstance(x, nn.Linear) and not (hasattr(layer, "mixer_name") and name.startswith("self_attn."))
    )
    if getattr(config, "num_experts_per_tok", None):
        total += config.num_experts_per_tok * (3 * config.hidden_size + 3 * config.moe_intermediate_size)
    return total


# ---- from recipes


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
        with suppress(ValueError, OSError):  # load_recipe raises it, with the line
            content = parse_yaml(path.read_text(encoding="utf-8"))
    keys: set[str] = set(content) if isinstance(content, dict) else set()
    if "start_from" in keys or {"tokenizer", "model"} <= keys:
        return None
    kinds: dict[str, type[Settings]] = {"sources": DataRecipe, "method": FinetuneRecipe, "hybrid": PrimeRecipe}
    kind: type[Settings] = next((kind for key, kind in kinds.items() if key in keys), DistillRecipe)
    return load_recipe(path, kind, overrides)


class Recipes:
    """Recipes, and further ones in and beside their folders, whose outputs the first ones may use before they exist.

    resolve_base: returns the directory of a base checkpoint for its name in a recipe.
    """

    def __init__(self, paths: Iterable[Path], resolve_base: Callable[[str], Path], overrides: Sequence[str] = ()):
        self.resolve_base = resolve_base
        self.read = {path: read_any(path, overrides) for path in paths}

    def all(self) -> Iterator[tuple[Path, Settings | None]]:
        """The given recipes, then those beside them, which are read lazily."""
        yield from list(self.read.items())
        for folder in dict.fromkeys(path.parent for path in self.read):
            for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.parent.glob("*/*.yaml"))]:
                if path not in self.read:
                    with suppress(HmfError):  # this recipe was not asked for
                        self.read[path] = read_any(path)
                        yield path, self.read[path]

    def plan(self, path: Path, gpus: str | None = None, mfu: float = MFU) -> TrainingPlan | None:
        """The plan of one of the recipes; None if it does not train a Hybrid."""
        if not 0 < mfu <= 1:
            raise HmfError(f"--mfu: {mfu} is not in (0, 1]")
        if (job := self.job(path)) is None:
            return None
        if (named := gpus or job.training.gpus) is None:
            raise HmfError(f"{path}: training.gpus: is not set; set it, or give --gpu, for example h200x8")
        device, ranks = parse_gpus(named)
        if ranks % (degree := job.training.sequence_parallel):
            raise HmfError(
                f"{path}: training.sequence_parallel: {degree} does not divide {ranks} GPUs; choose a divisor"
            )
        plan = TrainingPlan(job, device, ranks, job.training, mfu)
        if job.training.num_train_epochs is None:
            return plan
        try:
            return replace(plan, training=job.training.with_steps(self._epoch_rows(job.recipe), plan.rows_per_step))
        except HmfError as error:
            raise HmfError(f"{path}: {error}") from None

    def job(self, path: Path) -> Job | None:
        """The training of a recipe; None for a recipe without any, such as one of `hmf data prepare`."""
        recipe = self.read[path]
        try:
            if isinstance(recipe, PrimeRecipe):
                job = self._stage1(path.stem, recipe.distill, self._prime_config(path, recipe))
                return replace(job, section="distill.training")
            if isinstance(recipe, DistillRecipe):
                return self._stage1(path.stem, recipe, self._config(recipe.model))
            if isinstance(recipe, FinetuneRecipe):
                return self._stage2(path.stem, recipe)
        except HmfError as error:
            raise HmfError(f"{path}: {error}") from None
        return None

    def _stage1(self, title: str, recipe: DistillSettings, config: Any) -> Job:
        require_fused(config, "model")
        model = without_memory(config)
        train_only_mixers(model)
        return Job(title, recipe, model, self._row(recipe.data))

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
        return Job(title, recipe, model, length, adapters)

    def _row(self, data: DataSettings) -> int:
        """Tokens of a row. For rows that are not prepared yet, from the recipe that prepares them."""
        if data.prepared is None or data.prepared.is_dir():
            return row_length(data)
        for _, recipe in self.all():
            if isinstance(recipe, DataRecipe) and recipe.output == data.prepared:
                return recipe.sequence_length
        raise HmfError(
            f"data.prepared: {data.prepared} does not exist, and no recipe in or beside this folder makes it"
        )

    def _epoch_rows(self, recipe: DistillSettings | FinetuneRecipe) -> int:
        """Rows of an epoch: those of the prepared set, or what the recipe that prepares it asks for."""
        prepared, rows = recipe.data.prepared if recipe.data is not None else None, None
        if prepared is not None and prepared.is_dir():
            rows = read_index(prepared)["rows"]
        elif prepared is not None:
            for _, other in self.all():
                if isinstance(other, DataRecipe) and other.output == prepared and other.tokens is not None:
                    rows = math.ceil(other.tokens / other.sequence_length)
        if rows is None:
            data = "pairs" if prepared is None else f"{prepared}, which is not prepared yet,"
            raise HmfError(
                f"training.num_train_epochs: the rows of {data} are not known before they are packed; plan with --set "
                f"{'distill.' if type(recipe) is DistillSettings else ''}training.max_steps=N"
            )
        if recipe.training.eval_strategy != "no" and recipe.eval_data is None:
            rows = held_out_from(rows, recipe.training)
        return rows

    def _config(self, model: Path) -> Any:
        """A checkpoint's config. For a checkpoint that does not exist yet, from the recipe that makes it."""
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
            raise HmfError(f"model: {error}; and no recipe in or beside this folder makes it") from None

    def _prime_config(self, path: Path, recipe: PrimeRecipe) -> Any:
        planned = recipe.base_config is not None and not Path(recipe.base).is_dir()
        base = path.parent / str(recipe.base_config) if planned else self.resolve_base(recipe.base)
        config = load_config(base, weights=False)
        if recipe.hybrid.layers == "auto":
            notice(
                f"{path}: hybrid.layers: auto is planned as if the layers were spread evenly; `hmf prime` chooses them"
            )
        pattern = recipe.hybrid.spread_evenly().layer_pattern(config.num_hidden_layers, attention_layers(config))
        return hybrid_config(config, pattern.with_fused(True), recipe.hybrid.options_by_key())


def plans(
    places: Iterable[Path],
    resolve_base: Callable[[str], Path],
    gpus: str | None = None,
    mfu: float = MFU,
    overrides: Sequence[str] = (),
) -> list[TrainingPlan]:
    """A plan for each training recipe in files and folders; `gpus`, such as "h200x8", overrides the recipe's.

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
    """What `hmf plan-training --json` prints of one plan; bytes are those of one GPU."""
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


def print_plans(plans: Sequence[TrainingPlan]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Planned, not measured",
        title_justify="left",
        caption_justify="left",
        caption=f"GPU-hours assume a model FLOPs utilisation (MFU) of {plans[0].mfu:.0%}. Weights,\n"
        "gradients and moments are counted exactly, all in float32; the rest of the memory is estimated.",
    )
    table.add_column("")
    for plan in plans:
        table.add_column(plan.job.title, justify="right")
    columns = [rows(plan) for plan in plans]
    for name in columns[0]:
        table.add_row(name, *(row[name] for row in columns))
    console = Console(width=max(80 + 16 * len(plans), Console().width))
    console.print(table)
    for plan in plans:
        if not plan.fits:
            console.print(f"{plan.job.title} does not fit; it needs {plan.advice()}", soft_wrap=True)


def without_memory(config: Any) -> PreTrainedModel:
    """A Hybrid on the meta device, in float32."""
    with building(config.name_or_path), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model
