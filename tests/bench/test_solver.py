# SPDX-License-Identifier: Apache-2.0
"""`hmf bench solver`: the iteration comes as near to the exact solution as theory says, and the command shows it."""

import pytest
from typer.testing import CliRunner

from hmf.bench import solver
from hmf.cli import app
from hmf.errors import HmfError
from hmf.ops.samples import Shape

SHAPE = Shape(tokens=24, heads=2, head_dim=16)


@pytest.mark.parametrize("ridge_strength", [0.02, 0.2])
def test_distance_falls_under_the_bound(ridge_strength):
    found = solver.distances(SHAPE, ridge_strength, steps=(3, 12, 48))
    for before, after in zip(found, found[1:], strict=False):
        assert all(after.float64[name] < before.float64[name] for name in solver.TENSORS)
    # The bound is one of the energy norm: in the plain one it holds up to the root of the condition number.
    for distance in found:
        assert distance.float64["output"] <= 1e-13 + distance.bound * ((1 + ridge_strength) / ridge_strength) ** 0.5
    assert found[-1].float64["output"] < 1e-4 < found[0].float64["output"]
    assert found[-1].float32["output"] < 1e-4


def test_the_command_prints_and_draws(tmp_path):
    picture = tmp_path / "solver.png"
    result = CliRunner().invoke(
        app, ["bench", "solver", "--tokens", "9", "--heads", "1", "--head-dim", "8", "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    assert "num_iter" in result.output and picture.read_bytes().startswith(b"\x89PNG")


def test_no_ridge_is_refused():
    with pytest.raises(HmfError, match="--ridge-strength"):
        solver.distances(SHAPE, 0.0)
