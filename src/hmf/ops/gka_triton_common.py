# SPDX-License-Identifier: Apache-2.0
"""What Gated KalmaNet's Triton kernels share: loads, numbers in parts, widths of tiles, weights of the steps."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .gka_solve import coefficients


@triton.jit
def load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def split(x):
    """Two bfloat16 tensors whose sum is x to 2^-17, the first of them x rounded (in integers: conversions are slow)."""
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


def tile_width(head_dim: int) -> int:
    """The least tile that holds `head_dim` and that a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one block may use, 0 on a CPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


@functools.cache
def step_weights(num_iter: int, ridge_strength: float, device: torch.device) -> tuple[float, torch.Tensor]:
    """What a step keeps, and the steps' weights [num_iter] (one more, so that there is always a tensor)."""
    _, keep, weights = coefficients(num_iter, ridge_strength)
    return keep, torch.tensor([*weights, 0.0], dtype=torch.float32, device=device)
