# SPDX-License-Identifier: Apache-2.0
"""What recurrent layers share: modules of parameters, with tensor-parallel loading by heads, and vLLM's convolution.

Legend: N tokens of the batch, H heads, D head_dim, C channels, W conv_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn

from hmf.layers.base import split_heads

from .backends import RecurrentMetadata


class ShortConvWeights(nn.Module):
    """Weights of the short convolutions of several streams, concatenated over channels.

    `heads` names the streams, in order, with their heads over all ranks. A stream with fewer heads than ranks is
    replicated as vLLM's `QKVParallelLinear` does. Checkpoint tensors [heads * D, 1, W] come with the stream's name
    as their `shard_id` (the weights mapper gives it).
    """

    def __init__(self, heads: Mapping[str, int], head_dim: int, conv_size: int, bias: bool):
        super().__init__()
        self.rank, self.tp_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.heads, self.head_dim = dict(heads), head_dim
        self.local = {stream: split_heads(count, self.tp_size) * head_dim for stream, count in heads.items()}
        channels = sum(self.local.values())
        self.weight = nn.Parameter(torch.empty(channels, 1, conv_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False) if bias else None

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        for name, loaded in weights:
            stream = loaded.shard_id
            replicas = max(1, self.tp_size // self.heads[stream])
            size, names = self.local[stream], list(self.local)
            begin = sum(self.local[before] for before in names[: names.index(stream)])
            source = loaded.narrow(0, self.rank // replicas * size, size)
            getattr(self, name).data[begin : begin + size].copy_(source)
            yield name


class NormWeight(nn.Module):
    """The weight [D] of a per-head RMSNorm."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim), requires_grad=False)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pool: torch.Tensor,
    metadata: RecurrentMetadata,
) -> torch.Tensor:
    """The short convolution and SiLU of the prefills' tokens x [N, C] on a GPU, by vLLM's kernel; returns [N, C].

    weight [C, 1, W]; bias [C] or None. pool [slots, C, W - 1] holds the states, which are updated in place.
    """
    return causal_conv1d_fn(
        x.T,
        weight.squeeze(1),
        bias,
        pool,
        metadata.query_start_loc_p,
        cache_indices=metadata.state_indices_tensor_p,
        has_initial_state=metadata.has_initial_states_p,
        activation="silu",
        metadata=metadata,
    ).T


def joined(parameters: list[nn.Parameter]) -> torch.Tensor:
    """One tensor with the concatenated parameters, which become views of it."""
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole
