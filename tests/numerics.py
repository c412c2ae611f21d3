# SPDX-License-Identifier: Apache-2.0
"""The one rule for comparing rounded numbers: what is allowed follows from what rounding does, never from one machine.

Two correct float32 computations of one thing differ, since every processor and number of threads adds up in an order of
its own, and some layers (GKA's solver) multiply that rounding by thousands. A constant tolerance is therefore too tight
on one machine or too wide to find an error. Two ways avoid both:

1. Compare with float64. `assert_near(found, exact, plain)` allows `FACTOR` times the error that the plain computation
   in the same precision has against the same float64 answer. `plain` is the reference or the Hugging Face model in
   float32: whatever multiplies rounding multiplies it there too, and an error of another kind stays visible.
2. Compare in float64. `assert_same(found, exact)` allows a part in 10^9: thousands of times the rounding of float64,
   even where a layer multiplies it, and far less than any wrong computation is off by. `in_float64()` keeps a float64
   model from rounding to float32 on the way, as norms and rotary tables of transformers do.

With HMF_TEST_ERRORS set to a file, every comparison appends a line of JSON to it: test, error, bound and their ratio.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

FACTOR = 10  # between two orders of the same sums
MEAN_FACTOR = 6  # where means are compared, which vary less
FLOOR = 8  # roundings of the largest number: for where `plain` happens to be exact
GOLDEN = 500  # of a stored figure
SAME = 1e-9  # of the largest number of a tensor
SMALL = 1e-3  # or of this, where all numbers are smaller


def _tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a nest of tuples, lists and dicts (in the order of their keys), in order."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    parts = [result[key] for key in sorted(result)] if isinstance(result, dict) else result
    return [tensor for part in parts for tensor in _tensors(part)]


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference between two tensors of one shape, NaN where one of them is not finite."""
    assert found.shape == exact.shape, f"shapes {tuple(found.shape)} and {tuple(exact.shape)}"
    return (found.double().cpu() - exact.double().cpu()).abs().max().item() if exact.numel() else 0.0


def bound(exact: torch.Tensor, error: float, factor: float = FACTOR) -> float:
    """`factor` times the larger of the plain computation's `error` and `FLOOR` roundings of float32."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return factor * max(error, FLOOR * torch.finfo(torch.float32).eps * largest)


def check(error: float, allowed: float, what: str = "") -> None:
    """Fail where `error` is above `allowed` or not a number; every comparison of rounded numbers ends here."""
    if path := os.environ.get("HMF_TEST_ERRORS"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        ratio = error / allowed if allowed else float(error > 0)
        with open(path, "a") as file:
            entry = {"test": test, "what": what, "error": error, "bound": allowed, "ratio": ratio}
            file.write(json.dumps(entry) + "\n")
    assert error <= allowed, f"{what or 'result'}: off by {error:.3g}, allowed are {allowed:.3g}"


def assert_near(found: Any, exact: Any, plain: Any, what: str = "") -> None:
    """`found` differs from the float64 `exact` by at most `factor` times what `plain` does; nests of equal structure.

    Every tensor has a bound of its own.
    """
    triples = zip(_tensors(found), _tensors(exact), _tensors(plain), strict=True)
    for number, (x, truth, reference) in enumerate(triples):
        check(off(x, truth), bound(truth, off(reference, truth)), f"{what} [{number}]".strip())


def assert_mean_near(found: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what: str = "mean") -> None:
    """For roundings so coarse that the largest error is a matter of luck: bfloat16 and eight bits."""
    error, usual = ((x.double() - exact.double()).abs().mean().item() for x in (found, plain))
    check(error, MEAN_FACTOR * usual, what)


def assert_same(found: Any, exact: Any, tolerance: float = SAME, what: str = "") -> None:
    """Two float64 results are the same but for rounding: within `tolerance` of each tensor's largest number."""
    for number, (x, truth) in enumerate(zip(_tensors(found), _tensors(exact), strict=True)):
        assert x.shape == truth.shape and x.dtype == truth.dtype, f"{what} [{number}]: {x.dtype} and {truth.dtype}"
        scale = max(truth.abs().max().item(), SMALL) if truth.numel() else 1.0
        check(off(x, truth) / scale, tolerance, f"{what} [{number}]".strip())


def assert_golden(found: Any, stored: Sequence[float], what: str = "losses") -> None:
    """Figures of a short run from a fixed seed are the stored ones, to a part in GOLDEN.

    For training, where no reference gives the answer: steps multiply rounding, so this is wider than the other rules,
    and still far less than what another loss, schedule, order of rows or start would change.
    """
    found = [float(x) for x in found]
    assert len(found) == len(stored)
    for number, (x, wanted) in enumerate(zip(found, stored, strict=True)):
        check(abs(x - wanted), abs(wanted) / GOLDEN, f"{what} [{number}] of {found}")


def widened(model: Any) -> Any:
    """A float64 copy of a Hugging Face model, whose experts run one by one: their fused product knows no float64."""
    wide = copy.deepcopy(model).double()
    wide.config._experts_implementation = "eager"
    return wide


def nudged(model: Any, count: int = 3) -> list[Any]:
    """Copies of a model whose weights are off by about a rounding of float32 each: other draws of its rounding errors.

    One run may be near float64 by luck, most of all where the errors of a few numbers are multiplied.
    """
    copies = [copy.deepcopy(model) for _ in range(count)]
    for seed, other in enumerate(copies):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in other.parameters():
                weight.mul_(1 + 2**-24 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return copies


def nudged_checkpoint(folder: Path, other: Path) -> Path:
    """The same of the checkpoint in `folder`, at `other`: what is trained from there shows what rounding does."""
    shutil.copytree(folder, other)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    moved = {name: x * (1 + 2**-24 * torch.randn(x.shape, generator=generator)) for name, x in tensors.items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    return other


class in_float64(TorchFunctionMode):
    """Within it, whatever asks for float32 gets float64: the norms and rotary tables of a float64 model stay exact."""

    def __enter__(self):
        self.before = torch.get_default_dtype()  # what a quotient of integers becomes
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exception):
        torch.set_default_dtype(self.before)
        return super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return function(*args, **kwargs)
