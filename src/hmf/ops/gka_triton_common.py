# SPDX-License-Identifier: Apache-2.0
"""Shared by the Triton kernels of Gated KalmaNet and the gated delta rule: loads, splitting into two numbers, tile
widths, iteration weights."""

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
    """Two bfloat16 tensors whose sum is x to 2^-17; the first is x rounded (integers, as conversions are slow)."""
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def halves(x):
    """Two float16 tensors whose sum is x with a relative error of 2^-22, for |x| up to 65504."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


def tile_width(head_dim: int) -> int:
    """The smallest tile width that holds `head_dim` and that tensor cores support."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use; 0 on a CPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of the device's multiprocessors; 0 on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


@functools.cache
def step_weights(num_iter: int, ridge_strength: float, device: torch.device) -> tuple[float, torch.Tensor]:
    """The factor of z in an iteration, and the iterations' weights [num_iter + 1]; the last one is padding."""
    _, keep, weights = coefficients(num_iter, ridge_strength)
    return keep, torch.tensor([*weights, 0.0], dtype=torch.float32, device=device)
