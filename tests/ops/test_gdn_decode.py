# SPDX-License-Identifier: Apache-2.0
"""The decode kernel is the definition's step, in a pool of slots; without a GPU, in Triton's interpreter.

The first run on a GPU takes minutes: the kernel is compiled for each shape, dtype and kind of decay.
"""

import os
import subprocess
import sys

import pytest
import torch

from hmf.layers.gdn import l2_normalise
from hmf.ops import gdn, kda
from tests.numerics import assert_near
from tests.ops.interpreted import interpret_as_compiled

SHAPES = {
    # sequences, (q, k, v heads), key_dim, value_dim
    "grouped": (3, (4, 2, 2), 16, 16),
    "one key head": (2, (6, 1, 1), 32, 32),
    "values by head": (2, (4, 2, 4), 16, 40),
    "not a power of two": (2, (2, 2, 2), 24, 12),
}


def check(shape: str, dtype: torch.dtype, pool_dtype: torch.dtype, device: str, channels: bool) -> None:
    """channels: a decay for each channel of the key, as in KDA."""
    from hmf.ops.gdn_decode import decode

    sequences, counts, key_dim, value_dim = SHAPES[shape]
    heads = max(counts)
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    # Views of one row, as a convolution over all three gives them.
    widths = [count * dim for count, dim in zip(counts, (key_dim, key_dim, value_dim), strict=True)]
    row = normal(sequences + 1, sum(widths))
    q, k, v = (x.unflatten(-1, (count, -1)) for x, count in zip(row.split(widths, -1), counts, strict=True))
    g, beta = -torch.rand(2, sequences + 1, heads, generator=generator)
    beta = -beta
    if channels:
        g = -torch.rand(sequences + 1, heads, key_dim, generator=generator)
    pool = torch.randn(2 * sequences + 2, heads, value_dim, key_dim, generator=generator).to(pool_dtype)
    pool[0] = float("nan")  # nobody's
    slots = torch.tensor([*(2 * n + 1 for n in range(sequences)), 0], dtype=torch.int32)

    used = slots[:-1].long()

    def step(tokens, precision):
        """Outputs and states as the definition has them, of vectors normalised in the dtype of `tokens`."""
        repeat = lambda x: x.repeat_interleave(heads // x.shape[1], 1)[:-1].to(precision)  # noqa: E731
        vectors = repeat(l2_normalise(q.to(tokens))), repeat(l2_normalise(k.to(tokens))), repeat(v)
        o, state = (kda if channels else gdn).step(
            *vectors, *(x[:-1].to(precision) for x in (g, beta)), pool[used].to(precision).mT
        )
        return o, state.mT

    exact, (plain, state) = step(torch.float64, torch.float64), step(dtype, torch.float32)

    on_device = pool.to(device)
    o = decode(*(x.to(device) for x in (q, k, v, g, beta)), on_device, slots.to(device), null_slot=0)
    after = on_device.cpu()
    assert_near([o[:-1].cpu(), after[used]], exact, [plain.to(dtype), state.to(pool_dtype)], what=shape)
    others = torch.ones(len(pool), dtype=torch.bool).index_fill(0, used, False)
    assert not o[-1].any() and torch.equal(after[others].nan_to_num(9), pool[others].nan_to_num(9))


CASES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", CASES, ids=str)
@pytest.mark.parametrize("channels", [False, True], ids=["gdn", "kda"])
def test_decode_on_the_gpu(shape, dtypes, channels):
    check(shape, *dtypes, "cuda", channels)


def test_decode_in_the_interpreter():
    pytest.importorskip("triton")
    # Triton decides at its import whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-m", "tests.ops.test_gdn_decode"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    interpret_as_compiled()
    for number, name in enumerate(SHAPES):
        for channels in (False, True):
            check(name, *CASES[number % len(CASES)], "cpu", channels)
