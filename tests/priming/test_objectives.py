# SPDX-License-Identifier: Apache-2.0
"""Stage-1 losses: the published software's numbers, padding, packing, and what gets a gradient."""

import pytest
import torch
from safetensors.torch import load_file

from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.model.checkpoint import load_model
from hmf.model.convert import drop_teacher, hybridise
from hmf.model.modeling import STUDENT, TEACHER
from hmf.priming.objectives import PARTS, LayerwiseObjective, Stage1Objective, logit_divergence, train_only_mixers
from hmf.priming.stage0 import initialise


@pytest.fixture
def fused(tiny_qwen3):
    model = hybridise(tiny_qwen3, Pattern.parse("*-GDN-*-GDN"))
    initialise(model)
    return model


@pytest.fixture(scope="module")
def published(parity_dir):
    case = parity_dir / "fused_gdn"
    return case, load_model(case / "fused"), load_file(case / "stage1.safetensors")


@pytest.mark.parametrize(
    ("layers", "pre_lm_head"), [*((p, True) for p in PARTS), *((p, False) for p in PARTS if PARTS[p])]
)
def test_losses_are_the_published_ones(published, layers, pre_lm_head):
    _, model, stored = published
    losses = model(input_ids=stored["input_ids"], objective=Stage1Objective(layers, pre_lm_head))
    wanted = stored[f"loss.eval.{layers}.pre_lm_head={pre_lm_head}"].item()
    assert losses["loss"].item() == pytest.approx(wanted, abs=1e-5)


def test_gradients_are_the_published_ones(published):
    case, model, stored = published
    model.zero_grad()
    trainable = train_only_mixers(model)
    model(input_ids=stored["input_ids"], objective=Stage1Objective())["loss"].backward()
    gradients = load_file(case / "stage1_grads_none_prelmhead.safetensors")
    assert {f"grad.{name}" for name in trainable} == gradients.keys()
    for name, wanted in gradients.items():
        error = (model.get_parameter(name.removeprefix("grad.")).grad - wanted).norm() / wanted.norm()
        assert error < 1e-4, name
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


def test_padding_does_not_count(fused):
    ids, mask = torch.randint(0, 128, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    objective = Stage1Objective("all")
    both = objective(fused, input_ids=ids, attention_mask=mask)["loss"]
    first, second = objective(fused, input_ids=ids[:1])["loss"], objective(fused, input_ids=ids[1:, 8:])["loss"]
    assert both.item() == pytest.approx((first.item() * 20 + second.item() * 12) / 32, rel=1e-5)


def test_packed_documents_do_not_see_each_other(fused):
    ids, positions = torch.randint(0, 128, (1, 30)), torch.cat([torch.arange(18), torch.arange(12)])[None]
    objective = Stage1Objective("all")
    packed = objective(fused, input_ids=ids, position_ids=positions)["loss"]
    first, second = objective(fused, input_ids=ids[:, :18])["loss"], objective(fused, input_ids=ids[:, 18:])["loss"]
    assert packed.item() == pytest.approx((first.item() * 18 + second.item() * 12) / 30, rel=1e-5)


def test_a_plain_hybrid_is_refused(fused):
    with pytest.raises(HmfError, match="hmf init"):
        Stage1Objective()(drop_teacher(fused), input_ids=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(HmfError, match="nothing to compare"):
        Stage1Objective("none", pre_lm_head=False)(fused, input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_divergence_is_the_dense_one_for_any_chunking(fused):
    torch.manual_seed(1)
    head = fused.get_output_embeddings()
    ours, theirs = torch.randn(2, 2, 15, 64)
    ours.requires_grad_()
    for direction in ("forward", "reverse"):
        p, q = (head(x).softmax(-1) for x in ((theirs, ours) if direction == "forward" else (ours, theirs)))
        dense = (p * (p.log() - q.log())).sum(-1)
        (wanted,) = torch.autograd.grad(dense.sum(), ours)
        for chunk_size in (1, 7, 30, 100):
            found = logit_divergence(ours, theirs, head, direction, chunk_size)
            (gradient,) = torch.autograd.grad(found.sum(), ours)
            assert torch.allclose(found, dense, atol=1e-5)
            assert torch.allclose(gradient, wanted, atol=1e-5)


def test_supervised_tokens_are_those_whose_successor_has_a_label(fused):
    ids = torch.randint(0, 128, (1, 12))
    labels = torch.full_like(ids, -100)
    labels[0, 6:9] = ids[0, 6:9]
    objective = Stage1Objective(pre_lm_head=False, kl=1.0, kl_tokens="supervised")
    with torch.no_grad():
        some = objective(fused, input_ids=ids, labels=labels)["loss"]
        inputs = fused.model.prepare(input_ids=ids, use_cache=False)
        finals = {
            path: fused.model.norm(fused.model.run_layers(inputs.hidden_states, inputs, range(4), path))
            for path in (STUDENT, TEACHER)
        }
        each = logit_divergence(finals[STUDENT], finals[TEACHER], fused.get_output_embeddings())
    assert some.item() == pytest.approx(each[0, 5:8].mean().item(), rel=1e-5)
    with pytest.raises(HmfError, match="needs labels"):
        objective(fused, input_ids=ids)


def test_layerwise_gives_each_mixer_its_own_attentions_task(fused):
    ids, positions = torch.randint(0, 128, (1, 30)), torch.cat([torch.arange(18), torch.arange(12)])[None]
    trainable = train_only_mixers(fused)
    loss = fused(input_ids=ids, position_ids=positions, objective=LayerwiseObjective())["loss"]
    loss.backward()
    assert {name for name, p in fused.named_parameters() if p.grad is not None} == set(trainable)
    # A layer's loss does not depend on the other mixer.
    before = fused.model.layers[3].gdn.o_proj.weight.grad.clone()
    fused.zero_grad()
    with torch.no_grad():
        fused.model.layers[1].gdn.o_proj.weight.mul_(3)
    fused(input_ids=ids, position_ids=positions, objective=LayerwiseObjective())["loss"].backward()
    assert torch.equal(before, fused.model.layers[3].gdn.o_proj.weight.grad)


def test_layerwise_is_nothing_when_the_mixer_is_the_attention(tiny_qwen3):
    model = hybridise(tiny_qwen3, Pattern.parse("*-SWA-*-SWA"), {"swa_config": {"window_size": 64}})
    initialise(model)
    ids, mask = torch.randint(0, 128, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    assert model(input_ids=ids, attention_mask=mask, objective=LayerwiseObjective())["loss"].item() < 1e-10
    assert model(input_ids=ids, attention_mask=mask, objective=Stage1Objective("all"))["loss"].item() < 1e-9
