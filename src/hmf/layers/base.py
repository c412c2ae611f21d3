# SPDX-License-Identifier: Apache-2.0
"""What every token mixer shares: padding and packing, its cache, its float32 parameters, its start from attention.

Legend: B batch, T tokens, S sequences (rows or packed documents), D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from hmf.config.layers import layer_options
from hmf.errors import HmfError

from .layout import PackedLayout

States = dict[str, torch.Tensor]


class StateShape(NamedTuple):
    """One state of one sequence at its largest.

    kind: "recurrent" (float32), "conv" and "window" (the model's dtype; a window's first dimension counts positions),
    or "count" (int64). reach: the positions of a window that one token reads; None: all of them.
    """

    shape: tuple[int, ...]
    kind: Literal["recurrent", "conv", "window", "count"]
    reach: int | None = None

    def dtype(
        self, model: torch.dtype, recurrent: torch.dtype = torch.float32, conv: torch.dtype | None = None
    ) -> torch.dtype:
        """As `Mixer.mix` returns it in a model of dtype `model`, or as a server keeps it that stores states in other
        dtypes."""
        return {"recurrent": recurrent, "conv": conv or model, "window": model, "count": torch.int64}[self.kind]

    def bytes(self, *dtypes: torch.dtype) -> int:
        """Bytes in the dtype that `dtype` gives for the same arguments."""
        return math.prod(self.shape) * self.dtype(*dtypes).itemsize


def split_heads(heads: int, ranks: int) -> int:
    """Heads on each of `ranks` tensor-parallel ranks; where there are fewer heads than ranks, ranks share one."""
    return max(1, heads // ranks)


def heads_fit(config: Any, ranks: int) -> bool:
    """Whether `ranks` tensor-parallel ranks hold equally many query and key/value heads, or share the latter evenly."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    return queries % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)


@dataclass
class Start:
    """Where each tensor of a mixer came from, and what became of each tensor of the attention it started from."""

    copied: dict[str, str] = field(default_factory=dict)  # tensor -> attention tensor
    derived: dict[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> attention tensors
    initialised: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)  # attention tensor -> why

    def under(self, prefix: str) -> Start:
        """The same report for a mixer that is the child `prefix` of another."""
        return Start(
            {f"{prefix}.{name}": source for name, source in self.copied.items()},
            {f"{prefix}.{name}": sources for name, sources in self.derived.items()},
            [f"{prefix}.{name}" for name in self.initialised],
            dict(self.unused),
        )

    def merge(self, other: Start) -> None:
        """Add another report on the same attention; a tensor that either one uses is used."""
        self.copied |= other.copied
        self.derived |= other.derived
        self.initialised += other.initialised
        self.unused = {name: why for name, why in (self.unused | other.unused).items() if name not in self.used()}

    def leave(self, given: Iterable[str], names: Iterable[str], why: str) -> None:
        """Account for those of `names` that the attention has and this mixer does not use."""
        self.unused |= {name: why for name in names if name in given and name not in self.used()}

    def used(self) -> set[str]:
        return set(self.copied.values()) | {name for names in self.derived.values() for name in names}

    def check(self, mixer: nn.Module, attention: nn.Module) -> None:
        """Every tensor on both sides is accounted for exactly once, or HmfError."""
        filled = [*self.copied, *self.derived, *self.initialised]
        have = dict(mixer.named_parameters()).keys()
        if left := sorted(have ^ set(filled)) or sorted(name for name in filled if filled.count(name) > 1):
            raise HmfError(f"{type(mixer).__name__}: tensors without one clear start: {', '.join(left)}")
        given = dict(attention.named_parameters()).keys()
        if left := sorted(given ^ (self.used() | self.unused.keys())):
            raise HmfError(f"{type(attention).__name__}: tensors neither used nor accounted for: {', '.join(left)}")


class Mixer(nn.Module):
    """A layer that replaces `self_attn` in a decoder layer: hidden_states in, mixed hidden_states out.

    A subclass implements `mix`, which knows nothing of padding, caches or parallelism, and `init_from_attention`.
    """

    symbol: ClassVar[str]
    # Parameters that a cast to bfloat16 or float16 leaves in float32: rounding them moves every decay.
    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.options = self.options_for(config)
        self.hidden_size = config.hidden_size
        self.layer_idx = layer_idx

    @classmethod
    def options_for(cls, config: Any) -> Any:
        """This kind's options in a hybrid config, with the base model's dimensions."""
        return layer_options(config, cls.symbol)

    def mix(
        self,
        hidden_states: torch.Tensor,
        states: States | None,
        cu_seqlens: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, ...] | None,
    ) -> tuple[torch.Tensor, States]:
        """One pass over whole tokens: no padding.

        hidden_states [B, T, D], or [1, N, D] with cu_seqlens [S+1]; states, each [S, ...], left by the same method on
        the tokens before, or None at the start; position_embeddings: what `positioned` gives for these tokens.
        Returns the output in hidden_states' shape and the states after the last token of each sequence.
        """
        raise NotImplementedError

    def positioned(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor], position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """What `mix` gets of positions, each [B, T, ...]: the rotary tables (cos, sin) [B, T, head_dim], and what
        else a mixer needs."""
        return position_embeddings

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: PackedLayout | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [B, T, D] -> ([B, T, D], None), in the place of a Hugging Face attention.

        layout says which tokens are real and where documents begin (None: all rows whole); past_key_values is a cache
        whose layer `layer_idx` is a `MixerCacheLayer`.
        """
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        states = cache.states if cache is not None and cache.is_initialized else None
        tables = None if position_embeddings is None else self.positioned(position_embeddings, position_ids)
        if layout is None:
            output, states = self.mix(hidden_states, states, None, tables)
        else:
            if tables is not None:
                tables = tuple(layout.pack(x) for x in tables)
            output, states = self.mix(layout.pack(hidden_states), states, layout.cu_seqlens, tables)
            output = layout.unpack(output)
        if cache is not None:
            cache.store(states, hidden_states.shape[1])
        return output, None

    def init_from_attention(self, attention: nn.Module, generator: torch.Generator, std: float) -> Start:
        """Fill every parameter from a trained attention (Stage 0); random ones from `generator`, matrices with `std`.

        Returns where each tensor came from.
        """
        raise NotImplementedError

    @classmethod
    def state_shapes(cls, config: Any, ranks: int = 1) -> dict[str, StateShape]:
        """The states that `mix` returns, by name and without S, on one of `ranks` tensor-parallel ranks."""
        raise NotImplementedError

    def sections(self, name: str) -> tuple[int, ...] | None:
        """Widths of the sections of parameter `name` that hold heads each, in order; None: it is one section."""
        return None

    def init_recurrence(self, generator: torch.Generator | None = None) -> None:
        """Fill the directly owned parameters (decay, step size); a mixer without any has nothing to do."""

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in self.float32_parameters if getattr(self, name, None) is not None}
        kept = {name: parameter.data for name, parameter in kept.items()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < 4 <= before.dtype.itemsize:
                parameter.data = before.to(parameter.device)
        return self


def init_decay(A_log: nn.Parameter, dt_bias: nn.Parameter, generator: torch.Generator | None = None) -> None:
    """Mamba's start (arXiv 2312.00752): A_log = log U(0, 16); softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    with torch.no_grad():
        shape, device = A_log.shape, A_log.device
        # uniform draws from [0, 1): keep the log finite
        uniform = torch.rand(shape, generator=generator).clamp_min(1e-6) * 16
        low, high = torch.tensor(1e-3).log(), torch.tensor(0.1).log()
        dt = (torch.rand(shape, generator=generator) * (high - low) + low).exp()
        A_log.copy_(uniform.log().to(device))
        dt_bias.copy_((dt + torch.log(-torch.expm1(-dt))).to(device))
