# SPDX-License-Identifier: Apache-2.0
"""Stage-1 losses: the published software's numbers, padding, packing, and what gets a gradient."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hmf.config.pattern import Pattern
from hmf.config.runs import ObjectiveSettings
from hmf.errors import HmfError
from hmf.model.checkpoint import load_model
from hmf.model.convert import drop_teacher, hybridise, mixers
from hmf.model.modeling import STUDENT, TEACHER
from hmf.priming.divergence import logit_divergence
from hmf.priming.objectives import (
    PARTS,
    LayerwiseObjective,
    Stage1Objective,
    attention_sizes,
    objective_at,
    token_counts,
    train_only_mixers,
)
from hmf.priming.stage0 import initialise
from tests.numerics import SAME, assert_near, assert_same, check
from tests.ops.cases import normal
from tests.parity import full_case, small_case, stage_0_and_1

in_float64 = pytest.mark.usefixtures("in_float64")


@pytest.fixture
def fused(tiny_qwen3):
    model = hybridise(tiny_qwen3, Pattern.parse("*-GDN-*-GDN"))
    initialise(model)
    return model


@pytest.fixture(scope="module", params=[small_case("fused_gdn"), full_case("fused_gdn")])
def published(request):
    """The stored case and its fused model."""
    case = stage_0_and_1(request.param)
    published_eps = {"gdn_config": {"norm_eps": 1e-5}}  # a new layer here starts with the base's
    model = hybridise(load_model(case.base), case.pattern, published_eps)
    model.load_state_dict(case.fused, strict=not model.config.tie_word_embeddings)
    return case, model.eval()


@pytest.mark.parametrize(
    ("layers", "pre_lm_head"), [*((p, True) for p in PARTS), *((p, False) for p in PARTS if PARTS[p])]
)
def test_losses_are_the_published_ones(published, layers, pre_lm_head):
    case, model = published
    losses = model(input_ids=case.stage1["input_ids"], objective=Stage1Objective(layers, pre_lm_head))
    wanted = case.stage1[f"loss.eval.{layers}.pre_lm_head={pre_lm_head}"]
    assert_near(losses["loss"], wanted, wanted)


def test_gradients_are_the_published_ones(published):
    case, model = published
    model.zero_grad()
    trainable = train_only_mixers(model)
    model(input_ids=case.stage1["input_ids"], objective=Stage1Objective())["loss"].backward()
    assert case.gradients and case.gradients.keys() <= set(trainable)
    for name, wanted in case.gradients.items():
        assert_near(model.get_parameter(name).grad, wanted, case.by_kernels[name], name)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trainable)


@in_float64
def test_padding_does_not_count(fused):
    fused.double()
    ids, mask = torch.randint(0, 128, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    objective = Stage1Objective("all")
    both = objective(fused, input_ids=ids, attention_mask=mask)["loss"]
    first, second = objective(fused, input_ids=ids[:1])["loss"], objective(fused, input_ids=ids[1:, 8:])["loss"]
    assert_same(both, (first * 20 + second * 12) / 32)


@in_float64
def test_packed_documents_do_not_see_each_other(fused):
    fused.double()
    ids, positions = torch.randint(0, 128, (1, 30)), torch.cat([torch.arange(18), torch.arange(12)])[None]
    objective = Stage1Objective("all")
    packed = objective(fused, input_ids=ids, position_ids=positions)["loss"]
    first, second = objective(fused, input_ids=ids[:, :18])["loss"], objective(fused, input_ids=ids[:, 18:])["loss"]
    assert_same(packed, (first * 18 + second * 12) / 30)


def test_a_plain_hybrid_is_refused(fused):
    with pytest.raises(HmfError, match="hmf init"):
        Stage1Objective()(drop_teacher(fused), input_ids=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(HmfError, match="objective: has no term"):
        Stage1Objective("none", pre_lm_head=False)(fused, input_ids=torch.zeros(1, 4, dtype=torch.long))


def dense_divergence(ours, theirs, head, direction, top_k=None, temperature=1.0):
    """KL in float64 from whole probabilities, [N]."""
    p, q = ((x.double() @ head.weight.double().T / temperature).softmax(-1) for x in (theirs, ours))
    if top_k:
        kept = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(top_k, -1).indices, True)
        p, q = (torch.cat([x[kept].view(len(x), -1), (x * ~kept).sum(-1, keepdim=True)], -1) for x in (p, q))
    if direction == "reverse":
        p, q = q, p
    return (p * (p.log() - q.log())).sum(-1) * temperature**2


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("top_k", "temperature"), [(None, 1.0), (None, 3.0), (5, 1.0), (1, 0.5)])
def test_divergence_is_the_dense_one_for_any_chunking(direction, top_k, temperature):
    head = torch.nn.Linear(24, 50, bias=False).double().requires_grad_(False)
    ours, theirs, weight = normal(30, 24).requires_grad_(), normal(30, 24), normal(30).abs()
    dense = dense_divergence(ours, theirs, head, direction, top_k, temperature)
    (wanted,) = torch.autograd.grad((dense * weight).sum(), ours)
    for chunk_size in (1, 7, 30, None):
        found = logit_divergence(ours, theirs, head, direction, top_k, temperature, chunk_size)
        (gradient,) = torch.autograd.grad((found * weight).sum(), ours)
        assert_same([found, gradient], [dense, wanted])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_tokens_where_the_likeliest_differ_have_another_weight(direction, weight):
    head = torch.nn.Linear(24, 50, bias=False).double().requires_grad_(False)
    ours, theirs = normal(40, 24).requires_grad_(), normal(40, 24)
    theirs[::2] = ours.detach()[::2] + 0.01 * normal(20, 24)
    plain = logit_divergence(ours, theirs, head, direction, chunk_size=7)
    differs = head(ours).argmax(-1) != head(theirs).argmax(-1)
    assert 10 < differs.sum() < 30
    found = logit_divergence(ours, theirs, head, direction, chunk_size=7, differing_weight=weight)
    factors = torch.where(differs, weight, 1.0).double()
    gradients = [torch.autograd.grad(x.sum(), ours)[0] for x in (found, plain)]
    assert_same([found, gradients[0]], [plain * factors, gradients[1] * factors[:, None]])


@given(st.integers(1, 48), st.sampled_from(["forward", "reverse"]), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_rest_as_one_outcome_never_adds_divergence(top_k, direction, seed):
    torch.manual_seed(seed)
    head = torch.nn.Linear(8, 50, bias=False).double().requires_grad_(False)
    ours, theirs = 3 * normal(2, 6, 8)
    with torch.no_grad():
        full, some, more = (logit_divergence(ours, theirs, head, direction, k) for k in (None, top_k, top_k + 1))
    assert (some <= more + SAME).all() and (more <= full + SAME).all() and (some >= -SAME).all()


def test_whole_logits_never_exist(fused):
    fused.resize_token_embeddings(131)  # a width that no tensor of a layer has
    head = fused.get_output_embeddings().weight

    class LargestLogits(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, list | tuple) else (result,):
                if not torch.is_tensor(x) or x.untyped_storage().data_ptr() == head.untyped_storage().data_ptr():
                    continue
                if x.shape[-1:] == (fused.config.vocab_size,):
                    self.rows = max(self.rows, x.shape[:-1].numel())
            return result

    train_only_mixers(fused)
    ids = torch.randint(0, 128, (2, 24))
    for options in ({}, {"kl_direction": "reverse"}, {"kl_top_k": 3}):
        objective = Stage1Objective(kl=1.0, kl_chunk_size=7, **options)
        with LargestLogits() as largest:
            fused(input_ids=ids, objective=objective)["loss"].backward()
        assert largest.rows == 7


def test_an_unfit_head_or_top_k_is_refused(fused):
    hidden = torch.randn(2, 64, requires_grad=True)
    with pytest.raises(HmfError, match="train_only_mixers"):
        logit_divergence(hidden, hidden, fused.get_output_embeddings())
    train_only_mixers(fused)
    with pytest.raises(HmfError, match="kl_top_k: 128 is not below the vocabulary size, 128"):
        logit_divergence(hidden, hidden, fused.get_output_embeddings(), top_k=128)


def test_the_teachers_path_keeps_nothing_and_shared_layers_run_once(fused):
    """Layer 0 is the first path's and the second's; from layer 1 on each path runs its own."""
    train_only_mixers(fused)
    runs, kept = [], []
    for index, layer in enumerate(fused.model.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append((index, torch.is_grad_enabled())))
    fused.model.layers[1].self_attn.register_forward_hook(lambda *_: kept.append(len(saved)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        fused(input_ids=torch.arange(20)[None], objective=Stage1Objective("all", kl=1.0))
    teacher, student = [(index, False) for index in (1, 2, 3)], [(index, True) for index in (1, 2, 3)]
    assert runs == [(0, False), *teacher, *student]
    assert kept == [0] and saved


SPLITS = {"all": {"layers": "all", "kl": 0.5}, "answers": {"kl": 2.0, "kl_tokens": "supervised", "pre_lm_head": 0.3}}


@pytest.mark.parametrize("name", [*SPLITS, "layerwise"])
def test_losses_and_gradients_of_parts_add_up_to_those_of_the_whole(fused, name):
    """Documents packed in one row, padded in a batch, or alone, in one step or several."""
    model = fused.double()
    train_only_mixers(model)
    lengths = (18, 7, 12)
    documents = [torch.randint(3, 128, (1, n)) for n in lengths]
    labels = [
        torch.cat([torch.full((1, n - k), -100), x[:, n - k :]], 1)
        for n, k, x in zip(lengths, (3, 5, 0), documents, strict=True)
    ]
    alone = [{"input_ids": x, "labels": y} for x, y in zip(documents, labels, strict=True)]
    packed = {
        "input_ids": torch.cat(documents, 1),
        "labels": torch.cat(labels, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    padded = {
        "input_ids": torch.cat([torch.nn.functional.pad(x, (18 - x.shape[1], 0)) for x in documents]),
        "labels": torch.cat([torch.nn.functional.pad(x, (18 - x.shape[1], 0), value=-100) for x in labels]),
        "attention_mask": torch.cat([(torch.arange(18) >= 18 - n).long()[None] for n in lengths]),
    }
    if name == "layerwise":
        objective = LayerwiseObjective(attention_sizes(model, **packed))
    else:
        objective = Stage1Objective(**SPLITS[name])

    def run(*batches):
        model.zero_grad()
        counts = sum(token_counts(**batch) for batch in batches)
        losses = [model(**batch, objective=objective, counts=counts)["loss"] for batch in batches]
        sum(losses).backward()
        return sum(losses), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wanted_loss, wanted = run(packed)
    for batches in (alone, [padded], [alone[1], alone[0], alone[2]]):
        loss, gradient = run(*batches)
        assert_same([loss, gradient / wanted.norm()], [wanted_loss, wanted / wanted.norm()])


def test_weights_follow_straight_lines_between_steps():
    schedule = ObjectiveSettings(kl={10: 0.0, 20: 2.0, 30: 1.0}, layerwise_steps=5, layers="mixer", layers_weight=3)
    assert [schedule.weights_at(step)["kl"] for step in (0, 10, 15, 20, 25, 30, 99)] == [0, 0, 1, 2, 1.5, 1, 1]
    assert objective_at(schedule, 4, (1.0,)) == LayerwiseObjective((1.0,))
    assert objective_at(schedule, 15) == Stage1Objective("mixer", 1.0, 1.0, layers_weight=3.0)
    assert objective_at(ObjectiveSettings(pre_lm_head=False, kl=1, kl_top_k=8), 0) == Stage1Objective(
        pre_lm_head=0, layers_weight=0, kl=1.0, kl_top_k=8
    )
    for bad in ({"pre_lm_head": False}, {"pre_lm_head": {0: 1, 50: 0}}, {"kl": {}}, {"kl": {0: -1}}, {"kl": {-1: 1}}):
        with pytest.raises(ValueError):
            ObjectiveSettings(**bad)
    ObjectiveSettings(pre_lm_head=False, kl={100: 0, 150: 1}, layerwise_steps=120)


@in_float64
def test_supervised_tokens_are_those_whose_successor_has_a_label(fused):
    fused.double()
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
        each = logit_divergence(finals[STUDENT][0], finals[TEACHER][0], fused.get_output_embeddings())
    assert_same(some, each[5:8].mean())
    train_only_mixers(fused)
    nothing = objective(fused, input_ids=ids, labels=torch.full_like(ids, -100))["loss"]
    nothing.backward()
    assert nothing == 0 and not any(p.grad.any() for p in fused.parameters() if p.requires_grad)
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


@in_float64
def test_layerwise_is_the_mean_over_layers_of_relative_squared_errors(tiny_qwen3):
    def loss(pattern, objective, silent=False):
        model = hybridise(copy.deepcopy(tiny_qwen3), Pattern.parse(pattern))
        initialise(model)
        if silent:
            for _, mixer in mixers(model):
                mixer.o_proj.weight.data.zero_()
        return model.double()(input_ids=ids, attention_mask=mask, objective=objective)["loss"], model

    ids, mask = torch.randint(0, 128, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    both, first, second = (
        loss(pattern, LayerwiseObjective())[0] for pattern in ("*-GDN-*-GDN", "*-GDN-*-*", "*-*-*-GDN")
    )
    assert_same(both, (first + second) / 2)
    nothing, model = loss("*-GDN-*-GDN", LayerwiseObjective(), silent=True)
    assert_same(nothing, torch.ones_like(nothing))  # off by all that is wanted
    sizes = attention_sizes(model, input_ids=ids, attention_mask=mask)
    absolute = loss("*-GDN-*-GDN", LayerwiseObjective((1.0, 1.0)), silent=True)[0]
    assert_same(absolute, torch.tensor(sizes).double().mean())


@in_float64
def test_layerwise_is_nothing_when_the_mixer_is_the_attention(tiny_qwen3):
    model = hybridise(tiny_qwen3.double(), Pattern.parse("*-SWA-*-SWA"), {"swa_config": {"window_size": 64}})
    initialise(model)
    ids, mask = torch.randint(0, 128, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    for objective in (LayerwiseObjective(), Stage1Objective("all")):
        check(model(input_ids=ids, attention_mask=mask, objective=objective)["loss"].item(), SAME)


@pytest.mark.parametrize("kind", ["swa", "bmojo"])
@in_float64
def test_layerwise_where_queries_grow_with_their_position(kind):
    """Ministral 3 does that to queries; its mixers receive the positions as its attention does."""
    from transformers import Ministral3Config, Ministral3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.7}
    rope["original_max_position_embeddings"] = 4
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    base = Ministral3ForCausalLM(Ministral3Config(**sizes, **heads, rope_parameters=rope)).double().eval()
    pattern = Pattern.parse({"swa": "*-SWA", "bmojo": "*-BMF"}[kind])
    model = hybridise(base, pattern, {f"{kind}_config": {"window_size": 64}})
    initialise(model)
    ids, objective = torch.randint(0, 64, (2, 20)), LayerwiseObjective()
    check(model(input_ids=ids, objective=objective)["loss"].item(), SAME)


def test_the_teachers_outputs_have_no_dropout(fused):
    """The students' do, in layers that both share."""
    ids = torch.arange(3, 15)[None]
    fused.config.attention_dropout = 0.5
    for layer in fused.model.layers:
        layer.self_attn.attention_dropout = 0.5
    fused.train()
    sizes = [attention_sizes(fused, input_ids=ids) for _ in range(2)]
    assert sizes[0] == sizes[1] and all(module.training for module in fused.modules())
    losses = [fused(input_ids=ids, objective=Stage1Objective())["loss"].item() for _ in range(2)]
    assert losses[0] != losses[1]
