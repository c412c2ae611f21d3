# SPDX-License-Identifier: Apache-2.0
"""Any mixer of `hmf.layers` inside vLLM, as it is.

A mixer's `mix` takes states and packed documents and gives new states: all that vLLM's batches need. So a layer type
is served from the day that it has a Hugging Face layer; one whose speed matters gets a file of its own, as GDN has.

Legend: N tokens of the batch, S sequences, T tokens a sequence, D model dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.utils import extract_layer_index

from hmf.layers.base import StateShape
from hmf.layers.registry import mixer_class

from .recurrent import RecurrentMixer, Tensors


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """The states of one request on one of `ranks` ranks: widest first, as each must be aligned to its own width."""
    found = mixer_class(symbol).state_shapes(config, ranks)
    return dict(sorted(found.items(), key=lambda item: item[1].kind != "count"))


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer for the place of `attention`."""
    return HostedMixer(symbol, config, prefix)


class HostedMixer(RecurrentMixer):
    def __init__(self, symbol: str, config: Any, prefix: str):
        super().__init__(symbol, states(symbol, config, 1), prefix)
        self.mixer = mixer_class(symbol)(config, extract_layer_index(prefix)).requires_grad_(False)
        self.rotary = config.family.class_named("RotaryEmbedding")(config)
        self.model_dim = config.hidden_size

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.model_dim,)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, None]:
        return (hidden_states, positions), None

    def recur(
        self, inputs: Tensors, states: Tensors | None, cu_seqlens: torch.Tensor | None
    ) -> tuple[torch.Tensor, Tensors]:
        hidden_states, positions = inputs
        before = None if states is None else dict(zip(self.states, states, strict=True))
        rotary = self.rotary(hidden_states, positions)
        mixed, after = self.mixer.mix(hidden_states, before, cu_seqlens, rotary)
        return mixed, tuple(after[name] for name in self.states)

    def finish(self, mixed: torch.Tensor, rest: None) -> torch.Tensor:
        return mixed

    def load(self, name: str, tensor: torch.Tensor) -> str:
        """Copy a published tensor, named within the mixer; returns the parameter's name within this module."""
        self.mixer.get_parameter(name).data.copy_(tensor)
        return f"mixer.{name}"
