# SPDX-License-Identifier: Apache-2.0
"""Stage 0: where every tensor comes from, and that the teacher inside is the base, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.layers.gdn import GatedDeltaNet
from hmf.model.checkpoint import load_model
from hmf.model.convert import drop_teacher, hybridise, mixers
from hmf.model.modeling import TEACHER
from hmf.priming.export import export
from hmf.priming.stage0 import initialise, make_stage0
from tests.data.shrink import after_first_layer
from tests.parity import SMALL, full_case, small_case, stage_0_and_1

PATTERN = Pattern.parse("*-GDN-*-GDN")


@pytest.fixture(scope="module")
def stage0(tiny_qwen3_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage0") / "fused"
    return out, make_stage0(tiny_qwen3_dir, PATTERN, out, seed=3)


@pytest.mark.parametrize("folder", [small_case("fused_gdn"), full_case("fused_gdn")])
def test_every_published_tensor_that_does_not_depend_on_chance(folder, tmp_path):
    case = stage_0_and_1(folder)
    make_stage0(case.base, case.pattern, tmp_path / "out")
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), case.fused
    assert ours.keys() == theirs.keys()
    for kind in ("constant_at_init", "derived_from_base_attention", "copied_same_name_from_base"):
        for name in case.origin[kind]:
            assert torch.equal(ours[name], theirs[name]), name
    for name in case.origin["rng_dependent"]:
        assert ours[name].shape == theirs[name].shape
        if ours[name].dim() > 1:
            assert ours[name].std().item() == pytest.approx(theirs[name].std().item(), rel=0.3), name


@pytest.mark.parametrize("symbol", ["GKA", "M2"])
@pytest.mark.parametrize("folder", [small_case("fused_gdn"), full_case("fused_gdn")])
def test_other_layer_types_start_as_gated_deltanet_does(folder, symbol):
    """The published gate, and the attention's own projections."""
    case = stage_0_and_1(folder)
    layer = case.pattern.replaced[-1]
    symbols = [symbol if index == layer else "*" for index in range(len(case.pattern))]
    fused = hybridise(load_model(case.base), Pattern.parse("-".join(symbols)))
    initialise(fused)
    ((_, mixer),) = mixers(fused)
    q, k, v, gate = (case.fused[f"model.layers.{layer}.gdn.{name}_proj.weight"] for name in "qkvg")
    if symbol == "M2":
        found, wanted = mixer.in_proj.weight[: -mixer.heads], torch.cat([gate, v, k, q])
    else:
        found = torch.cat([getattr(mixer, f"{name}_proj").weight for name in "qkvg"])
        wanted = torch.cat([q, k, v, gate])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("full", [full_case("fused_gdn")])
def test_the_small_case_is_cut_from_the_full_one(full):
    config, base, mixers, origin, stage1 = after_first_layer(full)
    small = SMALL / full.name
    assert json.loads((small / "base/config.json").read_text()) == config
    assert json.loads((small / "tensor_origin.json").read_text()) == origin
    cut = {"base/model": base, "mixers": mixers, "stage1": stage1}
    for file, tensors in cut.items():
        stored = load_file(small / f"{file}.safetensors")
        assert stored.keys() == tensors.keys()
        assert [name for name in stored if not torch.equal(stored[name], tensors[name])] == []


def test_report_counts_every_tensor(stage0):
    out, report = stage0
    assert str(report.pattern) == "*DA-GDN*-*DA-GDN*"
    assert sum(report.counts().values()) == len(load_file(out / "model.safetensors"))
    assert report.starts["model.layers.1.gdn"].unused.keys() == {"q_norm.weight", "k_norm.weight"}


def test_same_seed_same_start_and_another_seed_another(tiny_qwen3_dir, stage0, tmp_path):
    out, _ = stage0
    make_stage0(tiny_qwen3_dir, PATTERN, tmp_path / "same", seed=3)
    make_stage0(tiny_qwen3_dir, PATTERN, tmp_path / "other", seed=4)
    first, same, other = (load_file(d / "model.safetensors") for d in (out, tmp_path / "same", tmp_path / "other"))
    assert all(torch.equal(first[name], same[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed and all(".gdn." in name for name in changed)


def test_a_layer_starts_alike_whatever_else_is_replaced(tiny_qwen3):
    both, one = hybridise(tiny_qwen3, PATTERN), hybridise(tiny_qwen3, Pattern.parse("*-*-*-GDN"))
    initialise(both, seed=1)
    initialise(one, seed=1)
    for ours, theirs in zip(both.model.layers[3].gdn.parameters(), one.model.layers[3].gdn.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_teacher_path_is_the_base(tiny_qwen3, stage0):
    fused = load_model(stage0[0])
    ids = torch.randint(0, 128, (2, 33))
    with torch.no_grad():
        inputs = fused.model.prepare(input_ids=ids, use_cache=False)
        hidden = fused.model.run_layers(inputs.hidden_states, inputs, range(4), TEACHER)
        assert torch.equal(fused.lm_head(fused.model.norm(hidden)), tiny_qwen3(ids).logits)


def test_export_keeps_the_student_and_drops_the_teacher(stage0, tmp_path):
    out, _ = stage0
    fused, hybrid = load_model(out), export(out, tmp_path / "hybrid")
    stored = load_file(tmp_path / "hybrid/model.safetensors")
    assert not any("layers.1.self_attn" in name for name in stored)
    reloaded = load_model(tmp_path / "hybrid")
    ids = torch.randint(0, 128, (2, 33))
    with torch.no_grad():
        assert torch.equal(fused(ids).logits, hybrid(ids).logits)
        assert torch.equal(fused(ids).logits, reloaded(ids).logits)
    with pytest.raises(HmfError, match="has no teacher to remove"):
        export(tmp_path / "hybrid", tmp_path / "again")


def test_export_to_bfloat16_keeps_decay_in_float32(stage0, tmp_path):
    export(stage0[0], tmp_path / "hybrid", torch.bfloat16)
    stored, before = load_file(tmp_path / "hybrid/model.safetensors"), load_file(stage0[0] / "model.safetensors")
    for name, x in stored.items():
        kept = name.endswith(("A_log", "dt_bias"))
        assert x.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert not kept or torch.equal(x, before[name])
    assert load_model(tmp_path / "hybrid").dtype == torch.bfloat16


def test_an_attention_tensor_that_nobody_uses_is_an_error(tiny_qwen3):
    fused = hybridise(tiny_qwen3, PATTERN)
    fused.model.layers[1].self_attn.extra = nn.Linear(2, 2)
    with pytest.raises(HmfError, match=r"layers\.1\.gdn: .*extra\.bias, extra\.weight"):
        initialise(fused)


def test_a_mixer_tensor_without_a_start_is_an_error(tiny_qwen3, monkeypatch):
    fused = hybridise(tiny_qwen3, PATTERN)
    real = GatedDeltaNet.init_from_attention

    def forgetful(self, *args):
        start = real(self, *args)
        start.initialised.remove("b_proj.weight")
        return start

    monkeypatch.setattr(GatedDeltaNet, "init_from_attention", forgetful)
    with pytest.raises(HmfError, match=r"that are not initialised, unknown or initialised twice: b_proj\.weight"):
        initialise(fused)


def test_converting_shares_the_base_tensors(tiny_qwen3):
    fused = hybridise(tiny_qwen3, PATTERN)
    initialise(fused)
    hybrid = drop_teacher(fused)
    assert hybrid.model.embed_tokens.weight.data_ptr() == tiny_qwen3.model.embed_tokens.weight.data_ptr()
    assert [name for name, _ in mixers(hybrid)] == ["model.layers.1.gdn", "model.layers.3.gdn"]
