# SPDX-License-Identifier: Apache-2.0
"""GDN's prefill kernels are the definition, on a GPU and, without one, in Triton's interpreter.

The truth is the float64 reference on vectors normalised in float64. An error is the norm of the difference relative to
the truth's. It is bounded by roundings of the tokens' dtype, to which the kernels round the normalised keys, W, U, u
and the states that products read.
"""

import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hmf.bench import doctor
from hmf.errors import HmfError
from hmf.layers.gdn import l2_normalise
from hmf.ops import dispatch, gdn
from hmf.ops.samples import Shape, sample
from tests.ops.cases import QUICK
from tests.ops.interpreted import interpret_as_compiled

DTYPES = (torch.bfloat16, torch.float16)
ROUNDINGS = 1.5  # of the dtype, torch.finfo(dtype).eps


def cases(whole: bool) -> list[dict]:
    """Arguments of `check`. whole: also the sizes that an interpreter needs minutes for."""
    one, grouped = {"counts": (1, 1, 1), "dims": (64, 64)}, {"counts": (4, 1, 1), "dims": (64, 64)}
    lengths = [[n] for n in (1, 15, 16, 17, 63, 64, 130)]
    return [
        *({"lengths": x, **one, "dtype": DTYPES[n % 2], "with_state": n % 3 > 0} for n, x in enumerate(lengths)),
        {"lengths": [65], **grouped},
        {"lengths": [0, 70, 0, 1, 65, 3, 0], "counts": (2, 2, 2), "dims": (128, 128)},
        {"lengths": [70, 3], "counts": (4, 2, 4), "dims": (24, 80)},
        {"lengths": [0, 0], **one},
        {"lengths": [130], **one, "beta": (0.0, 0.0)},
        {"lengths": [130], **one, "beta": (0.999, 1.0), "decay": 1e-4},
        {"lengths": [130], **one, "beta": (0.0, 2.0), "decay": 1e-2},
        {"lengths": [130], **one, "beta": (0.9, 1.0), "decay": 0.0, "same_keys": True},
        {"lengths": [130], **one, "decay": 400.0},
        *([{"lengths": [2000, 47] * 9, "counts": (8, 2, 2), "dims": (128, 128)}] if whole else []),
    ]


def check(
    lengths: list[int],
    counts: tuple[int, int, int],
    dims: tuple[int, int],
    dtype: torch.dtype = torch.bfloat16,
    with_state: bool = True,
    beta: tuple[float, float] = (0.0, 1.0),
    decay: float = 1.0,
    same_keys: bool = False,
    device: str = "cpu",
) -> None:
    """counts: numbers of query, key and value heads; dims: of keys and values; decay: the largest of a token."""
    from hmf.ops import gdn_chunk_triton

    heads, tokens, generator = max(counts), sum(lengths), torch.Generator().manual_seed(0)
    # Views of one row, as a convolution over all three gives them.
    widths = [count * dim for count, dim in zip(counts, (dims[0], *dims), strict=True)]
    row = torch.randn(tokens, sum(widths), generator=generator).to(dtype)
    q, k, v = (x.unflatten(-1, (count, -1)) for x, count in zip(row.split(widths, -1), counts, strict=True))
    if same_keys:
        k = k[:1].expand(k.shape).contiguous()
    shares = torch.rand(2, tokens, heads, generator=generator)
    g, strength = -decay * shares[0], beta[0] + (beta[1] - beta[0]) * shares[1]
    state = torch.randn(len(lengths), heads, *reversed(dims), generator=generator) if with_state else None
    bounds = torch.tensor([0, *lengths]).cumsum(0)

    wide = (l2_normalise(q.double()), l2_normalise(k.double()), v.double())
    wide = [x.repeat_interleave(heads // x.shape[1], 1)[None] for x in wide]
    before = None if state is None else state.double().mT
    exact, after = gdn.reference(*wide, g.double()[None], strength.double()[None], before, bounds)
    found = gdn_chunk_triton.chunked(
        *(x.to(device) for x in (q, k, v, g, strength)),
        None if state is None else state.to(device),
        bounds.to(device),
        eps=1e-6,
    )
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for name, x, truth in zip(("output", "state"), found, (exact[0], after.mT), strict=True):
        assert x.shape == truth.shape, name
        error = (x.cpu().double() - truth).norm().item()
        assert error <= ROUNDINGS * torch.finfo(dtype).eps * truth.norm().item(), (
            f"{name}: {error:.2e} of {truth.norm():.2e}"
        )


@QUICK
@given(st.lists(st.integers(0, 70), min_size=1, max_size=3), st.sampled_from(DTYPES), st.booleans())
def check_lengths(lengths, dtype, with_state):
    check(lengths, (1, 1, 1), (16, 16), dtype, with_state)


GRADIENTS = {
    "documents": Shape(lengths=(0, 130, 1, 40, 0), heads=1, head_dim=64, with_state=True),
    "rows": Shape(batch=2, tokens=70, heads=2, head_dim=64),
    "odd dimensions": Shape(lengths=(17, 66), heads=1, head_dim=80, with_state=True),
    "one token": Shape(batch=2, tokens=1, heads=1, head_dim=64, with_state=True),
    "nothing": Shape(lengths=(0, 0), heads=1, head_dim=64, with_state=True),
}


CHANGES = [  # of gates: strong decays, beta up to 2
    {"g": lambda g: 400 * g},
    {"g": lambda g: 0.01 * g, "beta": lambda beta: 2 * beta},
]


def check_gradients(shape: Shape, dtype: torch.dtype, device: str = "cpu", changes: dict | None = None) -> None:
    """changes: of the sample's gates, functions of them by name."""
    made = sample("gdn", shape)
    for name, change in (changes or {}).items():
        made.exact[name] = change(made.exact[name])
    exact = doctor.evaluate(gdn.reference, made, torch.float64, "cpu", True)
    for name, x in doctor.evaluate(gdn.triton, made, dtype, device, True).items():
        error = (x - exact[name]).norm().item()
        allowed = ROUNDINGS * torch.finfo(dtype).eps * exact[name].norm().item()
        assert error <= allowed, f"{name}: off by {error:.2e}, allowed are {allowed:.2e}"


def check_arguments_stay() -> None:
    x = sample("gdn", GRADIENTS["rows"]).tensors(torch.bfloat16)
    before = {name: y.clone() for name, y in x.items()}
    results = gdn.triton(*(y.requires_grad_() for y in x.values()))
    torch.autograd.backward(results, [torch.ones_like(y) for y in results])
    assert all(torch.equal(y, before[name]) for name, y in x.items())


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    # Triton decides at its import whether it interprets.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-m", "tests.ops.test_gdn_triton"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases(True), ids=lambda case: "-".join(map(str, case["lengths"][:8])))
def test_kernels_on_the_gpu(case):
    for dtype in DTYPES:
        check(**case | {"dtype": dtype}, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*GRADIENTS, "many"])
def test_gradients_on_the_gpu(shape, dtype):
    many = Shape(lengths=(500, 70, 3) * 12, heads=4, head_dim=128, with_state=True)
    check_gradients(GRADIENTS.get(shape, many), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CHANGES)
def test_gradients_of_gates_on_the_gpu(changes):
    check_gradients(Shape(lengths=(300, 70), heads=2, head_dim=128), torch.bfloat16, "cuda", changes)


COLD = """
import time, torch
from tests.ops.test_gdn_triton import check
torch.zeros(1, device="cuda")
start = time.perf_counter()
for lengths in ([70], [70] * 100):
    check(lengths, (8, 2, 2), (128, 128), device="cuda")
print(time.perf_counter() - start)
"""


@pytest.mark.gpu
def test_kernels_compile_in_seconds(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COLD], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout) < 60


def test_when_the_version_runs(monkeypatch):
    """Before fla's kernels, for inputs that it supports, and if its gradients are those of the chunked version."""
    pytest.importorskip("triton")
    from hmf.ops import gdn_chunk_triton

    monkeypatch.delenv("HMF_OPS", raising=False)
    reasons = {"triton": None, "fast": None}
    monkeypatch.setattr(
        dispatch, "_GRADIENT_CHECK", [lambda op, dtype, device, heads, version="fast": reasons[version]]
    )
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "miscompiled", lambda: None)

    monkeypatch.setattr(gdn_chunk_triton, "shared_memory", lambda device: 200 * 2**10)

    def chosen(op, gradients, dtype, head_dim=64):
        return dispatch.choose(op, "cuda", gradients, dtype, (2, head_dim))[0].version

    for forced in (None, "triton"):
        if forced:
            monkeypatch.setenv("HMF_OPS", forced)
        assert chosen("gdn", True, torch.bfloat16) == chosen("gdn", False, torch.float16, 128) == "triton"
        assert chosen("gdn", False, torch.float32) == chosen("gdn", False, torch.bfloat16, 160) == "fast"
        assert chosen("conv", True, torch.bfloat16) == "fast"
        assert dispatch.choose("gdn", "cpu", False, torch.bfloat16)[0].version == "chunked"
    reasons["triton"] = "its gradients are off"
    assert chosen("gdn", True, torch.bfloat16) == "fast" and chosen("gdn", False, torch.bfloat16) == "triton"
    monkeypatch.setenv("HMF_OPS", "fast")
    assert chosen("gdn", False, torch.bfloat16) == "fast"
    monkeypatch.delenv("HMF_OPS")
    monkeypatch.setattr(gdn_chunk_triton, "shared_memory", lambda device: 99 * 2**10)
    assert chosen("gdn", False, torch.bfloat16) == "fast"


def test_wide_heads_are_refused():
    pytest.importorskip("triton")
    made = sample("gdn", Shape(tokens=3, head_dim=160))
    with pytest.raises(HmfError, match="heads of at most 128"):
        made.call(gdn.triton, made.tensors(torch.bfloat16))


def test_tokens_of_several_dtypes(monkeypatch):
    """Keys in float32 beside queries in bfloat16 are not rounded."""
    pytest.importorskip("triton")
    made = sample("gdn", Shape(tokens=70, with_state=True))
    x = made.tensors(torch.bfloat16) | {"k": made.tensors(torch.float32)["k"]}
    for ours, theirs in zip(made.call(gdn.triton, x), made.call(gdn.chunked, x), strict=True):
        assert torch.equal(ours, theirs)


if __name__ == "__main__":
    from hmf.ops import gdn_chunk_triton

    interpret_as_compiled()
    for number, case in enumerate(cases(False)):
        started = time.perf_counter()
        # A CPU has no multiprocessors, so the launch for many programs would be chosen each time.
        few_or_many = gdn_chunk_triton.LAUNCH["states" if number % 2 else "many_states"]
        gdn_chunk_triton.LAUNCH["many_states"], kept = few_or_many, gdn_chunk_triton.LAUNCH["many_states"]
        check(**case)
        gdn_chunk_triton.LAUNCH["many_states"] = kept
        print(case, f"{time.perf_counter() - started:.1f} s", flush=True)
    check_lengths()
    for number, shape in enumerate(GRADIENTS.values()):
        check_gradients(shape, DTYPES[number % 2])
    for changes in CHANGES:
        check_gradients(Shape(lengths=(70,), heads=1, head_dim=64), torch.bfloat16, changes=changes)
    check_arguments_stay()
