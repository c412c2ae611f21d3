# SPDX-License-Identifier: Apache-2.0
"""What every layer type must keep, whatever happens around it: splits, padding, packing, batching, casts, saving.

Each test runs on a tiny float64 Hybrid, for every row of `hmf.layers.registry.MIXERS`; see `tests/hybrids.py`.
Legend: B batch, T tokens.
"""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from hmf.errors import HmfError
from hmf.layers.registry import MIXERS
from tests.hybrids import cases, random_ids, tiny_config, tiny_hybrid
from tests.numerics import assert_mean_near
from tests.numerics import assert_same as same

LONG, SHORT = 70, 18  # more than a chunk of 64, and enough for a variant of what was tried at length
ONE_EACH = [next(case for case in cases() if case.symbol == symbol) for symbol in MIXERS]
# The mixer is the first layer in all of them; one model has no attention at all, one has every layer type.
MAIN = [(case, pattern, LONG) for case in ONE_EACH for pattern in ("X-*-X", "X-X")]
MAIN.append((ONE_EACH[0], "-".join([*MIXERS, "*"]), LONG))
VARIANTS = [(case, "X-*", SHORT) for case in cases() if case not in ONE_EACH]


in_float64 = pytest.mark.usefixtures("in_float64")


def parametrise(names: str, main: list[str] | None = None, variants: list[str] | None = None):
    """Every model as case, pattern, tokens; with one more argument: its values for the main models and the variants."""
    if main is None:
        rows = MAIN + VARIANTS
    else:
        rows = [(*model, value) for model in MAIN for value in main]
        rows += [(*model, value) for model in VARIANTS for value in variants]
    ids = ["_".join(map(str, (*row[:2], *row[3:]))) for row in rows]
    return lambda test: in_float64(pytest.mark.parametrize(names, rows, ids=ids)(test))


every_model = parametrise("case, pattern, tokens")
each_type = pytest.mark.parametrize("case", ONE_EACH, ids=str)


def one_each(test):
    return in_float64(each_type(test))


def few_examples(count: int) -> settings:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def positions(mask: torch.Tensor) -> torch.Tensor:
    """position_ids [B, T] that count the real tokens of `mask`."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def rows_alone(model, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The logits of each row's real tokens, computed without the other rows and without padding."""
    return [model(row[real][None], use_cache=False).logits[0] for row, real in zip(ids, mask.bool(), strict=True)]


def padding_mask(kind: str, lengths: list[int], tokens: int) -> torch.Tensor:
    mask = torch.zeros(len(lengths), tokens, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        if kind == "left":
            row[tokens - length :] = 1
        elif kind == "right":
            row[:length] = 1
        else:
            row[torch.randperm(tokens)[:length]] = 1
    return mask


def parameter_gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))


def same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        same(actual[name], gradient, what=name)


# --- one sequence in pieces ---


@every_model
@torch.no_grad()
def test_any_split_of_a_prefill(case, pattern, tokens):
    """Cached forwards over any pieces of a batch, rows with padding anywhere, give each row's own logits."""
    model = tiny_hybrid(case, pattern)
    ids = random_ids(3, tokens)

    @few_examples(4 if tokens == LONG else 2)
    @given(
        cuts=st.sets(st.integers(1, tokens - 1), max_size=4),
        kind=st.sampled_from(["none", "left", "right", "holes"]),
        length=st.integers(1, tokens - 1),
    )
    def check(cuts, kind, length):
        lengths = [tokens] * 3 if kind == "none" else [tokens, length, max(1, length // 2)]
        mask = padding_mask(kind, lengths, tokens)
        cache, pieces = DynamicCache(config=model.config), []
        bounds = [0, *sorted(cuts), tokens]
        for begin, end in zip(bounds, bounds[1:], strict=False):
            given = (
                {}
                if kind == "none"
                else {"attention_mask": mask[:, :end], "position_ids": positions(mask)[:, begin:end]}
            )
            pieces.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **given).logits)
        assert cache.get_seq_length() == tokens
        for row, real, alone in zip(torch.cat(pieces, 1), mask.bool(), rows_alone(model, ids, mask), strict=True):
            same(row[real], alone)

    check()


@every_model
@torch.no_grad()
def test_step_by_step_decode_is_the_full_forward(case, pattern, tokens):
    model, ids = tiny_hybrid(case, pattern), random_ids(2, 14)
    cache = None
    steps = []
    for t in range(ids.shape[1]):
        output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    same(torch.cat(steps, 1), model(ids, use_cache=False).logits)


@every_model
@torch.no_grad()
def test_sequential_definition_is_the_default(case, pattern, tokens, monkeypatch):
    model, ids = tiny_hybrid(case, pattern), random_ids(1, tokens)
    default = model(ids).logits
    monkeypatch.setenv("HMF_OPS", "reference")
    same(default, model(ids).logits)


# --- batches ---


@parametrise("case, pattern, tokens, kind", main=["left", "right", "holes"], variants=["holes"])
def test_padded_batch_is_each_row_alone(case, pattern, tokens, kind):
    """Logits and parameter gradients."""
    model, ids = tiny_hybrid(case, pattern), random_ids(3, 12)
    mask = padding_mask(kind, [12, 1, 7], 12)
    logits = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
    alone = rows_alone(model, ids, mask)
    same(logits[mask.bool()], torch.cat(alone))
    target = torch.randn_like(torch.cat(alone))
    actual = parameter_gradients(model, (logits[mask.bool()] * target).sum())
    same_gradients(actual, parameter_gradients(model, (torch.cat(alone) * target).sum()))


@one_each
@torch.no_grad()
def test_values_at_padding_are_never_read_and_come_out_as_zeros(case):
    """Not even to be multiplied by zero: they may be anything, NaN too."""
    model, ids = tiny_hybrid(case, "X-X"), random_ids(3, 12)
    mask = padding_mask("holes", [12, 1, 7], 12)
    embeds = model.get_input_embeddings()(ids)
    given = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": True}
    wanted = model(inputs_embeds=embeds, **given)
    outputs = []
    model.model.layers[0].get_submodule(model.model.layers[0].mixer_name).register_forward_hook(
        lambda module, args, output: outputs.append(output[0])
    )
    found = model(inputs_embeds=embeds.masked_fill(mask[..., None] == 0, torch.nan), **given)
    assert torch.equal(found.logits[mask.bool()], wanted.logits[mask.bool()])
    for ours, theirs in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert all(torch.equal(ours.states[name], x) for name, x in theirs.states.items())
    assert not outputs[0][mask == 0].any()


@every_model
@torch.no_grad()
def test_padded_prefill_then_decode(case, pattern, tokens):
    """What generate does with a left-padded batch, without positions; then several new tokens at once."""
    model, ids = tiny_hybrid(case, pattern), random_ids(3, 16)
    mask = torch.cat([padding_mask("left", [12, 1, 7], 12), torch.ones(3, 4, dtype=torch.long)], 1)
    cache, pieces = DynamicCache(config=model.config), []
    for begin, end in ((0, 12), (12, 13), (13, 15), (15, 16)):
        piece = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        pieces.append(piece.logits)
    same(torch.cat(pieces, 1)[mask.bool()], torch.cat(rows_alone(model, ids, mask)))


@one_each
@torch.no_grad()
def test_batch_is_its_rows(case):
    model, ids = tiny_hybrid(case), random_ids(3, 20)
    full = torch.ones_like(ids)
    expected = torch.cat(rows_alone(model, ids, full))
    same(model(ids).logits.flatten(0, 1), expected)
    same(model(ids, attention_mask=full, position_ids=positions(full)).logits.flatten(0, 1), expected)


@parametrise("case, pattern, tokens, how", main=["position_ids", "cu_seq_lens_q", "both"], variants=["position_ids"])
def test_packed_documents_are_each_document_alone(case, pattern, tokens, how):
    """Outputs, gradients of the inputs and of the parameters."""
    model, lengths = tiny_hybrid(case, pattern), [5, 1, tokens - 9, 2]
    embeds = model.get_input_embeddings()(random_ids(1, sum(lengths))).detach().requires_grad_()
    given = {}
    if how != "cu_seq_lens_q":
        given["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    if how != "position_ids":
        given["cu_seq_lens_q"] = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = model(inputs_embeds=embeds, use_cache=False, **given).logits
    alone = torch.cat([model(inputs_embeds=doc, use_cache=False).logits for doc in embeds.split(lengths, 1)], 1)
    same(packed, alone)
    target = torch.randn_like(alone)
    actual, expected = (torch.autograd.grad((x * target).sum(), embeds, retain_graph=True)[0] for x in (packed, alone))
    same_gradients({"inputs_embeds": actual}, {"inputs_embeds": expected})
    actual, expected = (parameter_gradients(model, (x * target).sum()) for x in (packed, alone))
    same_gradients(actual, expected)


# --- the cache ---


@pytest.mark.parametrize("pattern", ["X-*-X", "X-X"])
@one_each
@torch.no_grad()
def test_cache_follows_its_rows(case, pattern):
    """Rows of a used cache are reordered, selected, repeated and copied with all they hold."""
    model, ids = tiny_hybrid(case, pattern), random_ids(3, 11)
    before = DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=before, use_cache=True)
    expected = model(ids, use_cache=False).logits[:, 9:]
    rows = torch.tensor([2, 0, 1])
    changes = {
        "reorder_cache": (lambda cache: cache.reorder_cache(rows), rows),
        "batch_select_indices": (lambda cache: cache.batch_select_indices(rows[:2]), rows[:2]),
        "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
        "copy": (lambda cache: None, torch.arange(3)),  # last: the runs on copies left the original alone
    }
    for change, kept in changes.values():
        cache = copy.deepcopy(before)
        change(cache)
        same(model(ids[kept, 9:], past_key_values=cache, use_cache=True).logits, expected[kept])
    if "*" in pattern:
        return  # transformers' own reset of an attention layer blanks the keys but keeps their number
    before.reset()
    same(model(ids[:, :9], past_key_values=before, use_cache=True).logits, model(ids[:, :9], use_cache=False).logits)


@one_each
@torch.no_grad()
def test_cache_made_without_a_config(case):
    model, ids, cache = tiny_hybrid(case), random_ids(2, 9), DynamicCache()
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([4, 5], 1)]
    same(torch.cat(pieces, 1), model(ids, use_cache=False).logits)


@one_each
@torch.no_grad()
def test_cache_refuses_what_it_cannot_do(case):
    model, ids = tiny_hybrid(case, "X-*"), random_ids(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(HmfError, match="rolled back"):
        cache.crop(-2)
    with pytest.raises(HmfError, match="past_key_values: the cache has 2 layers and the model has 3"):
        tiny_hybrid(case, "X-*-X")(ids, past_key_values=cache)
    with pytest.raises(HmfError, match="another model, or prefix tuning, filled the cache"):
        tiny_hybrid(case, "X-X")(ids, past_key_values=cache)
    lengths = torch.tensor([0, 2, 6])
    with pytest.raises(HmfError, match="cu_seq_lens_q"):
        model(ids, past_key_values=model(ids, use_cache=True).past_key_values, cu_seq_lens_q=lengths)
    with pytest.raises(HmfError, match="cu_seq_lens_q"):
        model(random_ids(2, 6), cu_seq_lens_q=lengths)
    with pytest.raises(HmfError, match="both padding and packed documents"):
        model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


# --- the model around the layer ---


@each_type  # what is computed again in the backward would not be in the fixture's context
def test_gradient_checkpointing_changes_no_gradient(case):
    model, ids = tiny_hybrid(case).train(), random_ids(2, 20)
    plain = parameter_gradients(model, model(ids, labels=ids).loss)
    assert not [name for name, gradient in plain.items() if not gradient.abs().sum() > 0]
    model.gradient_checkpointing_enable()
    same_gradients(parameter_gradients(model, model(ids, labels=ids).loss), plain)


@one_each
@torch.no_grad()
def test_hidden_states_and_embeddings(case):
    model, ids = tiny_hybrid(case), random_ids(2, 9)
    output = model(ids, output_hidden_states=True)
    embeds = model.get_input_embeddings()(ids)
    assert [state.shape for state in output.hidden_states] == [embeds.shape] * 4
    same(output.hidden_states[0], embeds)
    same(model.lm_head(output.hidden_states[-1]), output.logits)
    same(model(inputs_embeds=embeds).logits, output.logits)


@one_each
@torch.no_grad()
def test_attention_implementations_agree(case):
    model, ids = tiny_hybrid(case), random_ids(2, 9)
    mask = padding_mask("left", [9, 4], 9)
    given = {"attention_mask": mask, "position_ids": positions(mask)}
    sdpa = model(ids, **given).logits[mask.bool()]
    model.set_attn_implementation("eager")
    same(model(ids, **given).logits[mask.bool()], sdpa)


# --- files and casts ---


@pytest.mark.parametrize("case", cases(), ids=str)
@torch.no_grad()
def test_save_and_load(case, tmp_path):
    """Bit for bit."""
    model, ids = tiny_hybrid(case).float(), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@each_type
@torch.no_grad()
def test_cast_keeps_the_recurrence_in_float32(case, tmp_path):
    """By `from_pretrained` and by every cast of a module; a file in bfloat16 comes back as it was, and runs."""
    model, ids = tiny_hybrid(case).float(), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    check_kept_parameters(half, model)
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda module: module.to(torch.bfloat16)):
        check_kept_parameters(cast(copy.deepcopy(model)), model)
    half.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert_close(dict(again.named_parameters()), dict(half.named_parameters()), atol=0, rtol=0)
    cached = again(ids[:, :5], use_cache=True)
    steps = [cached.logits, again(ids[:, 5:], past_key_values=cached.past_key_values, use_cache=True).logits]
    # What rounding the weights does says how much rounding everything else may do.
    assert_mean_near(torch.cat(steps, 1), model.double()(ids).logits, again.double()(ids).logits)


def check_kept_parameters(cast, original):
    """`cast` has its decays and the like in float32, bit-exact, and everything else in two bytes."""
    mixers = {
        i: cast.model.layers[i].get_submodule(cast.model.layers[i].mixer_name) for i in cast.config.pattern.replaced
    }
    kept = {name for mixer in mixers.values() for name in mixer.float32_parameters} | {"A_log", "dt_bias"}
    before = dict(original.named_parameters())
    for name, parameter in cast.named_parameters():
        if name.rpartition(".")[2] in kept:
            assert_close(parameter.data, before[name].data, atol=0, rtol=0, msg=name)
        else:
            assert parameter.dtype.itemsize == 2, name


@each_type
@torch.no_grad()
def test_save_and_load_tied_and_in_shards(case, tmp_path):
    from hmf.model.modeling import hybrid_classes

    config = tiny_config(case, tie_word_embeddings=True)
    model, ids = hybrid_classes(type(config).family).causal_lm(config).eval(), random_ids(1, 9)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close(loaded(ids).logits, model(ids).logits, atol=0, rtol=0)


# --- the start from attention ---


@pytest.mark.parametrize("case", cases(), ids=str)
def test_start_from_attention_fills_every_tensor(case):
    config = tiny_config(case, "X")
    attention = Qwen3Attention(config, 0)

    def start(seed):
        mixer = MIXERS[case.symbol](config, 0)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.fill_(torch.nan)
        report = mixer.init_from_attention(attention, torch.Generator().manual_seed(seed), 0.02)
        report.check(mixer, attention)
        return report, dict(mixer.named_parameters())

    report, filled = start(1)
    assert all(parameter.isfinite().all() for parameter in filled.values())
    given = dict(attention.named_parameters())
    for name, source in report.copied.items():
        assert torch.equal(filled[name], given[source].view_as(filled[name])), name
    assert_close(start(1)[1], filled, atol=0, rtol=0)
    assert not report.initialised or any(not torch.equal(filled[name], other) for name, other in start(2)[1].items())
