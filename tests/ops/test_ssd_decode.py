# SPDX-License-Identifier: Apache-2.0
"""Mamba2's decode kernel is the definition's step, in a pool of slots; without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from hmf.ops.ssd import state_space_dual
from tests.numerics import assert_near
from tests.ops.interpreted import interpret_as_compiled

SHAPES = {
    # sequences, (x, B, C heads), K, V
    "grouped": (3, (2, 2, 4), 16, 16),
    "one key head": (2, (3, 1, 6), 32, 32),
    "not a power of two": (2, (2, 2, 2), 24, 40),
}
CASES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def check(shape: str, dtype: torch.dtype, pool_dtype: torch.dtype, device: str) -> None:
    from hmf.ops.ssd_decode import decode

    sequences, counts, key_dim, value_dim = SHAPES[shape]
    heads = counts[-1]
    generator = torch.Generator().manual_seed(0)
    widths = [count * dim for count, dim in zip(counts, (value_dim, key_dim, key_dim), strict=True)]
    row = torch.randn(sequences + 1, sum(widths), generator=generator).to(dtype)  # as a convolution over all gives them
    x, B, C = (y.unflatten(-1, (count, -1)) for y, count in zip(row.split(widths, -1), counts, strict=True))
    dt = (20 * torch.randn(sequences + 1, heads, generator=generator)).to(dtype)
    A_log, dt_bias, D = torch.randn(3, heads, generator=generator)
    pool = torch.randn(2 * sequences + 2, heads, value_dim, key_dim, generator=generator).to(pool_dtype)
    pool[0] = float("nan")  # nobody's
    slots = torch.tensor([*(2 * n + 1 for n in range(sequences)), 0], dtype=torch.int32)
    used = slots[:-1].long()

    def step(precision):
        tokens = (y.repeat_interleave(heads // y.shape[1], 1)[:-1, None].to(precision) for y in (x, B, C))
        steps = F.softplus(dt[:-1, None].to(precision) + dt_bias.to(precision))
        scales = (-A_log.to(precision).exp(), D.to(precision))
        y, state = state_space_dual(*tokens, steps, *scales, pool[used].to(precision).mT)
        return y[:, 0], state.mT

    exact, (plain, state) = step(torch.float64), step(torch.float32)
    on_device = pool.to(device)
    given = (y.to(device) for y in (x, B, C, dt, A_log, dt_bias, D))
    y = decode(*given, on_device, slots.to(device), null_slot=0)
    after = on_device.cpu()
    assert_near([y[:-1].cpu(), after[used]], exact, [plain.to(dtype), state.to(pool_dtype)], what=shape)
    others = torch.ones(len(pool), dtype=torch.bool).index_fill(0, used, False)
    assert not y[-1].any() and torch.equal(after[others].nan_to_num(9), pool[others].nan_to_num(9))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", CASES, ids=str)
def test_decode_on_the_gpu(shape, dtypes):
    check(shape, *dtypes, "cuda")


def test_decode_in_the_interpreter():
    pytest.importorskip("triton")
    # Triton decides at its import whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HMF_OPS": ""}
    program = [sys.executable, "-m", "tests.ops.test_ssd_decode"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    interpret_as_compiled()
    for number, name in enumerate(SHAPES):
        check(name, *CASES[number % len(CASES)], "cpu")
