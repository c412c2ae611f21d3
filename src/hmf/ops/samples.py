# SPDX-License-Identifier: Apache-2.0
"""Random arguments for every op, used by `hmf doctor`, `hmf bench ops` and tests.

A new op adds one generator to `SAMPLES`. Legend: B batch, T tokens, S sequences, H heads, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from . import dispatch
from .window import KeySet


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, or one row of packed documents with the given `lengths`, which then determine B and T."""

    batch: int = 1
    tokens: int = 1
    heads: int = 2
    head_dim: int = 64
    lengths: tuple[int, ...] | None = None
    with_state: bool = False

    @property
    def rows(self) -> tuple[int, int]:
        return (self.batch, self.tokens) if self.lengths is None else (1, sum(self.lengths))

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)


@dataclass(frozen=True)
class Sample:
    """Differentiable tensors by name, and a function that calls an implementation of the op with them.

    `tokens` have the model's dtype. `exact` (gates, states) are float32, or float64 if the tokens are float64.
    """

    tokens: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]
    call: Callable[[Callable, dict[str, torch.Tensor]], Any]  # (implementation, tensors) -> the op's result

    def tensors(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {name: x.to(device, dtype) for name, x in self.tokens.items()} | {
            name: x.to(device, wide) for name, x in self.exact.items()
        }


def sample(op: str, shape: Shape, seed: int = 0) -> Sample:
    """Arguments of `op`. The values of tokens are exact in bfloat16, so that all dtypes compute on the same values."""
    made = SAMPLES[op](shape, _Random(shape, seed))
    return Sample({name: x.bfloat16().double() for name, x in made.tokens.items()}, made.exact, made.call)


def flat(result: Any) -> list[torch.Tensor]:
    """The tensors of an op's result, in order: the output, then the states."""
    return [result] if torch.is_tensor(result) else [tensor for part in result for tensor in flat(part)]


class _Random:
    """Random tensors for one shape, drawn in float64 on the CPU, so that they are the same for every device."""

    def __init__(self, shape: Shape, seed: int):
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def token(self, heads: int | None = None, normalized: bool = False) -> torch.Tensor:
        """[B, T, H, D]"""
        x = self.normal(*self.shape.rows, heads or self.shape.heads, self.shape.head_dim)
        return F.normalize(x, dim=-1) if normalized else x

    def share(self) -> torch.Tensor:
        """[B, T, H] between 0 and 1."""
        return torch.rand(*self.shape.rows, self.shape.heads, generator=self.generator, dtype=torch.float64)

    def log_decay(self) -> torch.Tensor:
        """[B, T, H]. The memory of a head is a few tokens to hundreds of tokens, as in trained models."""
        reach = torch.logspace(0.5, 2.5, self.shape.heads, dtype=torch.float64)
        return -2 * self.share() / reach

    def state(self) -> torch.Tensor:
        """[S, H, D, D]"""
        size = self.shape.head_dim
        return self.normal(self.shape.sequences, self.shape.heads, size, size) / size**0.5

    def cu_seqlens(self) -> torch.Tensor | None:
        return None if self.shape.lengths is None else torch.tensor([0, *self.shape.lengths]).cumsum(0)


def _gdn(shape: Shape, draw: _Random, channels: bool = False) -> Sample:
    """channels: whether each channel of a head has its own decay, up to twice as fast or as slow as the head's."""
    cu_seqlens = draw.cu_seqlens()

    def call(function, x):
        return function(x["q"], x["k"], x["v"], x["g"], x["beta"], x.get("state"), _beside(cu_seqlens, x))

    tokens = {"q": draw.token(normalized=True), "k": draw.token(normalized=True), "v": draw.token()}
    exact = {"g": draw.log_decay(), "beta": draw.share()} | ({"state": draw.state()} if shape.with_state else {})
    if channels:
        exact["g"] = exact["g"][..., None] * 2 ** draw.token().clamp(-1, 1)
    return Sample(tokens, exact, call)


def _conv(shape: Shape, draw: _Random) -> Sample:
    """The channels of all heads, with weight and bias."""
    cu_seqlens, channels, size = draw.cu_seqlens(), shape.heads * shape.head_dim, 4

    def call(function, x):
        return function(x["x"], x["weight"], x["bias"], x.get("state"), _beside(cu_seqlens, x))

    made = {"x": draw.token().flatten(2)}
    if shape.with_state:
        made["state"] = draw.normal(shape.sequences, channels, size - 1)
    return Sample(made, {"weight": draw.normal(channels, 1, size), "bias": draw.normal(channels)}, call)


def _ssd(shape: Shape, draw: _Random) -> Sample:
    cu_seqlens, scale = draw.cu_seqlens(), shape.head_dim**-0.5

    def call(function, x):
        return function(x["q"], x["k"], x["v"], x["g"], x.get("state"), _beside(cu_seqlens, x))

    return Sample(
        {"q": draw.token() * scale, "k": draw.token(), "v": draw.token()},
        {"g": draw.log_decay()} | ({"state": draw.state()} if shape.with_state else {}),
        call,
    )


def _gka(shape: Shape, draw: _Random) -> Sample:
    cu_seqlens = draw.cu_seqlens()

    def call(function, x):
        state = (x["C"], x["U"]) if "C" in x else None
        return function(x["q"], x["k"], x["v"], x["g"], x["gk"], x["alpha"], state, _beside(cu_seqlens, x))

    exact = {"g": draw.log_decay(), "gk": draw.log_decay(), "alpha": draw.share()}
    if shape.with_state:
        factor = draw.state()
        exact |= {"C": factor @ factor.mT, "U": draw.state()}  # a covariance
    beta = draw.share()[..., None]
    return Sample(
        {"q": draw.token(normalized=True), "k": draw.token(normalized=True) * beta, "v": draw.token() * beta},
        exact,
        call,
    )


def _window(shape: Shape, draw: _Random) -> Sample:
    """B'MOJO-F's two sets. Two query heads share a key head if the number of query heads is even."""
    cu_seqlens, tokens = draw.cu_seqlens(), shape.rows[1]
    size, kv_heads = min(512, max(4, tokens // 4)), shape.heads // 2 if shape.heads % 2 == 0 else shape.heads
    windows = {"near": (0, size - 1), "far": (size, 2 * size - 1)}
    seen = (torch.arange(shape.sequences) + 1) * size if shape.with_state else None

    def call(function, x):
        sets = [
            KeySet(x[f"k {name}"], x[f"v {name}"], low, high, x.get(f"past k {name}"), x.get(f"past v {name}"))
            for name, (low, high) in windows.items()
        ]
        return function(x["q"], sets, shape.head_dim**-0.5, _beside(seen, x), _beside(cu_seqlens, x))

    made = {"q": draw.token()}
    for name, (_, high) in windows.items():
        made |= {f"k {name}": draw.token(kv_heads), f"v {name}": draw.token(kv_heads)}
        if shape.with_state:
            past = shape.sequences, high, kv_heads, shape.head_dim
            made |= {f"past k {name}": draw.normal(*past), f"past v {name}": draw.normal(*past)}
    return Sample(made, {}, call)


def _beside(x: torch.Tensor | None, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    return None if x is None else x.to(next(iter(tensors.values())).device)


SAMPLES: dict[str, Callable[[Shape, _Random], Sample]] = {
    "conv": _conv,
    "gdn": _gdn,
    "gka": _gka,
    "kda": functools.partial(_gdn, channels=True),
    "ssd": _ssd,
    "window": _window,
}


@dispatch.gradient_check
@functools.cache
def gradient_off(
    op: str, dtype: torch.dtype, device: str, heads: tuple[int, int] = dispatch.HEADS, version: str = "fast"
) -> str | None:
    """Compare the gradients of `op`'s fast and chunked versions on a small sample.

    Returns the reason why the fast gradients are wrong, in one line, or None.

    heads: number and size of the sample's heads. The check runs once in a process for each.

    fla tunes its kernels at their first use, once for each number and size of heads, whatever the number of tokens. The
    sample has the heads of the model, so that kernels are tuned once. It has 2,047 tokens on a GPU, because the choice
    for a hundred tokens would be a poor one for long rows. The check runs in a thread of its own: hooks on
    saved tensors belong to a thread, and activation checkpointing counts the tensors that a forward pass saves.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_gradient_off, op, dtype, _with_index(device), heads, version).result()


def _with_index(device: str) -> torch.device:
    """A new thread begins with GPU 0 as its current one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def _gradient_off(
    op: str, dtype: torch.dtype, device: torch.device, heads: tuple[int, int], version: str
) -> str | None:
    lengths = (2000, 47) if device.type == "cuda" else (70, 33)
    made, gradients = sample(op, Shape(heads=heads[0], head_dim=heads[1], lengths=lengths)), {}
    for name, compute in (("chunked", torch.float32), (version, dtype)):
        tensors = {argument: x.requires_grad_() for argument, x in made.tensors(compute, device).items()}
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            results = flat(made.call(dispatch.implementations(op)[name].function, tensors))
            gradients[name] = torch.autograd.grad(
                torch.stack([x.float().square().sum() for x in results]).sum(), list(tensors.values())
            )
    for name, exact, fast in zip(made.tensors(dtype), gradients["chunked"], gradients[version], strict=True):
        error = ((fast.float() - exact).norm() / exact.norm()).item()
        if not error < 0.05:  # rounding to bfloat16 gives less
            return f"the kernel's gradient of {name} has a relative error of {error:.2g} on this GPU; please report it"
    return None
