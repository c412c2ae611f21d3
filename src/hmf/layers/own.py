# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers that a base has of its own (Qwen3.5's Gated DeltaNet): its module, with packing and our caches.

Legend: B batch, T tokens, S sequences (rows or packed documents), H value heads, K key dim, V value dim, C channels.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import nn

from hmf.config.layers import SILU
from hmf.errors import HmfError
from hmf.ops import gated_delta_rule, short_conv

from .base import Stateful, States, StateShape
from .gdn import l2_normalise

RECURRENT = "linear_attention"  # transformers' name of such a layer in `layer_types`
OWN_MODULE = "linear_attn"  # and of its module in a decoder layer
OWN_SIZES = (
    *("linear_num_key_heads", "linear_num_value_heads"),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"),
)


@functools.cache
def own_recurrence_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The base's `GatedDeltaNet` with the same parameters.

    Rows without padding and packed documents run through the base's own forward, so that they equal the base bit for
    bit. The others run through `hmf.ops`, as in the mixers: the base's forward lets packed documents and right padding
    into its convolutions and states. On the CPU all rows run through `hmf.ops` where packages of GPU kernels are
    installed, which the base's forward would call. States: conv [S, C, W - 1] and recurrent [S, H, K, V].
    """

    def mix(
        self: Any, hidden_states: torch.Tensor, states: States | None, cu_seqlens: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor, States]:
        new, before = {}, states or {}
        qkv, z, b, a = _projected(self, hidden_states)
        qkv, new["conv"] = short_conv(qkv, *self.filters(qkv, "conv1d"), before.get("conv"), cu_seqlens)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q, k = (x.unflatten(-1, (-1, self.head_k_dim)) for x in (q, k))
        q, k = (x.repeat_interleave(self.num_v_heads // self.num_k_heads, dim=-2) for x in (q, k))
        v = v.unflatten(-1, (-1, self.head_v_dim))
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        decay = -self.A_log.to(wide).exp() * nn.functional.softplus(a.to(wide) + self.dt_bias)
        o, new["recurrent"] = gated_delta_rule(
            l2_normalise(q), l2_normalise(k), v, decay, b.sigmoid().to(wide), before.get("recurrent"), cu_seqlens
        )
        o = self.norm(o.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
        return self.out_proj(o.view(*hidden_states.shape[:-1], -1)), new

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        layout: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        on_cpu = hidden_states.device.type == "cpu"
        if layout is not None or "shards" in kwargs or (on_cpu and _stock_needs_gpu()):
            return Stateful.forward(self, hidden_states, layout, cache_params)[0]
        if cache_params is None:
            return stock.forward(self, hidden_states)
        kept = cache_params.layers[self.layer_idx]
        states, stock_cache = _as_stock(kept.states, self.layer_idx)
        output = stock.forward(self, hidden_states, stock_cache)
        conv, recurrent = states.conv_states[0][..., 1:], states.recurrent_states[0]
        kept.store({"conv": conv, "recurrent": recurrent}, hidden_states.shape[1])
        return output

    def sections(self: Any, name: str) -> tuple[int, ...] | None:
        joined = name in ("in_proj_qkv.weight", "conv1d.weight")
        return (self.key_dim, self.key_dim, self.value_dim) if joined else None

    namespace = {"mix": mix, "forward": forward, "symbol": RECURRENT, "float32_parameters": ("A_log", "dt_bias")}
    namespace |= {"sections": sections, "state_shapes": staticmethod(own_state_shapes)}
    return type(f"Own{stock.__name__}", (Stateful, stock), namespace)


@functools.cache
def _stock_needs_gpu() -> bool:
    """Whether transformers runs these layers by packages of GPU kernels, which it takes for tensors of any device."""
    return any(importlib.util.find_spec(package) is not None for package in ("fla", "causal_conv1d"))


def _projected(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The inputs of the convolution [B, T, C], the gate [B, T, H V], and beta and the step before their nonlinearities,
    [B, T, H]. Qwen3-Next computes them by two projections, in another order."""
    if not hasattr(layer, "in_proj_qkvz"):
        return tuple(getattr(layer, f"in_proj_{name}")(hidden_states) for name in ("qkv", "z", "b", "a"))
    projected = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(hidden_states), layer.in_proj_ba(hidden_states))
    q, k, v, z, b, a = projected
    return torch.cat([x.flatten(2) for x in (q, k, v)], -1), z.flatten(2), b, a


def _as_stock(states: States, layer_idx: int) -> tuple[Any, Any]:
    """transformers' cache of layer `layer_idx` with `states`, alone and in a cache of the model.

    It keeps one more input of the convolution, not used.
    """
    # Not at the top: importing transformers registers the Hybrids (hmf/__init__.py), which need this module.
    from transformers import Cache
    from transformers.cache_utils import LinearAttentionLayer

    layer = LinearAttentionLayer()
    if states:
        conv = nn.functional.pad(states["conv"], (1, 0))
        layer.lazy_initialization(conv, states["recurrent"])
        layer.conv_states[0], layer.recurrent_states[0] = conv, states["recurrent"]
        layer.has_previous_state[0] = True
    return layer, Cache(layers=[layer] * (layer_idx + 1))


def base_mixer_name(layer: nn.Module) -> str:
    """What the family calls the token mixer that a decoder layer has of its own."""
    return OWN_MODULE if hasattr(layer, OWN_MODULE) else "self_attn"


def base_mixer(layer: nn.Module) -> Any:
    """The base's own token mixer in a decoder layer; in a replaced layer of a fused model it is the teacher."""
    return layer.get_submodule(base_mixer_name(layer))


def own_layers(config: Any) -> list[int]:
    """Indices of the layers of a base or hybrid config that are recurrent in the base itself."""
    types = getattr(config, "attention_types", None) or getattr(config, "layer_types", None) or []
    return [index for index, kind in enumerate(types) if kind == RECURRENT]


def own_state_shapes(config: Any, ranks: int = 1) -> dict[str, StateShape]:
    """The states of such a layer for one sequence on one of `ranks` tensor-parallel ranks."""
    keys, values = config.linear_num_key_heads // ranks, config.linear_num_value_heads // ranks
    channels = 2 * keys * config.linear_key_head_dim + values * config.linear_value_head_dim
    return {
        "conv": StateShape((channels, config.linear_conv_kernel_dim - 1), "conv"),
        "recurrent": StateShape((values, config.linear_key_head_dim, config.linear_value_head_dim), "recurrent"),
    }


def check_own_layers(config: Any) -> None:
    """HmfError for a config whose layers cannot run here; transformers' attention has its gate in any case."""
    if getattr(config, "attn_output_gate", True) is not True:
        raise HmfError(f"config.json: attn_output_gate: {config.attn_output_gate!r}: must be true, or left out")
    if config.hidden_act not in SILU:
        raise HmfError(f"config.json: hidden_act: {config.hidden_act!r}: the convolutions of GDN layers need silu")
    for name in OWN_SIZES:
        if getattr(config, name) < 1:
            raise HmfError(f"config.json: {name}: {getattr(config, name)}: give 1 or more")
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise HmfError(
            f"config.json: linear_num_value_heads: {config.linear_num_value_heads} is not a multiple of "
            f"linear_num_key_heads, {config.linear_num_key_heads}"
        )
