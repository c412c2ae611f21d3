# SPDX-License-Identifier: Apache-2.0
"""B'MOJO-F's decode step is the definition, in rings of a pool; without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

from hmf.ops import KeySet, window

SHAPES = {
    # window, query heads, key/value heads, head_dim, positions of the tokens, query of the fading window apart
    "grouped": (5, 4, 2, 16, (0, 3, 9, 4), False),
    "two queries": (70, 2, 1, 32, (300, 68, 69, 139, 140), True),
    "a window of one": (1, 2, 2, 16, (0, 1, 7), False),
    "not a power of two": (9, 3, 1, 12, (8, 17, 100), True),
    "several stretches": (200, 8, 1, 16, (0, 150, 555), False),
}


def check(shape: str, dtype: torch.dtype, device: str) -> None:
    from hmf.ops.window_decode import decode

    size, heads, kv_heads, head_dim, positions, apart = SHAPES[shape]
    generator, sequences = torch.Generator().manual_seed(0), len(positions)
    reaches, scale = (size - 1, 2 * size - 1), head_dim**-0.5

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q, fading_q = (normal(sequences + 1, heads, head_dim) for _ in range(2))
    fading_q = fading_q if apart else q
    row = normal(sequences + 1, 4 * kv_heads * head_dim)  # views of one row, as one projection gives them
    new = tuple(x.unflatten(-1, (kv_heads, -1)) for x in row.chunk(4, -1))
    slots = torch.tensor([*(2 * n + 1 for n in range(sequences)), 0], dtype=torch.int32)
    pools = [torch.full((2 * sequences + 2, max(1, reaches[n // 2]), kv_heads, head_dim), torch.nan) for n in range(4)]
    pools = [pool.to(dtype) for pool in pools]
    expected_pools, expected = [pool.clone() for pool in pools], []
    for s, position in enumerate(positions):
        pasts = []
        for n, pool in enumerate(pools):
            reach = reaches[n // 2]
            kept = range(max(0, position - reach), position)
            past = normal(len(kept), kv_heads, head_dim)
            for target in (pool, expected_pools[n]):
                target[slots[s].long(), [p % max(1, reach) for p in kept]] = past
            pasts.append(past)
            if reach:
                expected_pools[n][slots[s].long(), position % reach] = new[n][s]
        outputs = []
        for low, high, parts, query in ((0, size - 1, slice(0, 2), q), (size, 2 * size - 1, slice(2, 4), fading_q)):
            keys = KeySet(*(x[s][None, None] for x in new[parts]), low, high, *(x[None] for x in pasts[parts]))
            outputs.append((keys, query[s][None, None]))
        expected.append(both(outputs, scale, position))
    on_device = [pool.to(device) for pool in pools]
    o = decode(
        (q.to(device), fading_q.to(device)),
        tuple(x.to(device) for x in new),
        tuple(on_device),
        torch.tensor([*positions, 0]).to(device),
        slots.to(device),
        0,
        size,
        scale,
    )
    bounds = {"rtol": 1.6e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(o[:-1].cpu().float(), torch.stack(expected), **bounds)
    assert not o[-1].any()
    for pool, wanted in zip(on_device, expected_pools, strict=True):
        torch.testing.assert_close(pool.cpu(), wanted, equal_nan=True, rtol=0, atol=0)


def both(sets, scale, position):
    """[H, K] in float32 by the definition, for windows with queries of their own: these stand side by side."""
    (near, q), (fading, fading_q) = sets

    def widen(x, last):
        return torch.nn.functional.pad(x.float(), (x.shape[-1], 0) if last else (0, x.shape[-1]))

    keys = [
        KeySet(widen(s.k, last), s.v.float(), s.low, s.high, widen(s.past_k, last), s.past_v.float())
        for s, last in ((near, False), (fading, True))
    ]
    query = torch.cat([q, fading_q], -1).float()
    return window.reference(query, keys, scale, torch.tensor([position]))[0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_on_the_gpu(shape, dtype):
    check(shape, dtype, "cuda")


def test_decode_in_the_interpreter():
    pytest.importorskip("triton")
    # Triton decides at its import whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    from tests.ops.interpreted import interpret_as_compiled

    interpret_as_compiled()
    for number, name in enumerate(SHAPES):
        check(name, (torch.float32, torch.bfloat16)[number % 2], "cpu")
