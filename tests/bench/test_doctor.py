# SPDX-License-Identifier: Apache-2.0
"""`hmf doctor` tells right kernels from wrong ones; `hmf bench ops` measures what it says."""

import contextlib
import json
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hmf.bench import doctor
from hmf.bench import ops as timings
from hmf.cli import app
from hmf.errors import HmfError
from hmf.ops import dispatch
from hmf.ops.samples import SAMPLES, Shape

# Small cases: the tests are about the doctor, and the sequential references are slow.
CASES = {
    "rows": Shape(tokens=9, head_dim=16),
    "packed": Shape(lengths=(9, 1), heads=3, head_dim=16, with_state=True),
    "one token": Shape(head_dim=16, with_state=True),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.delenv("HMF_OPS", raising=False)
    monkeypatch.setattr(doctor, "CASES", CASES)


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def replace(monkeypatch, op, function, version="chunked"):
    monkeypatch.setitem(
        dispatch._IMPLEMENTATIONS[op], version, dispatch.Implementation(version, function, requires=None)
    )


def broken(op, change):
    """The chunked version of `op` with its output changed."""
    right = dispatch.implementations(op)["chunked"].function

    def function(*arguments):
        o, state = right(*arguments)
        return change(o), state

    return function


def report_of(result) -> dict:
    return json.loads(result.stdout)


def test_passes_here_and_says_what_runs():
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in (
        *dispatch.ops(),
        "chunked",
        "inference",
        "training",
        torch.__version__,
        "every op equals its reference",
    ):
        assert word in result.output


def test_json_holds_every_check():
    report = report_of(run("doctor", "--json"))
    assert report["passed"]
    assert report["versions"]["torch"] == torch.__version__
    expected = {(op, "cpu", use) for op in dispatch.ops() for use in ("inference", "training")}
    assert {(check["op"], check["device"], check["use"]) for check in report["checks"]} >= expected
    for check in report["checks"]:
        assert check["reason"]
        assert set(check["errors"]) == {"float32", "bfloat16"}
        assert all(0 <= error < 0.02 for error in check["errors"].values())


@pytest.mark.parametrize(
    "change",
    [lambda o: o * 1.05, lambda o: torch.full_like(o, float("nan")), lambda o: o[:, :1] if o.shape[1] > 1 else o[:0]],
    ids=["5% off", "NaN", "too few tokens"],
)
def test_a_wrong_output_is_named(monkeypatch, change):
    replace(monkeypatch, "gdn", broken("gdn", change))
    result = run("doctor")
    assert result.exit_code == 1
    assert "wrong here: gdn (" in result.output


def test_a_wrong_gradient_is_found_though_the_output_is_right(monkeypatch):
    def hide_half(o):
        return o.detach() + (o - o.detach()) / 2

    replace(monkeypatch, "gdn", broken("gdn", hide_half))
    result = run("doctor", "--json")
    assert result.exit_code == 1
    wrong = [check for check in report_of(result)["checks"] if check["problem"]]
    assert {(check["op"], check["use"]) for check in wrong} == {("gdn", "training")}
    assert all("gradient of" in check["problem"] for check in wrong)


def test_a_kernel_that_fails_is_named_with_its_error(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no such instruction\nsecond line")

    replace(monkeypatch, "gka", fails)
    result = run("doctor")
    assert result.exit_code == 1
    assert "wrong here: gka (" in result.output
    assert "no such instruction" in result.output
    assert "second line" not in result.output


def test_a_forced_version_is_what_runs_and_is_reported(monkeypatch):
    monkeypatch.setenv("HMF_OPS", "reference")
    report = report_of(run("doctor", "--json"))
    assert report["passed"]
    assert {check["version"] for check in report["checks"]} == {"reference"}
    assert {check["reason"] for check in report["checks"]} == {"selected by HMF_OPS"}
    assert "HMF_OPS=reference" in report["notes"][0]


def test_a_version_that_an_op_lacks_is_a_finding(monkeypatch):
    monkeypatch.delitem(dispatch._IMPLEMENTATIONS["gka"], "fast")
    monkeypatch.setenv("HMF_OPS", "fast")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    (problem,) = {check["problem"] for check in report_of(result)["checks"] if check["op"] == "gka"}
    assert problem.startswith("HMF_OPS=fast: op 'gka' has only")


def test_known_bad_combinations_are_notes(monkeypatch):
    monkeypatch.setattr(
        dispatch, "known_bad_backward", lambda op, dtype, heads=None: "wrong on this chip" if op == "gdn" else None
    )
    assert report_of(run("doctor", "--json"))["notes"] == ["known bad: gdn: wrong on this chip"]


@pytest.mark.parametrize(
    ("op", "triton", "fla", "disabled", "line"),
    [
        ("gdn", "3.6.0", "0.6", False, None),
        ("gdn", "3.6.0", "0.5", False, "pip install -U fla-core"),
        ("ssd", "3.7.0.post1", "0.6", True, "unset FLA_DISABLE_BACKEND_DISPATCH"),
        ("ssd", "3.7.1", "0.5", True, None),
        ("gka", "3.6.0", "0.5", True, None),
        ("kda", "3.6.0", "0.5", True, "found off"),  # by the check of its gradients
        ("kda", "3.7.1", "0.5", True, None),
    ],
)
def test_backwards_that_hopper_lacks(monkeypatch, op, triton, fla, disabled, line):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr(dispatch, "installed", lambda package: package != "fla.backends" or fla == "0.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1" if disabled else "0")
    monkeypatch.setattr(dispatch, "_GRADIENT_CHECK", [lambda op, *_: "found off" if op == "kda" else None])
    found = dispatch.known_bad_backward(op, torch.bfloat16)
    assert found is None if line is None else line in found


class DeadPool(contextlib.AbstractContextManager):
    def __exit__(self, *_):
        return None

    def submit(self, *_):
        future = Future()
        future.set_exception(BrokenProcessPool())
        return future


def test_a_kernel_that_kills_its_process_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "ProcessPoolExecutor", lambda *_: DeadPool())
    monkeypatch.setattr(dispatch, "ops", lambda: ["window"])
    monkeypatch.setattr(dispatch, "known_bad_backward", lambda op, dtype, heads=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = doctor.examine()
    problems = {check.device: check.problem for check in report.checks}
    assert problems["cpu"] is None and "GPU kernels died" in problems["cuda"] and not report.passed


def test_every_op_has_a_sample():
    assert set(SAMPLES) == set(dispatch.ops())


def test_bench_measures_every_version():
    result = run("bench", "ops", "--tokens", "5", "--heads", "2", "--head-dim", "4", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    rows = report_of(result)["rows"]
    assert {(row["op"], row["version"]) for row in rows} == {
        (op, version) for op in dispatch.ops() for version in ("reference", "chunked")
    }
    for row in rows:
        assert 0 < row["forward_ms"]["min"] <= row["forward_ms"]["median"]
        assert row["baseline"] == "reference"
        assert (row["forward_speedup"] == 1) == (row["version"] == "reference")


def test_bench_prints_a_table():
    shape = ("--tokens", "5", "--heads", "2", "--head-dim", "4", "--dtype", "bfloat16")
    result = run("bench", "ops", "--ops", "gdn", "--device", "cpu", *shape)
    assert result.exit_code == 0, result.output
    for word in ("5 tokens, 2 heads of 4, bfloat16", "reference", "chunked", "ratio", torch.__version__):
        assert word in result.output


@pytest.fixture
def refuses_backward(monkeypatch):
    """A machine on which the fast version of `gdn` is known to have a wrong backward, and that of `window` fails."""

    def fails(*arguments):
        raise RuntimeError("no kernel image\nis available [here]")

    for op, function in (("gdn", dispatch.implementations("gdn")["chunked"].function), ("window", fails)):
        monkeypatch.setitem(dispatch._IMPLEMENTATIONS[op], "fast", dispatch.Implementation("fast", function, None))
    reasons = {("gdn", True): "its backward is wrong here [here]", ("gdn", False): None, ("window", True): None}
    reasons[("window", False)] = None
    monkeypatch.setattr(
        dispatch, "not_fast", lambda op, device, grad, dtype, **_: reasons.get((op, grad), "the op has no GPU kernel")
    )


SMALL = ("--tokens", "5", "--heads", "2", "--head-dim", "4", "--device", "cpu", "--versions", "chunked,fast")


def test_bench_does_not_run_what_dispatch_refuses(refuses_backward):
    result = run("bench", "ops", *SMALL, "--ops", "gdn,ssd", "--json")
    assert result.exit_code == 0, result.output
    chunked, fast, plain, refused = report_of(result)["rows"]
    assert fast["forward_ms"] and fast["backward_ms"] is None and fast["backward_speedup"] is fast["speedup"] is None
    assert fast["reason"] == "forward only: its backward is wrong here [here]" and fast["forward_speedup"] > 0
    assert chunked["backward_ms"] and plain["backward_ms"] and chunked["reason"] is plain["reason"] is None
    assert refused["forward_ms"] is None and refused["reason"] == "the op has no GPU kernel"
    table = run("bench", "ops", *SMALL, "--ops", "gdn,ssd").output
    assert "gdn fast: forward only: its backward is wrong here [here]" in table and "ssd fast: the op has no" in table


def test_a_version_that_fails_costs_no_other_row(refuses_backward):
    result = run("bench", "ops", *SMALL, "--ops", "window,ssd", "--json")
    line = "window fast: RuntimeError: no kernel image is available [here]"
    assert isinstance(result.exception, HmfError) and str(result.exception) == line
    measured = [(row["op"], row["version"]) for row in report_of(result)["rows"] if row["forward_ms"]]
    assert measured == [("window", "chunked"), ("ssd", "chunked")]


def test_forward_alone(refuses_backward):
    rows = report_of(run("bench", "ops", *SMALL, "--ops", "gdn", "--forward", "--json"))["rows"]
    assert [row["version"] for row in rows if row["forward_ms"] and not row["reason"]] == ["chunked", "fast"]
    assert all(row["backward_ms"] is row["speedup"] is None for row in rows)
    assert "-" in run("bench", "ops", *SMALL, "--ops", "gdn", "--forward").output


def test_speedup_is_the_ratio_of_medians():
    slow = timings.Timing("x", "reference", [6.0], [12.0])
    quick = timings.Timing("x", "chunked", [1.0, 2.0, 30.0], [4.0, 3.0, 2.0])
    ratios = [(row["forward_speedup"], row["backward_speedup"], row["speedup"]) for row in timings.rows([slow, quick])]
    assert ratios == [(1, 1, 1), (3, 4, 3.6)]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"ops": ["gnd"]}, "--ops: unknown op 'gnd'; did you mean 'gdn'?"),
        ({"versions": ["chunk"]}, "--versions: unknown version 'chunk'; did you mean 'chunked'?"),
        ({"device": "cpux"}, "--device: unknown device 'cpux'; did you mean 'cpu'?"),
    ],
)
def test_bench_names_the_wrong_option(arguments, error):
    with pytest.raises(HmfError) as raised:
        timings.run(Shape(), **arguments)
    assert str(raised.value) == error
