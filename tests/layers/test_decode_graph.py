# SPDX-License-Identifier: Apache-2.0
"""A decode step is nothing but work on the device, so that a CUDA graph can hold it: no number comes from the host or
goes there."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hmf.layers.registry import mixer_class
from hmf.model.families import family_of
from tests.hybrids import cases, randomise, tiny_config

FROM_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy}
TO_HOST = {torch.nonzero, torch.masked_select} | {
    getattr(torch.Tensor, name)
    for name in ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
}
INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class OnDevice(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        copied = function in FROM_HOST and (kwargs or {}).get("device") is not None
        assert not copied and function not in TO_HOST, f"{function.__name__} needs the host"
        if function in INDEXING:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(x, list) for x in index), "an index from the host"
            assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in index), "a mask as an index"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", cases(), ids=str)
@torch.no_grad()
def test_one_token_of_each_row(case):
    config, rows = tiny_config(case), 3
    mixer = mixer_class(case.symbol)(config, 0)
    randomise(mixer)
    states = {
        name: torch.zeros(rows, *state.shape, dtype=torch.int64 if state.kind == "count" else torch.float32)
        for name, state in mixer.state_shapes(config).items()
    }
    hidden_states = torch.randn(rows, 1, config.hidden_size)
    rotary, positions = family_of("qwen3").class_named("RotaryEmbedding")(config), torch.full((rows, 1), 7)
    with OnDevice():
        output, after = mixer.mix(hidden_states, states, None, rotary(hidden_states, positions))
    assert output.shape == hidden_states.shape and after.keys() == states.keys()


@pytest.mark.parametrize(
    "forbidden", [lambda x: x.tolist(), lambda x: x[x > 0], lambda x: torch.tensor(1, device=x.device), bool]
)
def test_what_a_graph_cannot_hold_is_noticed(forbidden):
    with OnDevice(), pytest.raises(AssertionError):
        forbidden(torch.ones(1))
