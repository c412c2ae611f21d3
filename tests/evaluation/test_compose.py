# SPDX-License-Identifier: Apache-2.0
"""State composition: what the combined cache of chunks is, for every layer type.

Tiny float64 Hybrids; the prompt as a whole, or the layer's definition, gives the right answers.
"""

import itertools
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import hmf
from hmf.data import tasks
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.evaluation.chunks import Composition, Keys, Parts, States, conversation_parts, cut
from hmf.evaluation.compose import combine, prefill
from hmf.evaluation.generation import generate_answers
from hmf.layers.registry import MIXERS, mixer_class
from hmf.model.checkpoint import load_model
from tests.hybrids import Case, cases, random_ids, tiny_hybrid
from tests.numerics import assert_same as same

pytestmark = pytest.mark.usefixtures("in_float64")

ONE_EACH = [next(case for case in cases() if case.symbol == symbol) for symbol in MIXERS]
TEACHER = Path(hmf.__file__).parent / "assets" / "teacher"
# With rotary positions, Mamba2's states depend on them, and a chunk has its own.
RECURRENT = [case for case in cases() if case.symbol != "SWA" and case.name != "rotary"]
EVERY = "-".join([*MIXERS, "*"])
CHOICES = list(itertools.product(get_args(Keys), get_args(States)))

few_examples = settings(
    max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
lengths = st.lists(st.integers(1, 30), min_size=2, max_size=4)


def parts_of(prefix: int, chunks: list[int], tail: int = 3, seed: int = 0) -> Parts:
    """Parts of these lengths, of random tokens."""
    ids = iter(random_ids(1, prefix + sum(chunks) + tail, seed)[0].tolist())
    take = lambda count: list(itertools.islice(ids, count))  # noqa: E731
    return Parts(take(prefix), [take(count) for count in chunks], take(tail))


def whole(parts: Parts) -> torch.Tensor:
    return torch.tensor([[*parts.prefix, *itertools.chain(*parts.chunks), *parts.tail]])


def read(model, *pieces):
    """The cache after token lists, one after the other."""
    cache = DynamicCache(config=model.config)
    for piece in filter(len, pieces):
        model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
    return cache


def tail_logits(model, parts, composition):
    return model(**prefill(model, [parts], composition).for_forward()).logits


# --- what is the ordinary run ---


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@torch.no_grad()
def test_one_chunk_is_the_ordinary_run(case):
    model, parts = tiny_hybrid(case, "X-*-X"), parts_of(4, [20])
    exact = model(whole(parts), use_cache=False).logits[:, -3:]
    for keys, states in CHOICES:
        same(tail_logits(model, parts, Composition(keys, states)), exact)
    inputs = prefill(model, [parts], Composition()).for_generate()
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found.tolist() == model.generate(whole(parts), max_new_tokens=6, do_sample=False, eos_token_id=None).tolist()


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@torch.no_grad()
def test_full_keys_and_fused_states_are_the_ordinary_run(case):
    model = tiny_hybrid(case, "X-*-X")

    @few_examples
    @given(chunks=lengths, prefix=st.integers(0, 5))
    def check(chunks, prefix):
        parts = parts_of(prefix, chunks)
        exact = model(whole(parts), use_cache=False).logits[:, -3:]
        same(tail_logits(model, parts, Composition("full", "fused")), exact)

    check()


@torch.no_grad()
def test_without_recurrent_layers_full_keys_are_the_ordinary_run_of_a_transformer():
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, parts = Qwen3ForCausalLM(config).double().eval(), parts_of(3, [9, 5])
    for states in get_args(States):
        same(tail_logits(model, parts, Composition("full", states)), model(whole(parts)).logits[:, -3:])


# --- states ---


@pytest.mark.parametrize("case", RECURRENT, ids=str)
@torch.no_grad()
def test_fused_states_of_the_first_layer_are_those_of_the_whole_prompt(case):
    """Convolutions at the chunks' borders included: what enters this layer does not depend on how the prompt is cut."""
    model = tiny_hybrid(case, "X-*")

    @few_examples
    @given(chunks=lengths, prefix=st.integers(0, 5))
    def check(chunks, prefix):
        parts = parts_of(prefix, chunks)
        exact = read(model, whole(parts)[0, :-3].tolist()).layers[0].states
        found = prefill(model, [parts], Composition("concatenated", "fused")).past_key_values.layers[0].states
        for name, x in of_kind(model, "recurrent", found).items() | of_kind(model, "conv", found).items():
            same(x, exact[name], what=name)

    check()


def of_kind(model, kind: str, states: dict) -> dict:
    """Of the states of a model's first layer, those of a kind."""
    shapes = mixer_class(model.config.pattern.symbols[0]).state_shapes(model.config)
    return {name: x for name, x in states.items() if shapes[name].kind == kind}


@pytest.mark.parametrize("keys", get_args(Keys))
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@torch.no_grad()
def test_states_averaged_and_dropped(case, keys):
    """In the first layer: the mean of what the chunks leave apart, or what the prefix left."""
    model, parts = tiny_hybrid(case, "X-*"), parts_of(5, [12, 9, 17])
    alone = [read(model, parts.prefix, chunk).layers[0].states for chunk in parts.chunks]
    for states in ("averaged", "dropped"):
        found = prefill(model, [parts], Composition(keys, states)).past_key_values.layers[0].states
        before = read(model, parts.prefix).layers[0].states
        for name, x in of_kind(model, "recurrent", found).items():
            # With full keys the convolutions go on, as all but the recurrent states do.
            if keys != "full" or states == "dropped":
                mean = sum(each[name] for each in alone) / len(alone)
                same(x, mean if states == "averaged" else before[name], what=name)
        assert found.keys() == before.keys()


def test_combine_by_hand():
    start, finals = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]], [[[5.0, 6.0]]]])
    assert combine("averaged", start, finals, None).tolist() == [[[[4.0, 5.0]]]]
    assert combine("dropped", start, finals, None).tolist() == start.tolist()
    halves = torch.tensor([[9.0], [0.5]])  # of what was there before the second chunk, half is left after it
    assert combine("fused", start, finals, halves).tolist() == [[[[5 + 0.5 * (3 - 1), 6 + 0.5 * (4 - 2)]]]]
    assert combine("fused", start, finals, halves[..., None, None]).tolist() == [[[[6.0, 7.0]]]]


@pytest.mark.parametrize("symbol", ["SWA", "BMF"])
@torch.no_grad()
def test_windows_are_those_of_the_last_chunk(symbol):
    model, parts = tiny_hybrid(Case(symbol, "gqa"), "X-*"), parts_of(5, [9, 9, 9])
    last = read(model, parts.prefix, parts.chunks[-1]).layers[0].states
    for keys in ("concatenated", "sliding"):
        found = prefill(model, [parts], Composition(keys, "averaged")).past_key_values.layers[0].states
        for name in of_kind(model, "window", found) | of_kind(model, "count", found):
            same(found[name], last[name], what=name)


# --- keys and values ---


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@torch.no_grad()
def test_keys_are_those_of_each_chunk_after_the_prefix(case):
    """With their positions; a shorter chunk begins later, so that all end where the tail begins."""
    model, parts = tiny_hybrid(case, "X-*"), parts_of(4, [11, 8, 11])
    alone = []
    for chunk in parts.chunks:
        cache, first = read(model, parts.prefix), 4 + 11 - len(chunk)
        positions = torch.arange(first, 15)[None]
        model(torch.tensor([chunk]), position_ids=positions, past_key_values=cache, use_cache=True)
        alone.append(cache.layers[1].keys)
    composed = prefill(model, [parts], Composition("concatenated", "averaged"))
    found = composed.past_key_values.layers[1].keys
    same(found, torch.cat([alone[0][:, :, :4], *(keys[:, :, 4:] for keys in alone)], 2))
    assert composed.position_ids[0, -3:].tolist() == [15, 16, 17]
    sliding = prefill(model, [parts], Composition("sliding", "averaged"))
    same(sliding.past_key_values.layers[1].keys, alone[-1])
    assert sliding.input_ids[0].tolist() == [*parts.prefix, *parts.chunks[-1], *parts.tail]
    assert sliding.position_ids[0, -3:].tolist() == [15, 16, 17]


@torch.no_grad()
def test_a_transformer_sees_concatenated_chunks_in_any_order():
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, parts = Qwen3ForCausalLM(config).double().eval(), parts_of(3, [9, 5, 7])
    turned = Parts(parts.prefix, parts.chunks[::-1], parts.tail)
    one, other = (tail_logits(model, each, Composition("concatenated", "dropped")) for each in (parts, turned))
    same(one, other)
    full = [tail_logits(model, each, Composition("full", "dropped")) for each in (parts, turned)]
    assert (full[0] - full[1]).abs().max() > 1e-3 and (full[0] - one).abs().max() > 1e-3


# --- batches, decoding ---


@pytest.mark.parametrize(
    ("pattern", "keys", "states"),
    [*((EVERY, *each) for each in CHOICES), *(("BMF-BMF", keys, "fused") for keys in get_args(Keys))],
)
@torch.no_grad()
def test_prompts_of_a_batch_are_as_each_alone(pattern, keys, states):
    """Other numbers and lengths of chunks, prefixes and tails; one too short for windows and chunks."""
    model, composition = tiny_hybrid(ONE_EACH[0], pattern), Composition(keys, states)
    prompts = [
        parts_of(4, [11, 8, 9], 3),
        parts_of(0, [2], 1, 1),
        parts_of(6, [7, 20], 5, 2),
        parts_of(0, [5, 5], 2, 3),
    ]
    together = model(**prefill(model, prompts, composition).for_forward()).logits
    for parts, logits in zip(prompts, together, strict=True):
        same(logits[-len(parts.tail) :], tail_logits(model, parts, composition)[0])
    greedy = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    found = model.generate(**prefill(model, prompts, composition).for_generate(), **greedy)[:, -3:]
    for parts, ids in zip(prompts, found, strict=True):
        alone = model.generate(**prefill(model, [parts], composition).for_generate(), **greedy)
        assert ids.tolist() == alone[0, -3:].tolist()


@pytest.mark.parametrize(("keys", "states"), CHOICES)
@torch.no_grad()
def test_decoding_goes_on_from_the_tail(keys, states):
    """A token that was generated is as one of the tail."""
    model, parts, composition = tiny_hybrid(ONE_EACH[0], EVERY), parts_of(4, [11, 8, 9]), Composition(keys, states)
    inputs = prefill(model, [parts], composition).for_generate()
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, -8:].tolist()
    longer = Parts(parts.prefix, parts.chunks, [*parts.tail, *written[:-1]])
    assert tail_logits(model, longer, composition)[0, -8:].argmax(-1).tolist() == written


# --- what is refused ---


def test_layers_whose_caches_cannot_be_combined_are_refused():
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        use_sliding_window=True,
        max_window_layers=1,
    )
    with pytest.raises(HmfError, match=r"layer 1 \(sliding_attention\): only full attention"):
        prefill(Qwen3ForCausalLM(config), [parts_of(2, [5, 5])], Composition())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Composition.parse("concatenated"), "not KEYS,STATES; give one of full"),
        (lambda: Composition.parse("joined,fused"), "keys 'joined'"),
        (lambda: Composition.parse("full,mean"), "states 'mean'"),
        (lambda: Composition(chunk=3), "too short"),
        (lambda: Composition(tail=0), "at least the last token"),
        (lambda: cut([5], 0, Composition()), "at least one token before"),
        (lambda: Parts([1], [[2], []], [3]), "no chunk may be empty"),
        (lambda: conversation_parts(load_tokenizer(TEACHER), "Hello!", Composition()), "give a list of messages"),
        (lambda: prefill(tiny_hybrid(ONE_EACH[0]), [], Composition()), "there are no prompts"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(HmfError, match=message):
        make()


# --- cutting ---


@settings(deadline=None, derandomize=True, database=None)
@given(
    total=st.integers(2, 400),
    prefix=st.integers(0, 40),
    chunk=st.integers(16, 80),
    tail=st.integers(1, 40),
    lines=st.sets(st.integers(1, 399)),
)
def test_a_prompt_is_cut_into_its_tokens(total, prefix, chunk, tail, lines):
    ids, prefix = list(range(total)), min(prefix, total)
    parts = cut(ids, prefix, Composition(chunk=chunk, tail=tail), sorted(lines))
    assert [*parts.prefix, *itertools.chain(*parts.chunks), *parts.tail] == ids
    if total - prefix <= chunk + tail:
        assert len(parts.chunks) == 1
    else:
        assert len(parts.prefix) == prefix
        assert max(map(len, parts.chunks)) <= chunk and len(parts.tail) <= tail
        # As few as there can be, or little more: a chunk is at least half of what is even.
        assert len(parts.chunks) <= 2 * -(-(total - prefix) // chunk)
        if lines and any(total - tail <= at < total for at in lines):
            assert parts.tail[0] in lines


def test_a_conversation_is_cut_at_lines_behind_its_template():
    tokenizer = load_tokenizer(TEACHER)
    for task in ("recall", "needle", "tool_call"):
        sample = tasks.sample(task, 3, tokenizer, 700, split="heldout")
        composition = Composition(chunk=200, tail=64)
        parts = conversation_parts(tokenizer, sample.messages[:-1], composition, sample.tools, sample.thinking)
        ids = tokenizer(sample.prompt(tokenizer), add_special_tokens=False)["input_ids"]
        assert [*parts.prefix, *itertools.chain(*parts.chunks), *parts.tail] == ids
        if task != "tool_call":
            assert tokenizer.decode(parts.prefix).endswith("user\n") and len(parts.chunks) == 3
            assert all(tokenizer.decode(chunk).endswith("\n") for chunk in parts.chunks)
            assert tokenizer.decode(parts.tail).endswith(sample.prompt(tokenizer)[-30:])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Be brief.\n" * 200}]
    parts = conversation_parts(tokenizer, messages, Composition(chunk=200, tail=64))
    assert "Be brief." in tokenizer.decode(parts.prefix) and len(parts.chunks) > 2


def test_answers_on_composed_prompts():
    """A prompt with room for one chunk gets the ordinary answer; others do not depend on the batch."""
    tokenizer, model = load_tokenizer(TEACHER), load_model(TEACHER, dtype=torch.float64).eval()
    samples = [tasks.sample("recall", seed, tokenizer, 96 + 60 * (seed % 3), thinking=False) for seed in range(4)]
    ordinary = generate_answers(model, tokenizer, samples)
    assert generate_answers(model, tokenizer, samples, compose=Composition(chunk=512)) == ordinary
    short = Composition("concatenated", "fused", chunk=48, tail=32)
    found = generate_answers(model, tokenizer, samples, compose=short)
    assert found == generate_answers(model, tokenizer, samples, batch_size=1, compose=short)
    # With keys "sliding", a Transformer does not know of what stood in the first chunk.
    made = (tasks.sample("recall", seed, tokenizer, 216, thinking=False) for seed in itertools.count())
    early = [next(sample for sample in made if sample.answer in sample.messages[0]["content"][:60])]
    for keys, right in (("concatenated", True), ("sliding", False)):
        answer, *_ = generate_answers(model, tokenizer, early, compose=Composition(keys, chunk=48, tail=32))
        assert early[0].is_correct(answer.text) == right
