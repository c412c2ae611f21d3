# SPDX-License-Identifier: Apache-2.0
"""A plan of a training recipe, from the recipe and a config: memory of each GPU, tokens, steps, GPU-hours.

The model is built on the meta device, and its tensors are counted as in training: weights in float32, or frozen
matrices in bfloat16 if the run stores them so; for trained weights also gradients and AdamW's two moments in float32.
Activations are estimated. No GPU is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from hmf.config.layers import base_head_dim, experts_per_token
from hmf.config.pattern import ATTENTION
from hmf.config.runs import DistillSettings, FinetuneRecipe
from hmf.config.training import ParallelSettings
from hmf.gpus import GIB, MFU, Device
from hmf.layers.gka import GatedKalmaNet
from hmf.layers.own import base_mixer_name
from hmf.model.configuration import building
from hmf.priming.distance import stage1_flops_per_token
from hmf.priming.divergence import LOGITS_AT_ONCE
from hmf.training.finetune import flops_per_token

USABLE = 0.92  # usable share of a GPU's memory; the rest is lost to fragmentation
WIDE = 4  # bytes of a float32 number: a master weight, a gradient or a moment
# Activations that a layer stores for the backward pass, in multiples of the inputs and outputs of its linear layers:
# norms, rotary positions, gates and casts create further tensors of the same widths. Compiled layers store fewer. These
# and the next figure are from measured peaks (docs/performance.md), rounded up.
COPIES, COMPILED_COPIES = 1.5, 0.75
# What GKA's op stores beside these, in multiples of float32 tensors [tokens, heads, head_dim]: states between chunks,
# decays, and float32 copies of queries, keys and values.
GKA_COPIES = 19
LOGITS = 4 * WIDE * LOGITS_AT_ONCE  # four tensors of the size of a chunk of logits
FRAMEWORK = 3 * GIB  # CUDA context, kernel workspaces, buffers of the communication library


@dataclass(frozen=True)
class Job:
    """One stage of training of a recipe."""

    title: str
    recipe: DistillSettings | FinetuneRecipe
    model: PreTrainedModel  # on the meta device; trained parameters require a gradient
    narrow: frozenset[nn.Parameter]  # the frozen matrices that are exact in bfloat16
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
        weights, rest = self.divisors
        return {
            "weights": (WIDE * self.job.adapters + self._bytes(self.job.model.parameters())) / weights,
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

    @cached_property
    def _narrow(self) -> frozenset[nn.Parameter]:
        """The frozen parameters that are stored in bfloat16."""
        recipe = self.job.recipe
        generates = isinstance(recipe, DistillSettings) and recipe.on_policy is not None
        return self.job.narrow if self.training.narrows_frozen and not generates else frozenset()

    def _bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        return sum(x.numel() * (2 if x in self._narrow else WIDE) for x in parameters)

    def _copies(self) -> float:
        """Bytes of gradient buckets and of weights that autocast casts. If the weights are sharded, also bytes of the
        gathered weights (those outside the layers, and of two layers) and of one layer's gradients."""
        layers = [list(layer.parameters()) for layer in self.job.model.model.layers]
        inside = {x for layer in layers for x in layer}
        outside = [x for x in self.job.model.parameters() if x not in inside]
        casts = self._casts(outside) if self._width == 2 else 0
        if self.divisors[0] > 1:
            gradients = max(sum(x.numel() for x in layer if x.requires_grad) for layer in layers)
            return self._bytes(outside) + 2 * max(map(self._bytes, layers)) + WIDE * gradients + casts
        return casts + (WIDE * self.trained if self.ranks > 1 else 0)

    def _casts(self, outside: list[nn.Parameter]) -> int:
        """Bytes of the copies in bfloat16 that the backward pass needs; recomputation needs those of one layer at a
        time, but autocast keeps those of trained weights if these are not sharded."""
        recomputed, unsharded = self.training.gradient_checkpointing, self.divisors[0] == 1
        kept, briefly = sum(x.numel() for x in outside if x not in self._narrow), 0
        for layer in self._backward_layers:
            wide = [x for x in layer.parameters() if x not in self._narrow]
            always = sum(x.numel() for x in wide if not recomputed or (unsharded and x.requires_grad))
            kept, briefly = kept + always, max(briefly, sum(x.numel() for x in wide) - always)
        return 2 * (kept + briefly + self.job.adapters)

    @property
    def _compiled(self) -> bool:
        """Whether decoder layers run compiled. An objective that compares outputs inside them runs them uncompiled."""
        recipe = self.job.recipe
        hooks = isinstance(recipe, DistillSettings) and recipe.objective.layers != "none"
        return self.training.torch_compile and not hooks

    @property
    def _backward_layers(self) -> list[nn.Module]:
        """The layers that store activations for the backward pass."""
        layers = list(self.job.model.model.layers)
        return layers[self.job.model.config.pattern.replaced[0] :] if self.job.distils else layers

    def _activations(self) -> float:
        tokens = self.training.per_device_train_batch_size * self.job.sequence_length / self.training.sequence_parallel
        config = self.job.model.config
        stream = WIDE * config.hidden_size  # the residual stream is in float32
        copies = COMPILED_COPIES if self._compiled else COPIES
        inside = [
            copies * self._width * linear_widths(layer, config) + GKA_COPIES * WIDE * _solved_width(layer)
            for layer in self._backward_layers
        ]
        stored = max(inside) if self.training.gradient_checkpointing else sum(inside)
        streams = len(inside) + 4  # 4: embeddings, last norm, the teacher's output and the difference
        return tokens * (streams * stream + stored)

    def _logits(self) -> int:
        recipe = self.job.recipe
        if isinstance(recipe, DistillSettings) and not has_kl(recipe):
            return 0
        tokens = self.training.per_device_train_batch_size * self.job.sequence_length // self.training.sequence_parallel
        return min(LOGITS, 4 * WIDE * tokens * self.job.model.config.vocab_size)

    @cached_property
    def flops_per_token(self) -> float | None:
        """FLOPs of the model per token; None for mixtures of experts.

        Attention scores and the projections of recurrent layers are included. Recomputation and the recurrences
        themselves are not.
        """
        model, length = self.job.model, self.job.sequence_length
        config, replaced = model.config, model.config.pattern.replaced
        if isinstance(self.job.recipe, DistillSettings):
            total = stage1_flops_per_token(model, head=has_kl(self.job.recipe))
        else:
            total = flops_per_token(model)
        if total is None:
            return None
        for index in config.attention_layers:
            window = config.attention_windows[index]
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
        """The smallest change with which the recipe fits, as command-line options."""
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


def _solved_width(layer: nn.Module) -> int:
    """Width of all heads of a layer's GKA, H K; 0 without one."""
    mixers = [module for module in layer.modules() if isinstance(module, GatedKalmaNet)]
    return sum(mixer.options.num_heads * mixer.options.head_dim for mixer in mixers)


def linear_widths(layer: nn.Module, config: Any) -> float:
    """The summed input and output widths of a layer's linear layers for one token, without the teacher's.

    Only the experts of one token are counted.
    """
    teacher = f"{base_mixer_name(layer)}." if hasattr(layer, "mixer_name") else None
    total = sum(
        x.in_features + x.out_features
        for name, x in layer.named_modules()
        if isinstance(x, nn.Linear) and not (teacher and name.startswith(teacher))
    )
    if active := experts_per_token(config):
        total += active * (3 * config.hidden_size + 3 * config.moe_intermediate_size)
    return total


def without_memory(config: Any) -> PreTrainedModel:
    """A Hybrid on the meta device, in float32."""
    with building(config.name_or_path), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)  # it sets config.dtype
    model.tie_weights()
    return model
