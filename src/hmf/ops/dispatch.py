# SPDX-License-Identifier: Apache-2.0
"""The choice of the implementation that runs an op. No other module makes this choice.

Every op has a `reference` (the definition), a `chunked` version in plain PyTorch and, on CUDA, a `fast` one. An op may
have a further version with GPU kernels, which is preferred to `fast` for the inputs that it supports. The environment
variable HMF_OPS selects a version for all ops, for debugging and for `hmf doctor`. An op that lacks one of the three
raises HmfError. Where an op lacks a further version, or that does not support the inputs, the op runs as without
HMF_OPS.

Sequence parallelism and the composition of caches wrap ops with `set_wrappers`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from hmf.errors import HmfError, unknown_name

VERSIONS = ("reference", "chunked", "fast")


@dataclass(frozen=True)
class Implementation:
    version: str
    function: Callable
    requires: str | None  # a package, imported only when the version is used
    # (dtype of the tokens, head_dim) -> the reason why the kernels cannot run on the current GPU, or None
    unsupported: Callable[[torch.dtype, int], str | None] = lambda dtype, head_dim: None


_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def implementation(op: str, version: str, requires: str | None = None, **limits: Any):
    """Register the decorated function as `version` of `op`. limits: further fields of `Implementation`."""

    def register(function: Callable) -> Callable:
        _IMPLEMENTATIONS.setdefault(op, {})[version] = Implementation(version, function, requires, **limits)
        return function

    return register


# (op, dtype, device, (heads, head_dim), version or "fast") -> the reason why that backward must not be used, or None.
# Some Triton releases miscompile it, so it is checked before it is used. `hmf.ops.samples` registers the check.
GradientCheck = Callable[..., str | None]
_GRADIENT_CHECK: list[GradientCheck] = []
HEADS = (2, 64)  # number and size of the heads of a check that is not for a certain model


def gradient_check(function: GradientCheck):
    """Register the decorated function, which compares a fast backward with the chunked one before it is used."""
    _GRADIENT_CHECK.append(function)
    return function


_NO_WRAPPERS: Mapping[str, Callable] = MappingProxyType({})
_WRAPPERS: ContextVar[Mapping[str, Callable]] = ContextVar("wrappers", default=_NO_WRAPPERS)


def entry(op: str, recurrence: bool = False):
    """Mark the decorated function as the entry of `op`. If a wrapper of `op` is set, it is called with the entry.

    recurrence: the op computes states, which are float32 by definition, so autocast is disabled inside it.
    """

    def mark(function: Callable) -> Callable:
        @torch.compiler.disable  # a compiled layer calls the op, which has kernels of its own, as it is
        @functools.wraps(function)
        def call(*args, **kwargs):
            if recurrence and torch.is_autocast_enabled(device := args[0].device.type):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
            wrappers = _WRAPPERS.get()
            if not wrappers:
                return function(*args, **kwargs)
            if op not in wrappers:
                raise HmfError(
                    f"{op}: this op has no wrapper; add one in hmf/parallel/mixing.py for sequence parallelism, or in "
                    "hmf/evaluation/compose.py for the composition of caches"
                )
            set_wrappers({})  # a wrapped op calls other ops without their wrappers
            try:
                return wrappers[op](function, *args, **kwargs)
            finally:
                set_wrappers(wrappers)

        return call

    return mark


class _Once(torch.autograd.Function):
    """The first `count` tensors, as outputs of all of them, whose gradients cannot be computed."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        raise HmfError("create_graph: the ops of recurrent layers have first derivatives only")


class _Unpacked:
    """The context of an autograd function whose saved tensors are unpacked once, as gradient checkpointing demands."""

    def __init__(self, ctx: Any):
        self.ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)


def backward(function: Callable) -> Callable:
    """Mark the decorated backward of an op's autograd function: it runs once and, like `entry`, without autocast.

    torch's `once_differentiable` raises no error in `torch.autograd.grad`, which leaves its node out.
    """

    @functools.wraps(function)
    def call(ctx: Any, *grads: torch.Tensor):
        makes_graph = torch.is_grad_enabled()  # of the gradients
        ctx = _Unpacked(ctx) if makes_graph else ctx
        with torch.no_grad(), torch.autocast(grads[0].device.type, enabled=False):
            outputs = function(ctx, *grads)
        if not makes_graph:
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        values = [x for x in outputs if x is not None]
        marked = iter(_Once.apply(len(values), *values, *grads, *(x for x in ctx.saved_tensors if x is not None)))
        return tuple(None if x is None else next(marked) for x in outputs)

    return call


def set_wrappers(wrappers: Mapping[str, Callable]) -> None:
    """In the current context (`contextvars`), a call of the entry of `op` becomes `wrappers[op](entry, ...)`.

    {} removes all wrappers.
    """
    _WRAPPERS.set(wrappers)


def implementations(op: str) -> dict[str, Implementation]:
    return dict(_IMPLEMENTATIONS[op])


def ops() -> list[str]:
    return sorted(_IMPLEMENTATIONS)


def all_versions() -> list[str]:
    """`VERSIONS`, then those that only some ops have."""
    return list(dict.fromkeys([*VERSIONS, *(version for op in ops() for version in _IMPLEMENTATIONS[op])]))


def choose(
    op: str, device_type: str, requires_grad: bool, dtype: torch.dtype, heads: tuple[int, int] = HEADS
) -> tuple[Implementation, str]:
    """The implementation that runs for tensors of this device and dtype, and the reason in one line.

    heads: number and size of the heads, with which a recurrence's backward is checked on some GPUs.
    """
    versions, reason = _IMPLEMENTATIONS[op], None
    if forced := os.environ.get("HMF_OPS"):
        if forced not in (known := all_versions()):
            raise HmfError(f"HMF_OPS: {unknown_name('version', forced, known)}")
        if forced not in VERSIONS:
            if forced in versions and not_fast(op, device_type, requires_grad, dtype, heads, forced) is None:
                return versions[forced], "selected by HMF_OPS"
        elif forced not in versions:
            raise HmfError(
                f"HMF_OPS={forced}: op {op!r} has only {', '.join(versions)}; unset HMF_OPS or select one of them"
            )
        else:
            return versions[forced], "selected by HMF_OPS"
    for version in (*(name for name in versions if name not in VERSIONS), "fast"):
        reason = not_fast(op, device_type, requires_grad, dtype, heads, version)
        if reason is None:
            return versions[version], "CUDA tensors"
    assert reason is not None
    return versions["chunked"], reason


def not_fast(
    op: str,
    device_type: str,
    requires_grad: bool,
    dtype: torch.dtype,
    heads: tuple[int, int] = HEADS,
    version: str = "fast",
) -> str | None:
    """The reason why `version` of `op`, which has GPU kernels, cannot run for such tensors, in one line, or None.

    HMF_OPS is ignored.
    """
    fast = _IMPLEMENTATIONS[op].get(version)
    if fast is None:
        return "the op has no GPU kernel"
    if device_type != "cuda":
        return f"no GPU kernel on {device_type}"
    if dtype == torch.float64:
        return "float64 tensors"
    if fast.requires and not installed(fast.requires):
        return f"{fast.requires} is not installed (pip install 'hybrid-model-factory[train]')"
    if reason := fast.unsupported(dtype, heads[1]):
        return reason
    if not requires_grad:
        return None
    if version != "fast":
        return _GRADIENT_CHECK[-1](op, dtype, "cuda", heads, version)
    return known_bad_backward(op, dtype, heads)


def resolve(op: str, *tensors: torch.Tensor) -> Callable:
    """The function to call for `op` on these tensors. The first gives device and dtype; any may require gradients.

    Falling back to the chunked version on a GPU warns once.
    """
    sample = tensors[0]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    # Of a recurrence, whose first tensors are [B, T, H, K] and [B, T, H, V].
    heads = (sample.shape[-2], max(x.shape[-1] for x in tensors if x.dim() == sample.dim()))
    chosen, why = choose(op, sample.device.type, grad, sample.dtype, heads)
    on_gpu = sample.device.type == "cuda" and sample.dtype != torch.float64
    if chosen.version == "chunked" and on_gpu and "fast" in _IMPLEMENTATIONS[op]:
        warn_once(f"{op}: running the plain PyTorch version on the GPU: {why}")
    return chosen.function


def known_bad_backward(op: str, dtype: torch.dtype, heads: tuple[int, int] = HEADS) -> str | None:
    """The reason why the fast backward of `op` in `dtype` cannot be used on this machine, or None.

    Where Triton miscompiles fla's kernel, `hmf.ops.fla_backend` replaces it. This needs an fla that has backends. KDA's
    backward has kernels of its own, which are checked there too.
    """
    if op not in ("gdn", "kda", "ssd") or not (wrong := miscompiled()):
        return None
    if op == "kda":
        return _GRADIENT_CHECK[-1](op, dtype, "cuda", heads)
    if not (installed("fla") and installed("fla.backends")):
        return f"{wrong}, and fla is older than 0.6; pip install -U fla-core"
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return f"{wrong}; unset FLA_DISABLE_BACKEND_DISPATCH"
    return _GRADIENT_CHECK[-1](op, dtype, "cuda", heads)


def miscompiled() -> str | None:
    """The reason why fla's own backward kernel is wrong on this machine, or None.

    On Hopper, Triton 3.4 to 3.7.0 miscompiles the gradient of q, k and the decay
    (fla-org/flash-linear-attention#640).
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    import triton
    from packaging.version import Version

    if not Version("3.4") <= Version(triton.__version__) < Version("3.7.1"):
        return None
    return f"fla's backward is wrong on Hopper with Triton {triton.__version__}"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of states and sums: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
