# SPDX-License-Identifier: Apache-2.0
"""The states that a mixer announces are those that it keeps."""

import pytest
import torch

from hmf.model.convert import footprint, mixers
from tests.hybrids import cases, random_ids, tiny_hybrid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", cases(), ids=str)
@torch.no_grad()
def test_announced_states_are_those_in_the_cache(case, dtype):
    """Shapes and sizes; recurrent states are in float32 in a model of bfloat16 too."""
    model = tiny_hybrid(case).to(dtype)
    cache = model(random_ids(1, 16), use_cache=True).past_key_values  # longer than every window
    announced = 0
    for (_, mixer), index in zip(mixers(model), model.config.pattern.replaced, strict=True):
        shapes, states = mixer.state_shapes(model.config), cache.layers[index].states
        assert {name: state.shape for name, state in shapes.items()} == {
            name: tuple(x.shape[1:]) for name, x in states.items()
        }
        for name, shape in shapes.items():
            assert shape.bytes(model.dtype) == states[name].numel() * states[name].element_size(), name
            dtypes = {"recurrent": torch.float32, "count": torch.int64}
            assert states[name].dtype == dtypes.get(shape.kind, dtype), name
            announced += shape.bytes(model.dtype)
    assert footprint(model)["state_bytes"] == announced > 0


@pytest.mark.parametrize("case", cases(), ids=str)
def test_ranks_share_the_states(case):
    """Two ranks hold half of every state each, unless there is one head to share."""
    config = tiny_hybrid(case).config
    (_, mixer), *_ = mixers(tiny_hybrid(case))
    whole, half = mixer.state_shapes(config), mixer.state_shapes(config, ranks=2)
    for name, shape in whole.items():
        share = half[name].bytes(torch.float32) / shape.bytes(torch.float32)
        if shape.kind == "count":
            assert share == 1
        elif config.num_key_value_heads == 1:
            assert 0.5 <= share <= 1
        else:
            assert share == 0.5
