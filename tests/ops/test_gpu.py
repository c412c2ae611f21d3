# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels compute what the references define: outputs, final states, gradients.

Truth and errors are those of `hmf doctor`: the float64 reference on the same numbers, relative norms of differences.
The first run on a machine takes minutes: kernels are compiled for each pair of heads and head_dim, so the shapes share
two pairs, and the test of tuned kernels tries about 100 variants of some.
"""

import functools
from dataclasses import replace

import pytest
import torch

import hmf.ops  # noqa: F401 (registers the ops)
from hmf.bench import doctor
from hmf.ops import dispatch
from hmf.ops.samples import Shape, flat, sample

pytestmark = pytest.mark.gpu

SHAPES = {
    "rows": Shape(batch=2, tokens=200, heads=3, head_dim=64),
    "rows from a state": Shape(batch=2, tokens=65, heads=3, head_dim=128, with_state=True),
    "packed": Shape(lengths=(130, 1, 64, 20), heads=3, head_dim=64),
    "packed from states": Shape(lengths=(3, 129, 1), heads=3, head_dim=128, with_state=True),
}
TOLERANCE = doctor.TOLERANCES["cuda"]
KERNELS = [op for op in dispatch.ops() if "fast" in dispatch.implementations(op)]


@functools.cache
def truth(op: str, shape: str) -> dict[str, torch.Tensor]:
    reference = dispatch.implementations(op)["reference"].function
    return doctor.evaluate(reference, sample(op, SHAPES[shape]), torch.float64, "cpu", True)


def errors(op: str, function, shape: str, dtype: torch.dtype, gradients: bool = True) -> dict[str, float]:
    found = doctor.evaluate(function, sample(op, SHAPES[shape]), dtype, "cuda", gradients)
    return {name: doctor.relative_error(value, truth(op, shape)[name]) for name, value in found.items()}


def kernel(op: str, gradients: bool, dtype: torch.dtype = torch.bfloat16):
    """The fast version, where this machine is one that it is chosen on."""
    chosen, why = dispatch.choose(op, "cuda", gradients, dtype)
    if chosen.version != "fast":
        pytest.skip(f"{op} runs {chosen.version} here: {why}")
    return chosen.function


@pytest.fixture(autouse=True)
def _one_variant(request):
    if "tuned" in request.node.name:
        yield
    else:
        with doctor.one_variant():
            yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", KERNELS)
def test_kernel_is_the_reference(op, shape, dtype):
    """With gradients, unless the kernel's backward is known to be bad here."""
    gradients = dispatch.choose(op, "cuda", True, dtype)[0].version == "fast"
    found = errors(op, kernel(op, gradients, dtype), shape, dtype, gradients)
    assert max(found.values()) <= doctor.allowed("cuda", dtype, gradients), found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", KERNELS)
def test_tuned_kernel_is_the_chunked_version_at_a_real_size(op):
    """The variants that the autotuner chooses: one layer of an 8B model on 2,048 tokens."""
    made = sample(op, Shape(tokens=2048, heads=32, head_dim=128))
    gradients = dispatch.choose(op, "cuda", True, torch.bfloat16)[0].version == "fast"
    expected = doctor.evaluate(dispatch.implementations(op)["chunked"].function, made, torch.float32, "cuda", gradients)
    found = doctor.evaluate(kernel(op, gradients), made, torch.bfloat16, "cuda", gradients)
    worst = {name: doctor.relative_error(value, expected[name]) for name, value in found.items()}
    assert max(worst.values()) <= doctor.allowed("cuda", torch.bfloat16, gradients), worst


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", dispatch.ops())
def test_chunked_is_the_reference_on_the_gpu(op, shape):
    found = errors(op, dispatch.implementations(op)["chunked"].function, shape, torch.float32)
    assert max(found.values()) <= 1e-4, found


@pytest.mark.parametrize("op", KERNELS)
def test_kernel_steps_like_the_whole(op):
    """A prefill and then one token at a time, each from the state before, give the whole sequence's outputs."""
    shape = Shape(batch=2, tokens=70, heads=3, head_dim=64)
    made, run = sample(op, shape), kernel(op, False)
    x = made.tensors(torch.bfloat16, "cuda")
    with_state = sample(op, replace(shape, with_state=True))

    def part(tensors, at):
        return {name: y[:, at] if y.shape[1:2] == (70,) else y for name, y in tensors.items()}

    names = [name for name in with_state.tokens | with_state.exact if name not in x]
    with torch.no_grad():
        whole, *final = flat(made.call(run, x))
        o, *state = flat(made.call(run, part(x, slice(67))))
        parts = [o]
        for t in range(67, 70):
            o, *state = flat(made.call(run, part(x, slice(t, t + 1)) | dict(zip(names, state, strict=True))))
            parts.append(o)
    assert op == "conv" or all(y.dtype == torch.float32 for y in state)
    for actual, expected in zip((torch.cat(parts, 1), *state), (whole, *final), strict=True):
        assert doctor.relative_error(actual.double(), expected.double()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("op", KERNELS)
def test_a_document_without_tokens_keeps_its_state(op):
    shape = Shape(lengths=(70, 0, 5), heads=3, head_dim=64, with_state=True)
    made = sample(op, shape)
    gradients = dispatch.choose(op, "cuda", True, torch.bfloat16)[0].version == "fast"
    run, reference = kernel(op, gradients), dispatch.implementations(op)["reference"].function
    found = doctor.evaluate(run, made, torch.bfloat16, "cuda", gradients)
    expected = doctor.evaluate(reference, made, torch.float64, "cpu", gradients)
    worst = {name: doctor.relative_error(value, expected[name]) for name, value in found.items()}
    assert max(worst.values()) <= doctor.allowed("cuda", torch.bfloat16, gradients), worst


def test_strong_decays_of_channels():
    """Channels that forget at once beside others that keep: no factor of the kernel's products overflows."""
    made = sample("kda", SHAPES["packed from states"])
    g = made.exact["g"]
    made = replace(made, exact=made.exact | {"g": torch.where(torch.rand(g.shape) < 0.1, -60.0, g)})
    gradients = dispatch.choose("kda", "cuda", True, torch.bfloat16)[0].version == "fast"
    run, reference = kernel("kda", gradients), dispatch.implementations("kda")["reference"].function
    found = doctor.evaluate(run, made, torch.bfloat16, "cuda", gradients)
    expected = doctor.evaluate(reference, made, torch.float64, "cpu", gradients)
    worst = {name: doctor.relative_error(value, expected[name]) for name, value in found.items()}
    assert max(worst.values()) <= doctor.allowed("cuda", torch.bfloat16, gradients), worst


def test_the_doctor_passes_and_uses_the_kernels():
    report = doctor.examine()
    assert report.passed, [check.problem for check in report.checks if check.problem]
    assert {(check.op, check.device) for check in report.checks} >= {(op, "cuda") for op in dispatch.ops()}
