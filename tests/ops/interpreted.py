# SPDX-License-Identifier: Apache-2.0
"""Compares GKA's Triton kernels, interpreted on a CPU, with the float64 reference; fails at the first difference.

Run with TRITON_INTERPRET=1. Triton reads the variable when it is imported, so this program needs its own process.
"""

import functools

import numpy as np
import torch

from hmf.bench import doctor
from hmf.ops import gka
from hmf.ops.samples import Shape, sample
from tests.numerics import assert_near


def widen(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def interpret_as_compiled():
    """Correct what Triton's interpreter does differently.

    It keeps bfloat16 as uint16: products treat the bits as numbers and casts are slow. It adds up products of float16
    in float16. It makes a tensor of an integer argument that is 1; the compiler makes a constant without methods.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.cast_impl

    def dot(self, a, b, to, *precision):
        a, b = (widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data.astype(np.float32) for x in (a, b))
        return interpreter.TensorHandle(np.matmul(a, b) + to.data, to.dtype.scalar)

    def cast(self, x, dtype):
        change = {(tl.bfloat16, tl.float32): widen, (tl.float32, tl.bfloat16): narrow}
        convert = change.get((x.dtype.scalar, dtype.scalar))
        return interpreter.TensorHandle(convert(x.data), dtype.scalar) if convert else plain(self, x, dtype)

    builder.create_dot = dot
    builder.cast_impl = builder.create_fp_ext = builder.create_fp_trunc = cast
    argument = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda x: x if type(x) is int and x == 1 else argument(x)


def changed(made, value_dim=None, alpha=True, symmetric=True):
    """The sample with values of another dimension than the keys', without alpha, or from no covariance."""
    tokens, exact, call = dict(made.tokens), dict(made.exact), made.call
    if not symmetric:
        exact["C"] = exact["C"] + exact["U"].roll(1, -1)
    if value_dim:
        tokens["v"] = tokens["v"][..., :value_dim]
        if "U" in exact:
            exact["U"] = exact["U"][..., :value_dim]
    if not alpha:
        exact.pop("alpha")
        call = lambda function, x: made.call(function, x | {"alpha": None})  # noqa: E731
    return type(made)(tokens, exact, call)


def with_small_keys(made):
    """The sample with first keys far smaller than those after them, as small gates make them."""
    tokens = dict(made.tokens)
    scale = torch.ones_like(tokens["k"])
    scale[:, 0] = 2.0**-12
    return type(made)(tokens | {"k": tokens["k"] * scale}, made.exact, made.call)


def nudged(made):
    """The sample with every number perturbed by the rounding error of the kernels' products (`hmf.ops.gka_triton`)."""
    generator = torch.Generator().manual_seed(0)
    tokens, exact = (
        {name: x * (1 + 2**-17 * torch.randn(x.shape, generator=generator, dtype=x.dtype)) for name, x in some.items()}
        for some in (made.tokens, made.exact)
    )
    return type(made)(tokens, exact, made.call)


TWO = {"num_iter": 2}
CASES = [  # name, shape, options, changes, dtype, with gradients
    (
        "packed",
        Shape(lengths=(0, 17, 1), heads=1, head_dim=12, with_state=True),
        TWO,
        {"value_dim": 5, "symmetric": False},
        torch.float32,
        True,
    ),
    (
        "rows",
        Shape(tokens=9, heads=1, head_dim=16),
        TWO | {"rescale": False, "bp_lambda": False},
        {"alpha": False},
        torch.bfloat16,
        True,
    ),
    (
        "packed, gradients of the exact solution",
        Shape(lengths=(0, 17, 1), heads=1, head_dim=12, with_state=True),
        {"num_iter": 5, "ridge_strength": 2.0},
        {"value_dim": 5, "symmetric": False},
        torch.bfloat16,
        True,
    ),
    (
        "packed, no gradients",
        Shape(lengths=(0, 37, 1), heads=2, head_dim=20, with_state=True),
        TWO,
        {"value_dim": 5, "symmetric": False},
        torch.bfloat16,
        False,
    ),
    (
        "rows, no gradients",
        Shape(batch=2, tokens=19, heads=1, head_dim=16),
        {"num_iter": 3, "rescale": False},
        {"alpha": False},
        torch.bfloat16,
        False,
    ),
    ("no steps, no gradients", Shape(tokens=3, heads=1, head_dim=16), {"num_iter": 0}, {}, torch.bfloat16, False),
    ("no steps", Shape(tokens=3, heads=1, head_dim=16), {"num_iter": 0}, {}, torch.float32, True),
    (
        "a token",
        Shape(batch=2, tokens=1, heads=1, head_dim=12, with_state=True),
        TWO,
        {"value_dim": 5, "symmetric": False},
        torch.bfloat16,
        False,
    ),
    (
        "a first token",
        Shape(tokens=1, heads=1, head_dim=16),
        TWO | {"rescale": False},
        {"alpha": False},
        torch.float32,
        False,
    ),
    ("a token without steps", Shape(tokens=1, heads=1, head_dim=16), {"num_iter": 0}, {}, torch.float32, False),
]


def check_pool(device: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    """Compare a decode step with `gka.step`: pools whose unused rows are NaN, and a batch with a padded request."""
    from hmf.ops import gka_decode

    made = sample("gka", Shape(batch=3, tokens=1, heads=2, head_dim=16, with_state=True))
    x = made.tensors(torch.float64)
    x = {name: y.to(pool_dtype).double() if name in "CU" else y[:, 0] for name, y in x.items()}
    options = {"num_iter": 4, "ridge_strength": 0.02, "rescale": True}
    tokens = [x[name] for name in ("q", "k", "v", "g", "gk", "alpha")]

    def step(precision):
        o, after = gka.step(
            *(y.to(precision) for y in tokens), (x["C"].to(precision), x["U"].to(precision)), **options, bp_lambda=True
        )
        return o, *after

    used, pools = torch.tensor([4, 1, 6]), []
    for state in (x["C"], x["U"]):
        pool = torch.full((8, *state.shape[1:]), torch.nan, dtype=pool_dtype)
        pool[used] = state.to(pool_dtype)
        pools.append(pool.to(device))
    padded = [torch.cat([y, y[:1]]).to(device, dtype if y.dim() > 2 else torch.float32) for y in tokens]
    slots = torch.tensor([*used.tolist(), 0], dtype=torch.int32, device=device)
    o, _ = gka_decode.step(*padded, tuple(pools), **options, slots=slots)
    others = torch.ones(8, dtype=torch.bool).index_fill(0, used, False)
    assert not o[-1].any() and all(pool[others.to(device)].isnan().all() for pool in pools)
    plain = [y.to(kind) for y, kind in zip(step(torch.float32), (dtype, pool_dtype, pool_dtype), strict=True)]
    outputs = [y.cpu() for y in (o[:-1], pools[0][used], pools[1][used])]
    assert_near(outputs, step(torch.float64), plain, what=f"a pool of {pool_dtype}: output, covariance, recurrent")


def shared_errors(device: str) -> dict[str, float]:
    """Of the kernels on heads that share queries, keys and values, with beta and norms inside, as a server calls them:
    documents of several chunks, of one token and of none, and one more token each, relative to the reference."""
    from hmf.ops import gka_chunk_triton, gka_decode

    generator = torch.Generator().manual_seed(0)
    bounds, heads, size, options = [0, 37, 38, 38, 54], 4, 16, {"num_iter": 5, "ridge_strength": 0.02, "rescale": True}
    q, k, v = (torch.randn(58, of, size, generator=generator).bfloat16() for of in (2, 1, 4))
    gates = torch.rand(4, 58, heads, generator=generator)
    g, gk, alpha, beta = -gates[0], -0.1 * gates[1], gates[2], gates[3]

    def expanded(at):
        x = [(y[at].float() / (y[at].float().norm(dim=-1, keepdim=True) + 1e-6)).bfloat16() for y in (q, k)]
        x = [y.double().repeat_interleave(heads // y.shape[1], 1) for y in (*x, v[at])]
        strength = beta[at, :, None].double()
        return [y[None] for y in (x[0], x[1] * strength, x[2] * strength, *(y[at].double() for y in (g, gk, alpha)))]

    def run_kernel(kernel, at, *rest, **more):
        x = [y[at].to(device) for y in (q, k, v, g, gk, alpha)]
        return kernel(*x, *rest, **options, **more, beta=beta[at].to(device), eps=1e-6)

    whole, last, cu_seqlens = slice(0, 54), slice(54, 58), torch.tensor(bounds)
    expected, state = gka.reference(*expanded(whole), None, cu_seqlens, **options)
    o, after = run_kernel(gka_chunk_triton.chunked, whole, None, cu_seqlens.to(device))
    result = {"output": (o, expected[0]), "covariance": (after[0], state[0]), "recurrent": (after[1], state[1])}
    expected, state = gka.reference(*expanded(last), state, torch.arange(5), **options)
    o, after = run_kernel(gka_decode.step, last, after)
    result |= {"next": (o, expected[0]), "next C": (after[0], state[0]), "next U": (after[1], state[1])}
    return {name: doctor.relative_error(y.cpu().double(), z) for name, (y, z) in result.items()}


def scan_errors(device: str) -> dict[str, float]:
    """Of states over the chunks of sequences of 3, 1 and 0 chunks, forwards and backwards, relative to a loop."""
    from hmf.ops import scan_triton, ssd

    sequences, heads, shape = [2, 1, 1], 2, (5, 130)
    carry, update = torch.rand(4, heads), torch.randn(4, heads, *shape)
    errors = {}
    for reverse in (False, True):
        expected, found = [(torch.empty_like(update), torch.ones(3, heads, *shape)) for _ in range(2)]
        ssd._scan(sequences, carry, update, *expected, reverse)
        found = [x.to(device) for x in found]
        scan_triton.scan(sequences, carry.to(device), update.to(device), *found, reverse)
        for name, x, y in zip(("before", "final"), found, expected, strict=True):
            errors[f"{name}, reverse {reverse}"] = doctor.relative_error(x.cpu().double(), y.double())
    return errors


POOLS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]  # tokens, states


def main() -> None:
    from hmf.ops import gka_chunk_triton, gka_triton

    interpret_as_compiled()
    gka_triton.CHUNK_SIZE = gka_chunk_triton.CHUNK_SIZE = gka_chunk_triton.NARROWEST = 16
    gka_triton.STORED = 2 * 2 * 2 * 16 * 16 * 4  # the backward takes two chunks at a time
    for name, shape, options, changes, dtype, gradients in CASES:
        made = changed(sample("gka", shape), **changes)
        reference, chunked, fast = (
            functools.partial(version, **options) for version in (gka.reference, gka.chunked, gka.fast)
        )
        expected = doctor.evaluate(reference, made, torch.float64, "cpu", gradients)
        plain = doctor.evaluate(chunked, nudged(made), dtype, "cpu", gradients)
        for tensor, value in doctor.evaluate(fast, made, dtype, "cpu", gradients).items():
            assert_near(value, expected[tensor], plain[tensor], what=f"{name}: {tensor}")
    for dtypes in POOLS:
        check_pool("cpu", *dtypes)
    small = with_small_keys(sample("gka", Shape(tokens=19, heads=1, head_dim=16)))
    expected = doctor.evaluate(gka.reference, small, torch.float64, "cpu", False)
    for tensor, value in doctor.evaluate(gka.fast, small, torch.bfloat16, "cpu", False).items():
        assert (error := doctor.relative_error(value, expected[tensor])) <= 4e-3, f"small keys: {tensor}: {error:.1e}"
    for tensor, error in shared_errors("cpu").items():
        assert error <= (4e-3 if tensor in ("output", "next") else 1e-3), (
            f"shared heads: {tensor} is off by {error:.1e}"
        )
    assert max(scan_errors("cpu").values()) <= 1e-6
    print(f"{len(CASES)} cases, 0 failures")


if __name__ == "__main__":
    main()
