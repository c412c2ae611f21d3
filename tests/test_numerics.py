# SPDX-License-Identifier: Apache-2.0
"""The bounds of numeric tests follow rounding: they hold rounding of the usual size, and nothing larger."""

import json

import pytest
import torch

from tests import numerics


def test_bound_follows_the_plain_computation():
    exact = torch.ones(3, dtype=torch.float64)
    plain = (exact + 1e-3).float()
    numerics.assert_near((exact + 9e-3).float(), exact, plain)
    with pytest.raises(AssertionError, match="off by 0.011, allowed are 0.01"):
        numerics.assert_near((exact + 1.1e-2).float(), exact, plain)
    with pytest.raises(AssertionError, match="off by 0.001"):  # an exact plain result leaves room for rounding only
        numerics.assert_near(plain, exact, exact.float())
    with pytest.raises(AssertionError, match="nan"):
        numerics.assert_near(plain * torch.nan, exact, plain)


def test_float64_results_differ_by_rounding_only():
    exact = {"large": 1e6 * torch.ones(2, dtype=torch.float64), "small": 1e-3 * torch.ones(2, dtype=torch.float64)}
    numerics.assert_same({name: x * (1 + 1e-12) for name, x in exact.items()}, exact)
    with pytest.raises(AssertionError):
        numerics.assert_same(exact | {"small": exact["small"] * (1 + 1e-7)}, exact)


@pytest.mark.usefixtures("in_float64")
def test_no_float32_within_the_context():
    x = torch.tensor([1 / 3], dtype=torch.float64)
    assert x.float().dtype == x.to(torch.float32).dtype == torch.arange(3).div(3).dtype == torch.float64


def test_errors_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("HMF_TEST_ERRORS", str(tmp_path / "errors"))
    numerics.check(1.0, 4.0, "a number")
    entry = json.loads((tmp_path / "errors").read_text())
    assert (entry["what"], entry["ratio"]) == ("a number", 0.25) and "test_errors_are_recorded" in entry["test"]
