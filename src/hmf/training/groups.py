# SPDX-License-Identifier: Apache-2.0
"""Groups of parameters in Stage 2, their learning rates, and low-rank adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hmf.config.runs import LoraSettings
from hmf.errors import HmfError
from hmf.layers.own import OWN_MODULE
from hmf.model.convert import mixer_names

ALL, LORA = "all", "lora"


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate; None if they are frozen."""

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None

    @property
    def size(self) -> int:
        return sum(x.numel() for x in self.parameters.values())


def parts(model: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of a plain Hybrid, each in exactly one part.

    mixers: the mixers of replaced layers; attention: what the base has in the other layers, attention with its query
    and key norms or a recurrent layer of its own; mlp: also experts and their router; norms: the norms of layers and
    the final norm; embeddings: also the head.
    """
    mixers = tuple(f"model.layers.{index}.{name}." for index, name in mixer_names(model))
    by_part: dict[str, dict[str, nn.Parameter]] = {
        name: {} for name in ("mixers", "norms", "attention", "mlp", "embeddings")
    }
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if name.startswith(mixers):
            part = "mixers"
        elif "self_attn" in path or OWN_MODULE in path:
            part = "attention"
        elif "mlp" in path:
            part = "mlp"
        elif "embed_tokens" in path or "lm_head" in path:
            part = "embeddings"
        elif path[-2].endswith("norm"):
            part = "norms"
        else:
            raise HmfError(f"{type(model).__name__}: {name} belongs to none of the groups {', '.join(by_part)}")
        by_part[part][name] = parameter
    return by_part


def choose(
    model: PreTrainedModel, rates: Mapping[Any, float], lora: LoraSettings | None = None
) -> list[ParameterGroup]:
    """The groups of `model`, with learning rates by group name; "all" is the rate of groups without one of their own.

    Groups without a rate are frozen. HmfError if a named group has no parameters.
    """
    groups = []
    for name, parameters in parts(model).items():
        rate = rates.get(name, rates.get(ALL))
        if not parameters and (name in rates or (lora is not None and name in lora.groups)):
            key = "trainable" if name in rates else "lora.groups"
            raise HmfError(f"{key}: {name}: the model has no such parameters; leave the group out")
        for parameter in parameters.values():
            parameter.requires_grad_(rate is not None)
        if parameters:
            groups.append(ParameterGroup(name, parameters, rate))
    return groups


def adapter_targets(model: PreTrainedModel, groups: Iterable[ParameterGroup], settings: LoraSettings) -> list[str]:
    """Names of the linear layers that get an adapter; HmfError if a group has matrices that are no linear layers."""
    chosen: dict[str, nn.Parameter] = {}
    for group in groups:
        if group.name in settings.groups:
            chosen |= group.parameters
    targets = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and f"{n}.weight" in chosen]
    # Convolutions get no adapter. Experts are an error, because they would be most of their group.
    for name, parameter in chosen.items():
        owner, _, _ = name.rpartition(".")
        if parameter.dim() > 1 and owner not in targets and not isinstance(model.get_submodule(owner), nn.Conv1d):
            raise HmfError(f"lora.groups: {name} is not a linear layer and cannot have an adapter; leave its group out")
    if not targets:
        raise HmfError(f"lora.groups: {', '.join(settings.groups)}: no linear layer to adapt; name attention or mlp")
    return targets


def add_adapters(
    model: PreTrainedModel, groups: Iterable[ParameterGroup], settings: LoraSettings
) -> tuple[Any, ParameterGroup]:
    """Put adapters on every linear layer of the groups in `settings`, inside `model`. Returns (peft model, group).

    The peft model's `merge_and_unload()` adds the adapters to the weights and restores the original layers.
    """
    if importlib.util.find_spec("peft") is None:
        raise HmfError(
            "lora: peft is not installed; `make setup-train` or pip install 'hybrid-model-factory[lora]' installs it"
        )
    from peft import LoraConfig, LoraModel

    targets = adapter_targets(model, groups, settings)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handle = LoraModel(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            bias="none",
        ),
        "default",
    )
    adapters = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            adapters[name] = parameter
        else:  # peft froze it
            parameter.requires_grad_(frozen[name.replace(".base_layer.", ".")])
    return handle, ParameterGroup(LORA, adapters, settings.learning_rate)


def optimiser_groups(model: nn.Module, groups: Iterable[ParameterGroup], weight_decay: float) -> list[dict[str, Any]]:
    """The optimiser's parameter groups. Vectors (norms, biases, decays) get no weight decay, so each group becomes two.

    The parameters are looked up in `model` by name, because sharding replaces parameters.
    """
    optimised, current = [], dict(model.named_parameters())
    for group in groups:
        if group.learning_rate is None:
            continue
        for decays in (True, False):
            parameters = [current[name] for name, x in group.parameters.items() if (x.dim() > 1) == decays]
            if parameters:
                optimised.append(
                    {
                        "params": parameters,
                        "lr": group.learning_rate,
                        "group": group.name,
                        "weight_decay": weight_decay if decays else 0.0,
                    }
                )
    return optimised


def group_rates(groups: Iterable[ParameterGroup], first: float) -> dict[str, float]:
    """The learning rates of several groups for the log, when that of the first is `first`; all have one schedule."""
    rates = {group.name: group.learning_rate for group in groups if group.learning_rate is not None}
    if len(rates) < 2:
        return {}
    highest = next(iter(rates.values()))
    return {f"learning_rate_{name}": first * rate / highest for name, rate in rates.items()}


def table(groups: Iterable[ParameterGroup]) -> list[str]:
    """The lines of a text table of the groups: parameters and learning rate of each."""
    rows = [(g.name, f"{g.size:,}", "frozen" if g.learning_rate is None else f"{g.learning_rate:g}") for g in groups]
    rows = [("group", "parameters", "learning rate"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
