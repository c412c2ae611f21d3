# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: the family's stock attention in vLLM, with the size of the window."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from hmf.config.layers import LAYER_KINDS, base_head_dim, layer_options
from hmf.layers.base import StateShape

_SWA = LAYER_KINDS["SWA"].module_name
GATED = re.compile(rf"(?P<layer>.*\.{_SWA}\.)(?P<part>q|gate)_proj\.(?P<kind>.+)")


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """No states: vLLM's paged cache holds the window."""
    return {}


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: Any) -> nn.Module:
    """`attention` with the window of the layer's own options."""
    return windowed(attention, layer_options(config, symbol).window_size, quant_config, prefix)


def windowed(attention: Any, window: int | None, quant_config: Any, prefix: str) -> nn.Module:
    """`attention` with a new inner attention, whose window is set when it is created."""
    attention.attn = Attention(
        attention.num_heads,
        attention.head_dim,
        attention.scaling,
        num_kv_heads=attention.num_kv_heads,
        cache_config=get_current_vllm_config().cache_config,
        quant_config=quant_config,
        per_layer_sliding_window=window,
        prefix=f"{prefix}.attn",
    )
    return attention


def with_gates(
    weights: Iterable[tuple[str, torch.Tensor]], published: Collection[str], config: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """`weights`, with the queries and the gate of each sliding-window layer in one tensor, as the base's attention has
    them: for each head the rows of its query, then those of its gate. A base without gates has no such tensors."""
    held: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        match = GATED.fullmatch(name)
        if match is None or f"{match['layer']}gate_proj.{match['kind']}" not in published:
            yield name, tensor
            continue
        other = match["layer"] + {"q": "gate", "gate": "q"}[match["part"]] + f"_proj.{match['kind']}"
        if other not in held:
            held[name] = tensor
            continue
        parts = (held.pop(other), tensor) if match["part"] == "gate" else (tensor, held.pop(other))
        heads = torch.stack([part.unflatten(0, (-1, base_head_dim(config))) for part in parts], 1)
        yield f"{match['layer']}q_proj.{match['kind']}", heads.flatten(0, 2)
