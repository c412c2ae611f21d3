# SPDX-License-Identifier: Apache-2.0
"""Runs any mixer of `hmf.layers` inside vLLM without changes.

A mixer's `mix` maps states and packed documents to outputs and new states, which is sufficient for vLLM's batches.
Every layer type with a Hugging Face layer can therefore be served. Faster implementations are in separate
files: all of GDN and KDA, and the work on a GPU's states of GKA, Mamba2 and B'MOJO-F.

Under tensor parallelism each rank builds a mixer with its share of the heads and loads this share of every tensor. The
outputs of the ranks' output projections are added.

Legend: N tokens of the batch, S sequences, T tokens per sequence, D model dim.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from hmf.config.layers import base_head_dim
from hmf.layers.base import StateShape, split_heads
from hmf.layers.registry import mixer_class

from .backends import RecurrentMetadataBuilder
from .recurrent import RecurrentMixer, Tensors

BUILDER = RecurrentMetadataBuilder


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """The states of one request on one of `ranks` ranks, widest dtype first so that each state is aligned.

    A state that is one number has an axis here, because vLLM treats a pool with one axis as a single state when it
    copies blocks.
    """
    shapes = mixer_class(symbol).state_shapes(config, ranks)
    shapes = {name: state._replace(shape=state.shape or (1,)) for name, state in shapes.items()}
    return dict(sorted(shapes.items(), key=lambda item: item[1].kind != "count"))


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer that replaces `attention`."""
    return HostedMixer(symbol, config, prefix)


def rank_config(config: Any, ranks: int) -> Any:
    """`config` with the heads of one of `ranks` ranks; its `whole` is `config`."""
    share = copy.copy(config)
    share.head_dim = base_head_dim(config)
    share.num_attention_heads = config.num_attention_heads // ranks
    share.num_key_value_heads = split_heads(config.num_key_value_heads, ranks)
    for name in ("linear_num_key_heads", "linear_num_value_heads"):  # of recurrent layers that the base has of its own
        if hasattr(config, name):
            setattr(share, name, getattr(config, name) // ranks)
    share.whole = config
    return share


class HostedMixer(RecurrentMixer):
    mixer: Any

    def __init__(self, symbol: str, config: Any, prefix: str):
        self.rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        super().__init__(symbol, self.states_of(symbol, config, self.ranks), prefix)
        layer, cls = extract_layer_index(prefix), self.class_of(symbol, config)
        shapes = cls.state_shapes(config, self.ranks)
        self.numbers = {name for name, state in shapes.items() if not state.shape}
        self.mixer = cls(rank_config(config, self.ranks), layer).requires_grad_(False)
        with torch.device("meta"):
            whole = cls(config, layer)
        self._whole_sections = whole.sections
        for name, linear in whole.named_modules():
            if isinstance(linear, nn.Linear) and linear.in_features != self.mixer.get_submodule(name).in_features:
                summed = RowParallelLinear(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    return_bias=False,
                    prefix=f"{prefix}.{name}",
                )
                self.mixer.set_submodule(name, summed)
        self.rotary = config.family.class_named("RotaryEmbedding")(config)
        self.position_axes = config.family.position_axes()
        self.model_dim = config.hidden_size

    states_of = staticmethod(states)

    @staticmethod
    def class_of(symbol: str, config: Any) -> Any:
        """The class of the hosted mixer."""
        return mixer_class(symbol)

    def tables(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's rotary tables (cos, sin) [S, T, head_dim] in the dtype of x; positions [S, T]."""
        if self.position_axes > 1:
            positions = positions.expand(self.position_axes, *positions.shape)
        return self.rotary(x, positions)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.model_dim,)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, None]:
        return (hidden_states, positions), None

    def recur(self, inputs: Tensors, states: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        hidden_states, positions = inputs
        named = zip(self.states, states, strict=True)
        before = {name: x[:, 0] if name in self.numbers else x for name, x in named}
        rotary = self.mixer.positioned(self.tables(hidden_states, positions), positions)
        mixed, after = self.mixer.mix(hidden_states, before, cu_seqlens, rotary)
        return mixed, tuple(after[name][:, None] if name in self.numbers else after[name] for name in self.states)

    def finish(self, mixed: torch.Tensor, rest: None) -> torch.Tensor:
        return mixed

    def load(self, name: str, tensor: torch.Tensor) -> str | None:
        """Copy this rank's share of a published tensor, named within the mixer.

        Returns the parameter's name within this module, or None for a tensor that vLLM loads itself.
        """
        parameter = self.mixer.get_parameter(name)
        sections = self._whole_sections(name), self.mixer.sections(name)
        parameter.data.copy_(share(tensor, parameter.shape, *sections, self.rank, self.ranks))
        return f"mixer.{name}"


def share(
    tensor: torch.Tensor,
    shape: torch.Size,
    wholes: tuple[int, ...] | None,
    sizes: tuple[int, ...] | None,
    rank: int,
    ranks: int,
) -> torch.Tensor:
    """The part of a whole tensor that belongs to `rank`, of the given `shape`: the rank's heads of each section.

    wholes, sizes: `Mixer.sections` of the whole tensor and of the part. With more ranks than heads, ranks share a head.
    """
    axis = next((axis for axis, size in enumerate(shape) if size != tensor.shape[axis]), None)
    if axis is None:
        return tensor
    wholes, sizes = wholes or (tensor.shape[axis],), sizes or (shape[axis],)
    parts = [
        section.narrow(axis, rank * (whole // size) // ranks * size, size)
        for section, whole, size in zip(tensor.split(wholes, axis), wholes, sizes, strict=True)
    ]
    return torch.cat(parts, axis)
