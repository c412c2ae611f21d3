# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: the family's stock attention in vLLM, with the size of the window."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention

from hmf.config.layers import layer_options
from hmf.layers.base import StateShape


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
