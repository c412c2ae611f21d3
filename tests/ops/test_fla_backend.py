# SPDX-License-Identifier: Apache-2.0
"""Our kernel in fla's backward: the gradients that autograd gives in float64, interpreted on a CPU and on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hmf.bench.doctor import relative_error
from hmf.ops import dispatch, gated_delta_rule, samples

CHUNK = 16
CASES = [  # lengths or tokens of rows, heads, K, V, delta rule
    ([37, 16, 1], 2, 20, 24, True),
    ([5], 1, 72, 80, False),
    ((2, 33), 1, 16, 40, True),
]


def expected(q, k, v, w, g, h, do, dh, dv, spans, scale):
    """Of q, k, w and g, by autograd: q, k, w [T, H, K], v, do, dv [T, H, V], g [T, H], h, dh [N, H, K, V]."""
    q, k, w, g = (x.clone().requires_grad_() for x in (q, k, w, g))
    total = torch.zeros((), dtype=torch.float64)
    for (first, end), start, after in zip(spans, h, dh, strict=True):
        at = slice(first, end)
        decay = torch.exp(g[at, None] - g[None, at]).permute(2, 0, 1).tril()  # [H, C, C]
        own = v[at] - torch.einsum("thk,hkv->thv", w[at] - w[at].detach(), start)  # the values depend on w by -w h
        scores = torch.einsum("thk,shk->hts", q[at], k[at]) * decay
        o = torch.einsum("hts,shv->thv", scores, v[at])
        o = scale * (o + torch.einsum("thk,hkv,th->thv", q[at], start, g[at].exp()))
        last = g[end - 1]
        state = start * last.exp()[:, None, None]
        state = state + torch.einsum("thk,thv,th->hkv", k[at], v[at], (last - g[at]).exp())
        total = total + (o * do[at]).sum() + (state * after).sum() + (own * dv[at]).sum()
    return torch.autograd.grad(total, (q, k, w, g))


def check(device: str, dtype: torch.dtype, tolerance: float) -> None:
    from hmf.ops.fla_backend import chunk_grads

    generator = torch.Generator().manual_seed(0)
    for lengths, heads, key_dim, value_dim, delta in CASES:
        packed = isinstance(lengths, list)
        sizes = lengths if packed else [lengths[1]] * lengths[0]
        spans, chunks, first = [], [], 0
        for sequence, size in enumerate(sizes):
            for number, start in enumerate(range(0, size, CHUNK)):
                spans.append((first + start, first + min(start + CHUNK, size)))
                chunks.append((sequence, number))
            first += size

        def made(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

        q, k, w = (made(first, heads, key_dim) for _ in range(3))
        v, do, dv = (made(first, heads, value_dim) for _ in range(3))
        h, dh = (made(len(spans), heads, key_dim, value_dim) for _ in range(2))
        g = torch.cat([-torch.rand(b - a, heads, generator=generator).cumsum(0) for a, b in spans]).double()
        truth = expected(q, k, v, w, g, h, do, dh, dv, spans, 0.3)
        rows = (1, first) if packed else lengths
        x = {
            name: y.unflatten(0, rows).to(device, dtype)
            for name, y in {"q": q, "k": k, "v": v, "w": w, "do": do, "dv": dv}.items()
        }
        x |= {name: y.to(device, dtype)[None] for name, y in {"h": h, "dh": dh}.items()}
        x["g"] = (g / torch.log(torch.tensor(2.0))).float().unflatten(0, rows).to(device)
        if not delta:
            del x["w"], x["dv"]
        if packed:
            x["cu_seqlens"] = torch.tensor([0, *sizes]).cumsum(0).to(device)
            x["chunk_indices"] = torch.tensor(chunks).to(device)
        found = chunk_grads(**x, scale=0.3, chunk_size=CHUNK)
        assert (found[2] is None) == (not delta)
        for name, y, z in zip("qkwg", found, truth, strict=True):
            if y is not None:
                error = relative_error(y.cpu().double().flatten(0, 1), z)
                assert error <= tolerance, f"{lengths}: the gradient of {name} is off by {error:.1e}"


def test_interpreted_kernel_is_autograds():
    pytest.importorskip("triton")
    program = "import torch; from tests.ops.test_fla_backend import check; check('cpu', torch.float32, 1e-5)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_compiled_kernel_is_autograds(dtype, tolerance):
    check("cuda", dtype, tolerance)


def test_the_check_is_no_part_of_what_a_checkpointed_layer_saves():
    """The first forward pass of training asks for the check, its recomputation does not."""
    samples.gradient_off.cache_clear()

    def layer(x):
        with pytest.MonkeyPatch.context() as patch:
            versions = dispatch.implementations("gdn")
            patch.setitem(dispatch._IMPLEMENTATIONS["gdn"], "fast", replace(versions["chunked"], version="fast"))
            assert samples.gradient_off("gdn", torch.float32, "cpu") is None
        return x.sin().exp()

    x = torch.ones(3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    samples.gradient_off.cache_clear()
    assert torch.equal(x.grad, torch.ones(3).sin().exp() * torch.ones(3).cos())


def test_the_check_has_the_heads_of_the_model(monkeypatch):
    """So that fla tunes its kernels once."""
    asked, chosen, choose = [], [], dispatch.choose
    monkeypatch.setattr(dispatch, "_GRADIENT_CHECK", [lambda *args: asked.append(args)])
    monkeypatch.setattr(dispatch, "miscompiled", lambda: "fla's backward is wrong here")
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setattr(dispatch, "choose", lambda *args: chosen.append(args) or choose(*args))
    q = torch.ones(1, 5, 3, 16, requires_grad=True)
    gated_delta_rule(q, q, q, -torch.ones(1, 5, 3), torch.ones(1, 5, 3))
    choose("gdn", "cuda", *chosen[0][2:])
    assert asked == [("gdn", torch.float32, "cuda", (3, 16))]


@pytest.mark.parametrize("op", ["gdn", "ssd"])
@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_a_gradient_that_is_off_is_not_trusted(monkeypatch, op, factor):
    """On a CPU the plain version stands for the kernel, with a factor on its result's gradient."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return factor * gradient

    versions = dispatch.implementations(op)
    plain = versions["chunked"].function

    def kernel(*args, **kwargs):
        o, states = plain(*args, **kwargs)
        return Scaled.apply(o), states

    monkeypatch.setitem(dispatch._IMPLEMENTATIONS[op], "fast", replace(versions["fast"], function=kernel))
    samples.gradient_off.cache_clear()
    reason = samples.gradient_off(op, torch.bfloat16, "cpu")
    samples.gradient_off.cache_clear()
    assert reason is None if factor == 1.0 else "gradient of q has a relative error of 0.2" in reason
