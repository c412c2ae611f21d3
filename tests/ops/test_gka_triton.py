# SPDX-License-Identifier: Apache-2.0
"""Gated KalmaNet's Triton kernels: interpreted on a CPU, and what tests/ops/test_gpu.py leaves out on a GPU."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from hmf.bench import doctor
from hmf.ops import gka
from hmf.ops.samples import Shape, sample
from tests.ops.interpreted import POOLS, changed, check_pool, scan_errors, shared_errors, with_small_keys

ROWS = Shape(batch=2, tokens=150, heads=2, head_dim=64)
PACKED = Shape(lengths=(130, 0, 1, 20), heads=2, head_dim=128, with_state=True)
ODD = Shape(lengths=(70, 3), heads=2, head_dim=80, with_state=True)


@pytest.fixture(autouse=True)
def _one_variant():
    """Of what goes with them, the kernels of linear attention."""
    if not torch.cuda.is_available():
        yield
    else:
        with doctor.one_variant():
            yield


def run(program: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *program], env=os.environ | environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_interpreted_kernels_are_the_reference():
    pytest.importorskip("triton")
    assert "0 failures" in run(["-m", "tests.ops.interpreted"], TRITON_INTERPRET="1", HMF_OPS="")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", doctor.TOLERANCES["cuda"], ids=str)
@pytest.mark.parametrize(
    ("shape", "options", "changes"),
    [
        (ROWS, {"num_iter": 0}, {}),
        (ROWS, {"num_iter": 1, "rescale": False}, {"alpha": False}),
        (PACKED, {"num_iter": 10, "ridge_strength": 0.05}, {"symmetric": False}),
        (PACKED, {"bp_lambda": False}, {"value_dim": 64}),
        (ODD, {}, {"value_dim": 48}),
    ],
    ids=["no steps", "one step", "ten steps", "lambda without gradient", "odd dimensions"],
)
def test_options(shape, options, changes, dtype):
    made = changed(sample("gka", shape), **changes)
    reference, fast = (functools.partial(version, **options) for version in (gka.reference, gka.fast))
    expected = doctor.evaluate(reference, made, torch.float64, "cpu", True)
    found = doctor.evaluate(fast, made, dtype, "cuda", True)
    errors = {name: doctor.relative_error(value, expected[name]) for name, value in found.items()}
    assert max(errors.values()) <= doctor.TOLERANCES["cuda"][dtype], errors


@pytest.mark.gpu
def test_float32_products_are_better_than_tf32s():
    """Only the solve: linear attention's own kernel may round its factors to TF32."""
    made = sample("gka", PACKED)
    x = made.tensors(torch.float32, "cuda")
    o, _ = made.call(gka.chunked, x)
    with torch.no_grad():
        found, _ = made.call(gka.fast, x)
    assert doctor.relative_error(found.double(), o.double()) <= 1e-3


@pytest.mark.gpu
def test_groups_do_not_change_the_gradients(monkeypatch):
    from hmf.ops import gka_triton

    made, run = sample("gka", PACKED), functools.partial(gka.fast, num_iter=10)  # more steps have the exact gradients
    together = doctor.evaluate(run, made, torch.bfloat16, "cuda", True)
    monkeypatch.setattr(gka_triton, "STORED", 2 * 2 * 10 * 64 * 128 * 4)  # two chunks at a time
    apart = doctor.evaluate(run, made, torch.bfloat16, "cuda", True)
    assert all(doctor.relative_error(apart[name], together[name]) <= 1e-5 for name in together)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "pool_dtype"), POOLS, ids=str)
def test_step_in_a_pool(dtype, pool_dtype):
    check_pool("cuda", dtype, pool_dtype)


@pytest.mark.gpu
def test_heads_that_share_keys():
    errors = shared_errors("cuda")
    assert max(errors.values()) <= 4e-3, errors


@pytest.mark.gpu
def test_scan_of_states():
    errors = scan_errors("cuda")
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.gpu
@pytest.mark.parametrize("small", [False, True], ids=["", "small first keys"])
@pytest.mark.parametrize("shape", [ROWS, PACKED, ODD], ids=["rows", "packed", "odd dimensions"])
def test_prefill_is_nearer_than_its_output_rounds(shape, small):
    """Without gradients in bfloat16: the states lose nothing, and the output little beside its own rounding."""
    made = sample("gka", shape)
    made = with_small_keys(made) if small else made
    expected = doctor.evaluate(gka.reference, made, torch.float64, "cpu", False)
    found = doctor.evaluate(gka.fast, made, torch.bfloat16, "cuda", False)
    errors = {name: doctor.relative_error(value, expected[name]) for name, value in found.items()}
    assert errors.pop("output") <= 4e-3
    assert max(errors.values()) <= 1e-4, errors


@pytest.mark.gpu
def test_heads_too_wide_for_the_kernels_run_without_them():
    made = sample("gka", Shape(tokens=70, heads=1, head_dim=160))
    with pytest.warns(RuntimeWarning, match="head_dim 160"):
        found = doctor.evaluate(gka.fast, made, torch.float32, "cuda", False)
    expected = doctor.evaluate(gka.reference, made, torch.float64, "cpu", False)
    assert doctor.relative_error(found["output"], expected["output"]) <= 5e-3


COLD = """
import time, torch
from hmf.bench import doctor
from hmf.ops import gka
from hmf.ops.samples import Shape, sample
made = sample("gka", Shape(tokens=64, heads=1, head_dim=128))
doctor.evaluate(gka.chunked, made, torch.bfloat16, "cuda", True)
start = time.perf_counter()
with doctor.one_variant():
    doctor.evaluate(gka.fast, made, torch.bfloat16, "cuda", True)
    doctor.evaluate(gka.fast, made, torch.bfloat16, "cuda", False)
print(time.perf_counter() - start)
"""


@pytest.mark.gpu
def test_kernels_compile_in_seconds(tmp_path):
    assert float(run(["-c", COLD], TRITON_CACHE_DIR=str(tmp_path))) < 60
