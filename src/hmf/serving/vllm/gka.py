# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet inside vLLM: the layer of `hmf.layers`, whose decode step on a GPU works in the pool of states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hmf.layers.base import States
from hmf.layers.gka import GatedKalmaNet

from .hosted import HostedMixer, states  # noqa: F401 (asked for beside `build`)
from .recurrent import Tensors, store


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer for the place of `attention`."""
    return GKAMixer(symbol, config, prefix)


class GKAMixer(HostedMixer):
    mixer: GatedKalmaNet

    def decode(self, inputs: Tensors, slots: torch.Tensor) -> torch.Tensor:
        hidden_states = inputs[0][:, None]
        if not hidden_states.is_cuda:
            return super().decode(inputs, slots)
        from hmf.ops import gka_triton

        new: States = {}
        pools, at = dict(zip(self.states, self.kv_cache, strict=True)), slots.long()
        covariance, recurrent = (pools.pop(name) for name in self.mixer.recurrent_states)
        before = {name: pool[at] for name, pool in pools.items()}  # of convolutions: small
        tensors = self.mixer.inputs(hidden_states, before, None, new)
        if gka_triton.unsupported(tensors[0], tensors[1]):
            return super().decode(inputs, slots)
        q, k, v, g, gk, alpha = (x if x is None else x[:, 0] for x in tensors)
        o, _ = gka_triton.step(
            q, k, v, g, gk, alpha, (covariance, recurrent), **self.mixer.solver, slots=slots, null_slot=NULL_BLOCK_ID
        )
        store(tuple(pools.values()), at, tuple(new[name] for name in pools))
        return self.mixer.output(o[:, None], hidden_states)[:, 0]
