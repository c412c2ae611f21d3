# SPDX-License-Identifier: Apache-2.0
"""The base class of token mixers: padding and packing, cache, float32 parameters, and initialisation from attention.

Legend: B batch, T tokens, S sequences (rows or packed documents), D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hmf.config.layers import layer_options
from hmf.errors import HmfError

from .layout import PackedLayout

States = dict[str, torch.Tensor]


class StateShape(NamedTuple):
    """The largest shape of one state of one sequence.

    kind: "recurrent" (float32), "conv" and "window" (the model's dtype; a window's first dimension counts positions),
    or "count" (int64). reach: the number of a window's positions that one token reads; None is all of them.
    """

    shape: tuple[int, ...]
    kind: Literal["recurrent", "conv", "window", "count"]
    reach: int | None = None

    def dtype(
        self, model: torch.dtype, recurrent: torch.dtype = torch.float32, conv: torch.dtype | None = None
    ) -> torch.dtype:
        """The dtype in which `Mixer.mix` returns the state in a model of dtype `model`. A server may store recurrent
        and conv states in other dtypes."""
        return {"recurrent": recurrent, "conv": conv or model, "window": model, "count": torch.int64}[self.kind]

    def bytes(self, *dtypes: torch.dtype) -> int:
        """Bytes in the dtype that `dtype` gives for the same arguments."""
        return math.prod(self.shape) * self.dtype(*dtypes).itemsize


def split_heads(heads: int, ranks: int) -> int:
    """Heads on each of `ranks` tensor-parallel ranks. With fewer heads than ranks, several ranks hold the same head."""
    return max(1, heads // ranks)


def heads_fit(config: Any, ranks: int) -> bool:
    """Whether the query heads divide evenly over tensor-parallel ranks, and the key/value heads divide evenly or are
    shared by equally many ranks."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    return queries % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)


@dataclass
class Start:
    """How each tensor of a mixer was initialised, and whether each tensor of the original attention was used."""

    copied: dict[str, str] = field(default_factory=dict)  # tensor -> attention tensor
    derived: dict[str, tuple[str, ...]] = field(default_factory=dict)  # tensor -> attention tensors
    initialised: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)  # attention tensor -> reason

    def under(self, prefix: str) -> Start:
        """The same report for a mixer that is the child module `prefix` of another one."""
        return Start(
            {f"{prefix}.{name}": source for name, source in self.copied.items()},
            {f"{prefix}.{name}": sources for name, sources in self.derived.items()},
            [f"{prefix}.{name}" for name in self.initialised],
            dict(self.unused),
        )

    def merge(self, other: Start) -> None:
        """Add another report on the same attention. A tensor that either report uses counts as used."""
        self.copied |= other.copied
        self.derived |= other.derived
        self.initialised += other.initialised
        self.unused = {name: why for name, why in (self.unused | other.unused).items() if name not in self.used()}

    def mark_unused(self, attention_names: Iterable[str], names: Iterable[str], why: str) -> None:
        """Record those of `names` that are in `attention_names` and that this mixer does not use."""
        self.unused |= {name: why for name in names if name in attention_names and name not in self.used()}

    def used(self) -> set[str]:
        return set(self.copied.values()) | {name for names in self.derived.values() for name in names}

    def check(self, mixer: nn.Module, attention: nn.Module) -> None:
        """HmfError unless the report has every tensor of the mixer and of the attention exactly once."""
        reported = [*self.copied, *self.derived, *self.initialised]
        parameters = dict(mixer.named_parameters()).keys()
        if wrong := sorted(parameters ^ set(reported)) or sorted(x for x in reported if reported.count(x) > 1):
            raise HmfError(
                f"{type(mixer).__name__}: tensors that are not initialised, unknown or initialised twice: "
                f"{', '.join(wrong)}"
            )
        parameters = dict(attention.named_parameters()).keys()
        if wrong := sorted(parameters ^ (self.used() | self.unused.keys())):
            raise HmfError(
                f"{type(attention).__name__}: tensors that are unknown, or neither used nor reported as unused: "
                f"{', '.join(wrong)}"
            )


def require_loaded(x: torch.Tensor, **tensors: torch.Tensor) -> None:
    """HmfError for tensors that accelerate has offloaded, with which torch computes anything."""
    if not x.is_meta and (name := next((name for name, tensor in tensors.items() if tensor.is_meta), None)):
        raise HmfError(
            f"{name}: is offloaded, and this layer reads it without a call of its module; place the layer on a GPU, or "
            "the whole model on the CPU"
        )


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of each head, in float32 or wider: [..., H, K] -> the same shape. The weight has K or H K values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        shared = self.weight.shape == x.shape[-1:]
        weight = self.weight.to(x.dtype)
        y = F.rms_norm(x, x.shape[-1:], weight if shared else None, self.eps)
        return y if shared else y * weight.view(x.shape[-2:])


class Stateful(nn.Module):
    """A token mixer with states: one that replaces an attention, or a recurrent layer of the base's own (own.py).

    A subclass implements `mix`, which handles neither padding, nor caches, nor parallelism.
    """

    symbol: ClassVar[str]
    layer_idx: int
    # Parameters that stay in float32 when the model is cast to bfloat16 or float16: rounding them changes every decay.
    float32_parameters: ClassVar[tuple[str, ...]] = ()

    def mix(
        self,
        hidden_states: torch.Tensor,
        states: States | None,
        cu_seqlens: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, ...] | None,
    ) -> tuple[torch.Tensor, States]:
        """Mix tokens without padding.

        hidden_states [B, T, D], or [1, N, D] with cu_seqlens [S+1]; states, each [S, ...], as this method returned them
        for the tokens before, or None at the start; position_embeddings: the result of `positioned` for these tokens.
        Returns the output in the shape of hidden_states, and the states after the last token of each sequence.
        """
        raise NotImplementedError

    def positioned(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor], position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The position-dependent tensors that `mix` receives, each [B, T, ...]: the rotary tables (cos, sin)
        [B, T, head_dim], and further ones that a mixer needs."""
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
        """hidden_states [B, T, D] -> ([B, T, D], None), with the interface of a Hugging Face attention.

        layout: which tokens are real and where documents begin; None if all rows are whole sequences without padding.
        past_key_values: a cache whose layer `layer_idx` is a `MixerCacheLayer`.
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

    def filters(self, x: torch.Tensor, *names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the short convolutions `names`, which one op applies to x without a call of a module."""
        convs = [getattr(self, name) for name in names]
        for name, conv in zip(names, convs, strict=True):
            if hasattr(conv, "base_layer"):  # peft's, whose own tensors take effect in its forward alone
                raise HmfError(
                    f"{name}: an adapter has no effect on a short convolution; leave it out of target_modules and "
                    "target_parameters. modules_to_save trains the convolution itself"
                )
        require_loaded(x, **{name: conv.weight for name, conv in zip(names, convs, strict=True)})
        biases = [conv.bias for conv in convs if conv.bias is not None]
        return torch.cat([conv.weight for conv in convs]), torch.cat(biases) if biases else None

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in self.float32_parameters if getattr(self, name, None) is not None}
        kept = {name: parameter.data for name, parameter in kept.items()}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype.itemsize < 4 <= before.dtype.itemsize:
                parameter.data = before.to(parameter.device)
        return self


class Mixer(Stateful):
    """A layer that replaces the token mixer of a decoder layer: it takes and returns hidden_states.

    A subclass implements `mix` and `init_from_attention`. One that can also start from a recurrent layer of the base
    (`GDN>GKA` in a pattern) sets `starts_from_recurrence` and implements `init_from_recurrence`.
    """

    starts_from_recurrence: ClassVar[bool] = False

    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.options = self.options_for(config)
        self.hidden_size = config.hidden_size
        self.layer_idx = layer_idx

    @classmethod
    def options_for(cls, config: Any) -> Any:
        """The options of this layer type in a hybrid config, with the base model's dimensions."""
        return layer_options(config, cls.symbol)

    def init_from_attention(self, attention: nn.Module, generator: torch.Generator, std: float) -> Start:
        """Initialise every parameter from a trained attention (Stage 0).

        attention: its `named_parameters` have q_proj, k_proj and v_proj (see `hmf.layers.attention.separate`).
        Random values come from `generator`; random matrices have the standard deviation `std`. Returns the origin of
        each tensor.
        """
        raise NotImplementedError

    def init_from_recurrence(self, recurrence: Any, generator: torch.Generator, std: float) -> Start:
        """The same from a recurrent layer of the base, whose `named_parameters` are those of GDN (see `separate`)."""
        raise NotImplementedError

    @property
    def output_projection(self) -> nn.Linear:
        """The linear module that is applied last in `mix`; its output is the mixer's output."""
        return self.get_submodule("o_proj")

    @classmethod
    def state_shapes(cls, config: Any, ranks: int = 1) -> dict[str, StateShape]:
        """The states that `mix` returns, by name, without the dimension S, on one of `ranks` tensor-parallel ranks."""
        raise NotImplementedError

    def sections(self, name: str) -> tuple[int, ...] | None:
        """Widths of the sections of parameter `name`, in order; each section consists of heads. None: one section."""
        return None

    def init_recurrence(self, generator: torch.Generator | None = None) -> None:
        """Initialise the mixer's direct parameters, which belong to no submodule (decay, step size). Default: none."""


def wide_zeros(size: int) -> nn.Parameter:
    """A vector of zeros for `Stateful.float32_parameters`: float32, or float64 in a model of this dtype."""
    return nn.Parameter(torch.zeros(size, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


def init_decay(A_log: nn.Parameter, dt_bias: nn.Parameter, generator: torch.Generator | None = None) -> None:
    """Mamba's initialisation (arXiv 2312.00752): A_log = log U(0, 16); softplus(dt_bias) log-uniform in [1e-3, 0.1]."""
    with torch.no_grad():
        device = A_log.device
        # torch.rand may return 0, whose log is not finite
        uniform = torch.rand(A_log.shape, generator=generator).clamp_min(1e-6) * 16
        low, high = torch.tensor(1e-3).log(), torch.tensor(0.1).log()
        dt = (torch.rand(dt_bias.shape, generator=generator) * (high - low) + low).exp()
        A_log.copy_(uniform.log().to(device))
        dt_bias.copy_((dt + torch.log(-torch.expm1(-dt))).to(device))
