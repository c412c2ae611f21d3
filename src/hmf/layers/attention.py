# SPDX-License-Identifier: Apache-2.0
"""Properties of the base family's attention that layers reuse: its parameters, rotary positions and query scaling.

Legend: B batch, T tokens, H heads, K head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hmf.errors import HmfError


def stock_parameters(config: Any, layer_idx: int) -> frozenset[str]:
    """Names of the parameters of the base family's own attention, such as `q_proj.bias` or `q_norm.weight`.

    They are read from the family's class, so that no table lists which family has biases or query and key norms.
    """
    return frozenset(name for name, _ in separate(stock_attention(config, layer_idx)).named_parameters())


def stock_attention(config: Any, layer_idx: int) -> Any:
    """The base family's own attention on the meta device."""
    with torch.device("meta"):
        return config.family.class_named("Attention")(config, layer_idx)


class _Separate:
    """A view of an attention in which queries, keys, values and the gate of the output have a projection each.

    Phi-3 has one projection for queries, keys and values. Qwen3.5 has one for queries and the gate: for each head the
    rows of its query, then those of its gate.
    """

    def __init__(self, attention: Any):
        self._attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        kv = self.config.num_key_value_heads * self.head_dim
        for name, x in self._attention.named_parameters():
            module, _, kind = name.rpartition(".")
            if module == "qkv_proj":
                parts = x.split([len(x) - 2 * kv, kv, kv])
                yield from ((f"{part}_proj.{kind}", rows) for part, rows in zip("qkv", parts, strict=True))
            elif module == "q_proj" and has_output_gate(self._attention):
                heads = x.unflatten(0, (-1, 2, self.head_dim))
                for at, part in enumerate(("q_proj", "gate_proj")):
                    yield f"{part}.{kind}", heads[:, at].flatten(0, 1)
            else:
                yield name, x


class _SeparateRecurrence:
    """A view of a base's own Gated DeltaNet whose parameters have the names and rows of `hmf.layers.gdn`.

    The base has one projection for queries, keys and values, and one convolution (Qwen3.5), or two projections whose
    rows go by key heads (Qwen3-Next).
    """

    def __init__(self, recurrence: Any):
        self._recurrence = recurrence

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        of = self._recurrence
        given: dict[str, torch.Tensor] = dict(of.named_parameters())
        widths = [of.key_dim, of.key_dim, of.value_dim]
        if hasattr(of, "in_proj_qkvz"):  # the module's own method divides the last dimension of [B, T, rows]
            merged = (given.pop(f"in_proj_{name}.weight").T[None] for name in ("qkvz", "ba"))
            parts = [x.flatten(2)[0].T for x in of.fix_query_key_value_ordering(*merged)]
        else:
            parts = [*given.pop("in_proj_qkv.weight").split(widths)]
            parts += [given.pop(f"in_proj_{name}.weight") for name in "zba"]
        yield from zip((f"{name}_proj.weight" for name in ("q", "k", "v", "g", "b", "gk")), parts, strict=True)
        filters = given.pop("conv1d.weight").split(widths)
        yield from zip((f"{name}_conv1d.weight" for name in "qkv"), filters, strict=True)
        renamed: dict[str, str] = {"norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight"}
        yield from ((renamed.get(name, name), x) for name, x in given.items())


def separate(attention: Any) -> Any:
    """An attention whose `named_parameters` have q_proj, k_proj and v_proj, and gate_proj where it gates its output.

    A recurrent layer of the base becomes one whose parameters are those of GDN.
    """
    if not hasattr(attention, "o_proj"):
        return _SeparateRecurrence(attention)
    return _Separate(attention) if hasattr(attention, "qkv_proj") or has_output_gate(attention) else attention


def has_output_gate(attention: Any) -> bool:
    """Whether the attention's q_proj also computes a gate of its output (Qwen3.5, Qwen3-Next)."""
    if not hasattr(attention, "q_proj"):
        return False
    return len(attention.q_proj.weight) == 2 * attention.config.num_attention_heads * attention.head_dim


def has_positions(config: Any, layer_idx: int) -> bool:
    """Whether the base's attention has rotary positions in this layer. Some layers of SmolLM3 have none."""
    return bool(getattr(stock_attention(config, layer_idx), "use_rope", True))


def attention_scale(config: Any, layer_idx: int) -> float:
    """The factor of the base's attention scores.

    HmfError if the base also caps them (Gemma 2), which attention over windows cannot.
    """
    attention = stock_attention(config, layer_idx)
    if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
        raise HmfError(
            f"config.json: attn_logit_softcapping: {cap}: SWA and B'MOJO-F layers cannot cap attention scores; use "
            "other layer types"
        )
    return attention.scaling


def norm_like(norm: nn.Module, eps: float) -> nn.Module:
    """A new norm of the width of the base's, and of its class where that adds one to its weight (Gemma)."""
    width = norm.weight.numel()
    return nn.RMSNorm(width, eps=eps) if norm_offset(norm) == 0 else type(norm)(width, eps)


def norm_offset(norm: nn.Module) -> float:
    """The constant that the norm adds to its weight: 1 for Gemma's norms, whose weights start at 0.

    It is read from an output, because accelerate's `init_empty_weights` creates parameters without values.
    """
    with torch.device("cpu"):
        zero, x = {"weight": torch.zeros(1)}, torch.ones(1)
        return torch.func.functional_call(type(norm)(1), zero, x).round().item()


def normalised(norm: nn.Module | None, y: torch.Tensor, head_dim: int) -> torch.Tensor:
    """y [..., H K] -> [..., H, K], normalised per head, or over all heads by a norm that is as wide (OLMo)."""
    if norm is not None and norm.weight.shape[0] != head_dim:
        return norm(y).unflatten(-1, (-1, head_dim))
    y = y.unflatten(-1, (-1, head_dim))
    return y if norm is None else norm(y)


def query_growth(config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The position-dependent factor of the base's queries: position_ids [B or 1, T] -> [B or 1, 1, T, 1], or None.

    Only Ministral 3 has one. There it grows with the logarithm of the position divided by the pre-training length.
    """
    if (grow := config.family.query_growth()) is None:
        return None
    rope = config.rope_parameters
    original = rope["original_max_position_embeddings"]
    return functools.partial(grow, beta=rope["llama_4_scaling_beta"], max_position_embeddings=original)


def with_query_scale(
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    position_ids: torch.Tensor | None,
    growth: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    """(cos, sin), or (cos, sin, factor) where `query_growth` gives a factor [B or 1, T, 1, 1]."""
    if growth is None:
        return position_embeddings
    if position_ids is None:
        raise ValueError("position_ids: the base scales its queries by position; pass position_ids")
    return (*position_embeddings, growth(position_ids).transpose(1, 2).to(position_embeddings[0]))


def without_positions(position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables that do not change queries and keys."""
    cos, sin = position_embeddings
    return torch.ones_like(cos), torch.zeros_like(sin)


def rotate_query(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """`rotate`, multiplied by the base's query factor if there is one; arguments as `with_query_scale` returns them."""
    return rotate(x, cos, sin) if factor is None else rotate(x, cos, sin) * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (arXiv 2104.09864) on the first R of K dims, i paired with i + R/2, in x's dtype.

    x [B, T, H, K]; cos, sin [B or 1, T, R]. R is K except in bases that rotate a part of each head.
    """
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = x.chunk(2, dim=-1)
    rotated = (x * cos[..., None, :] + torch.cat([-second, first], -1) * sin[..., None, :]).to(x.dtype)
    return torch.cat([rotated, rest], -1) if rest.shape[-1] else rotated
