# SPDX-License-Identifier: Apache-2.0
"""The one place that chooses which implementation of an op runs.

Every op has a `reference` (the definition), a `chunked` version in plain PyTorch and, on CUDA, a `fast` one. The
environment variable HMF_OPS names one of the three for all ops, for debugging and for `hmf doctor`.

What is around an op, such as the other processes that hold parts of its sequence, is put there with `put_around`.
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

import torch

from hmf.errors import HmfError, unknown_name

VERSIONS = ("reference", "chunked", "fast")


@dataclass(frozen=True)
class Implementation:
    version: str
    function: Callable
    requires: str | None  # a package, imported only when the version is used


_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}


def implementation(op: str, version: str, requires: str | None = None):
    """Register the decorated function as `version` of `op`."""

    def register(function: Callable) -> Callable:
        _IMPLEMENTATIONS.setdefault(op, {})[version] = Implementation(version, function, requires)
        return function

    return register


# A kernel that was miscompiled once is not trusted unseen: (op, dtype, device) -> why not, or None. `samples` has it.
_GRADIENT_CHECK: list[Callable[[str, torch.dtype, str], str | None]] = []


def gradient_check(function: Callable[[str, torch.dtype, str], str | None]):
    """Register the decorated function as what compares a fast backward with the plain one before it is used."""
    _GRADIENT_CHECK.append(function)
    return function


_NOTHING: Mapping[str, Callable] = MappingProxyType({})
_AROUND: ContextVar[Mapping[str, Callable]] = ContextVar("around", default=_NOTHING)


def entry(op: str, recurrence: bool = False):
    """Mark the decorated function as the way into `op`: what has been put around `op` is called with it instead.

    recurrence: its products are those of states, float32 by definition; autocast is off in it and chooses no other.
    """

    def mark(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            if recurrence and torch.is_autocast_enabled(device := args[0].device.type):
                with torch.autocast(device, enabled=False):
                    return call(*args, **kwargs)
            surroundings = _AROUND.get()
            if not surroundings:
                return function(*args, **kwargs)
            if op not in surroundings:
                raise HmfError(f"{op}: sequence parallelism does not know this op; add it to hmf/parallel/mixing.py")
            put_around({})  # an op that calls another one means the plain one
            try:
                return surroundings[op](function, *args, **kwargs)
            finally:
                put_around(surroundings)

        return call

    return mark


def put_around(functions: Mapping[str, Callable]) -> None:
    """From now on, in this thread, a call of an `op`'s entry is `functions[op](entry, ...)`; {} ends that."""
    _AROUND.set(functions)


def implementations(op: str) -> dict[str, Implementation]:
    return dict(_IMPLEMENTATIONS[op])


def ops() -> list[str]:
    return sorted(_IMPLEMENTATIONS)


def choose(op: str, device_type: str, requires_grad: bool, dtype: torch.dtype) -> tuple[Implementation, str]:
    """The implementation that runs for such tensors, and why, in one line."""
    versions = _IMPLEMENTATIONS[op]
    if forced := os.environ.get("HMF_OPS"):
        if forced not in VERSIONS:
            raise HmfError(f"HMF_OPS: {unknown_name('version', forced, VERSIONS)}")
        if forced not in versions:
            raise HmfError(
                f"HMF_OPS={forced}: op {op!r} has only {', '.join(versions)}; unset HMF_OPS or name one of them"
            )
        return versions[forced], "named by HMF_OPS"
    reason = not_fast(op, device_type, requires_grad, dtype)
    return (versions["fast"], "CUDA tensors") if reason is None else (versions["chunked"], reason)


def not_fast(op: str, device_type: str, requires_grad: bool, dtype: torch.dtype) -> str | None:
    """Why such tensors do not get the fast version of `op`, in one line; None: they do. HMF_OPS is not asked."""
    fast = _IMPLEMENTATIONS[op].get("fast")
    if fast is None:
        return "the op has no GPU kernel"
    if device_type != "cuda":
        return f"no GPU kernel on {device_type}"
    if dtype == torch.float64:
        return "float64 tensors"
    if fast.requires and not _installed(fast.requires):
        return f"{fast.requires} is not installed (pip install 'hybrid-model-factory[train]')"
    return known_bad_backward(op, dtype) if requires_grad else None


def resolve(op: str, *tensors: torch.Tensor) -> Callable:
    """The function to call for `op` on these tensors (device and dtype of the first, gradients of any).

    A slow fallback on a GPU warns once.
    """
    sample = tensors[0]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    chosen, why = choose(op, sample.device.type, grad, sample.dtype)
    on_gpu = sample.device.type == "cuda" and sample.dtype != torch.float64
    if chosen.version == "chunked" and on_gpu and "fast" in _IMPLEMENTATIONS[op]:
        warn_once(f"{op}: running the plain PyTorch version on the GPU: {why}")
    return chosen.function


def known_bad_backward(op: str, dtype: torch.dtype) -> str | None:
    """Why the fast backward of `op` in `dtype` cannot run on this machine; None if it can.

    Where Triton miscompiles the one of fla's, `hmf.ops.fla_backend` takes its place, if fla is one that asks.
    """
    if op not in ("gdn", "ssd") or not (wrong := miscompiled()):
        return None
    if not (_installed("fla") and _installed("fla.backends")):
        return f"{wrong}, and fla is older than 0.6; pip install -U fla-core"
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return f"{wrong}; unset FLA_DISABLE_BACKEND_DISPATCH"
    return _GRADIENT_CHECK[-1](op, dtype, "cuda")


def miscompiled() -> str | None:
    """What is wrong with fla's backward kernel here: on Hopper, Triton 3.4 to 3.7.0 miscompiles the gradient of q, k
    and the decay (fla-org/flash-linear-attention#640). None: nothing."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return None
    import triton
    from packaging.version import Version

    if not Version("3.4") <= Version(triton.__version__) < Version("3.7.1"):
        return None
    return f"fla's backward is wrong on Hopper with Triton {triton.__version__}"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """States and sums are float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
