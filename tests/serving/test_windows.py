# SPDX-License-Identifier: Apache-2.0
"""B'MOJO-F's rings in vLLM's pool: in whatever chunks requests come, each query sees its window, in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 7),
    requests=st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=4), min_size=1, max_size=4),
    data=st.data(),
)
def test_flash_attention_is_given_the_window(window, requests, data):
    """Keys name their request and position; flash attention's causal window of the last `window` keys, counted from the
    end as it does, must hold just those that the layer defines."""
    from hmf.serving.vllm.bmojo import WindowLayout

    slots = torch.tensor(data.draw(st.permutations(range(1, len(requests) + 1))))
    for reach, lag in ((window - 1, 0), (2 * window - 1, window)):
        ring = torch.full((1 + len(requests), max(1, reach), 2), -1)
        before = dict.fromkeys(range(len(requests)), 0)
        for step in range(max(map(len, requests))):
            batch = [number for number, chunks in enumerate(requests) if step < len(chunks)]
            counts, starts = [requests[n][step] for n in batch], [before[n] for n in batch]
            rows = [
                [n, at] for n, count in zip(batch, counts, strict=True) for at in range(before[n], before[n] + count)
            ]
            x, held = torch.tensor(rows), slots[batch]
            layout = WindowLayout.of(counts, starts, reach, lag, CPU)
            keys, ends = layout.gather(x, ring, held).tolist(), layout.bounds.tolist()
            assert len(keys) == layout.total == ends[-1] and layout.longest == max(layout.bounds.diff())
            for at, (number, count) in enumerate(zip(batch, counts, strict=True)):
                mine = keys[ends[at] : ends[at + 1]]
                for index in range(count):
                    last = index + len(mine) - count
                    position = before[number] + index
                    low = max(0, position - lag - window + 1)
                    expected = [[number, p] for p in range(low, position - lag + 1)]
                    assert mine[max(0, last - window + 1) : max(0, last + 1)] == expected
                before[number] += count
            layout.keep(x, ring, held)
        assert (ring[0] == -1).all()


def test_a_ring_rolls_back():
    from hmf.serving.vllm.bmojo import rolled, unrolled

    seen = torch.tensor([0, 3, 11])
    kept = torch.stack([torch.arange(n - 5, n) for n in seen.tolist()])[..., None]
    ring = rolled(kept, seen)
    assert ring[2, :, 0].tolist() == [10, 6, 7, 8, 9]  # position p at p modulo 5
    assert unrolled(ring, 5, seen).equal(kept)
    assert unrolled(ring, 0, seen).shape == (3, 0, 1)
