# SPDX-License-Identifier: Apache-2.0
"""B'MOJO-F (arXiv 2407.06324): attention to a window of the tokens, and to fading tokens in the window before it.

The fading tokens are the outputs of a recurrent layer.

Legend: B batch, T tokens, S sequences (rows or documents), P kept positions, H query heads, Hk key/value heads,
K head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hmf.config.layers import LAYER_KINDS
from hmf.ops import KeySet, windowed_attention
from hmf.ops.window import latest

from .attention import (
    attention_scale,
    has_positions,
    norm_like,
    normalised,
    query_growth,
    rotate,
    rotate_query,
    stock_attention,
    stock_parameters,
)
from .base import Mixer, Start, States, StateShape, require_loaded, split_heads
from .gdn import GatedDeltaNet
from .gka import GatedKalmaNet
from .mamba2 import Mamba2
from .swa import WindowMixer, count_tokens

# The recurrent layers that can make the fading tokens.
INNER_MIXERS: dict[str, type[Mixer]] = {cls.symbol: cls for cls in (GatedDeltaNet, GatedKalmaNet, Mamba2)}
INNER = "inner_"  # prefix of the names of the recurrent layer's states


class BMojoAttention(nn.Module):
    """Projections and norms of both windows. Those of the fading window end in `_`; when tied, they are shared."""

    def __init__(self, config: Any, options: Any, layer_idx: int):
        super().__init__()
        stock, scale = stock_parameters(config, layer_idx), attention_scale(config, layer_idx)
        qk_norm, bias, o_bias = "q_norm.weight" in stock, "q_proj.bias" in stock, "o_proj.bias" in stock
        inner, kv = options.num_heads * options.head_dim, options.num_key_value_heads * options.head_dim
        self.head_dim, self.tied = options.head_dim, options.tie_attn_weights
        if config.family.published:
            # As published: without `attention_bias` in the family's config, q, k and v have biases.
            bias, o_bias = getattr(config, "attention_bias", True), getattr(config, "attention_bias", False)
            whole = getattr(config, "whole", config)  # the whole model's, if `config` is of a tensor-parallel rank
            scale = (options.head_dim if qk_norm else whole.hidden_size // whole.num_attention_heads) ** -0.5
        self.scale, self.dropout = scale, config.attention_dropout or 0.0
        norms = stock_attention(config, layer_idx)
        for end in ("",) if self.tied else ("", "_"):
            for name, width in (("q", inner), ("k", kv), ("v", kv)):
                self.add_module(f"{name}_proj{end}", nn.Linear(options.hidden_size, width, bias=bias))
            for name in ("q", "k") if qk_norm else ():
                norm = norm_like(getattr(norms, f"{name}_norm"), options.rms_norm_eps)
                self.add_module(f"{name}_norm{end}", norm)
        if "gate_proj.weight" in stock:
            self.gate_proj = nn.Linear(options.hidden_size, inner, bias="gate_proj.bias" in stock)
        self.o_proj = nn.Linear(inner, options.hidden_size, bias=o_bias)

    def normed(self, name: str, x: torch.Tensor, fading: bool) -> torch.Tensor:
        """q, k or v with norm, before rotary positions: x [..., D] -> [..., heads, K]."""
        projection = f"{name}_proj{'_' if fading and not self.tied else ''}"
        return self.heads(projection, getattr(self, projection)(x))

    def heads(self, projection: str, y: torch.Tensor) -> torch.Tensor:
        """The output y of the module `projection`, split into heads and normalised."""
        return normalised(getattr(self, projection.replace("proj", "norm"), None), y, self.head_dim)

    def project(self, name: str, x: torch.Tensor, fading: bool, position_embeddings) -> torch.Tensor:
        """q, k or v with norm and rotary positions, [B, T, heads, K]."""
        y = self.normed(name, x, fading)
        if name == "v":
            return y
        return rotate_query(y, *position_embeddings) if name == "q" else rotate(y, *position_embeddings[:2])

    def attend(self, queries, sets, seen: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """`windowed_attention` with queries [B, T, H, K]: one if tied, otherwise one for each of the two sets."""
        q, *fading_q = queries
        if fading_q:  # concatenate both queries, and pad each set's keys with zeros in place of the other query
            q = torch.cat([q, *fading_q], -1)
            sets = [_widened(keys, fading=keys.low > 0) for keys in sets]
        dropout = self.dropout if self.training else 0.0
        return windowed_attention(q, sets, self.scale, seen, cu_seqlens, dropout)

    def output(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The result of `attend`, [B, T, H, K], gated by the layer's input x [B, T, D] where the base does it."""
        o = o.flatten(-2)
        return self.o_proj(o * self.gate_proj(x).sigmoid() if hasattr(self, "gate_proj") else o)


class BMojoF(WindowMixer):
    """Options: `hmf.config.layers.BMojoFOptions`.

    States: those of the recurrent layer; k, v [S, P, Hk, K] with P < window_size; fading_k, fading_v with
    P < 2 window_size; seen [S] tokens.
    """

    symbol = "BMF"

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        self.growth = query_growth(config) if self.options.scale_queries else None
        self.has_positions = has_positions(config, layer_idx)
        self.bmojo_attn = BMojoAttention(config, self.options, layer_idx)
        symbol = self.options.inner_symbol
        self.inner_name = LAYER_KINDS[symbol].module_name
        self.add_module(self.inner_name, INNER_MIXERS[symbol](config, layer_idx))

    @property
    def inner(self) -> Mixer:
        return self.get_submodule(self.inner_name)

    def sections(self, name: str) -> tuple[int, ...] | None:
        inner = f"{self.inner_name}."
        return self.inner.sections(name.removeprefix(inner)) if name.startswith(inner) else None

    @property
    def output_projection(self) -> nn.Linear:
        return self.bmojo_attn.o_proj

    @classmethod
    def state_shapes(cls, config: Any, ranks: int = 1) -> dict[str, StateShape]:
        o = cls.options_for(config)
        inner = INNER_MIXERS[o.inner_symbol].state_shapes(config, ranks)
        shape = split_heads(o.num_key_value_heads, ranks), o.head_dim
        near = StateShape((o.window_size - 1, *shape), "window")
        fading = StateShape((2 * o.window_size - 1, *shape), "window", o.window_size)
        windows = {"k": near, "v": near, "fading_k": fading, "fading_v": fading}
        return {INNER + name: state for name, state in inner.items()} | windows | {"seen": StateShape((), "count")}

    def mix(self, hidden_states, states, cu_seqlens, position_embeddings) -> tuple[torch.Tensor, States]:
        before = states or {}
        inner = {name.removeprefix(INNER): x for name, x in before.items() if name.startswith(INNER)} or None
        require_loaded(hidden_states, **dict(self.inner.named_parameters(recurse=False)))
        fading, inner = self.inner.mix(hidden_states, inner, cu_seqlens, position_embeddings[:2])
        new = {INNER + name: x for name, x in inner.items()}
        new["seen"] = count_tokens(hidden_states, states, cu_seqlens)

        attention, window, sets = self.bmojo_attn, self.options.window_size, []
        for source, low, high, names in (
            (hidden_states, 0, window - 1, {"k": "k", "v": "v"}),
            (fading, window, 2 * window - 1, {"k": "fading_k", "v": "fading_v"}),
        ):
            k, v = (attention.project(name, source, low > 0, position_embeddings) for name in "kv")
            sets.append(KeySet(k, v, low, high, before.get(names["k"]), before.get(names["v"])))
            new[names["k"]] = latest(k, high, before.get(names["k"]), cu_seqlens)
            new[names["v"]] = latest(v, high, before.get(names["v"]), cu_seqlens)
        windows = (False,) if attention.tied else (False, True)
        queries = [attention.project("q", hidden_states, fading, position_embeddings) for fading in windows]
        o = attention.attend(queries, sets, before.get("seen"), cu_seqlens)
        return attention.output(o, hidden_states), new

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, generator: torch.Generator, std: float) -> Start:
        """Initialise the projections and norms of both windows, and the recurrent layer, from the same attention."""
        start, parameters = Start(), dict(attention.named_parameters())
        for name, parameter in self.bmojo_attn.named_parameters(prefix="bmojo_attn"):
            module, _, kind = name.removeprefix("bmojo_attn.").rpartition(".")
            source = f"{module.removesuffix('_')}.{kind}"
            if source in parameters:
                parameter.copy_(parameters[source])
                start.copied[name] = source
            else:  # a bias that this layer has and the attention does not have
                parameter.zero_()
                start.initialised.append(name)
        start.merge(self.inner.init_from_attention(attention, generator, std).under(self.inner_name))
        return start


def _widened(keys: KeySet, fading: bool) -> KeySet:
    def widen(k):
        return None if k is None else F.pad(k, (k.shape[-1], 0) if fading else (0, k.shape[-1]))

    return KeySet(widen(keys.k), keys.v, keys.low, keys.high, widen(keys.past_k), keys.past_v)
