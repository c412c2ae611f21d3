# SPDX-License-Identifier: Apache-2.0
"""`generate` with every layer type: cached or not, one or many, greedy, beams and samples, and what is refused."""

import pytest
import torch
from transformers import StaticCache

from hmf.errors import HmfError
from hmf.layers.registry import MIXERS
from tests.hybrids import cases, random_ids, tiny_hybrid
from tests.numerics import assert_same

NEW = 6
pytestmark = pytest.mark.usefixtures("in_float64")
ONE_EACH = [next(case for case in cases() if case.symbol == symbol) for symbol in MIXERS]
MODELS = [(case, pattern) for case in ONE_EACH for pattern in ("X-*", "X-X")]
every_model = pytest.mark.parametrize(
    ("case", "pattern"), MODELS, ids=[f"{case}_{pattern}" for case, pattern in MODELS]
)
one_each = pytest.mark.parametrize("case", ONE_EACH, ids=str)


def generate(model, ids=None, **given):
    """Exactly NEW more tokens, greedily unless `given` says otherwise."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(ids, **(settings | given))


def greedy_by_hand(model, ids):
    """The definition: the whole sequence anew for every token, without the end token."""
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@every_model
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_cached_is_uncached(case, pattern, tokens):
    model, ids = tiny_hybrid(case, pattern), random_ids(2, tokens)
    expected = greedy_by_hand(model, ids)
    assert generate(model, ids).tolist() == expected.tolist()
    assert generate(model, ids, use_cache=False).tolist() == expected.tolist()


@every_model
@torch.no_grad()
def test_left_padded_batch_is_each_prompt_alone(case, pattern):
    model, lengths = tiny_hybrid(case, pattern), [9, 1, 4]
    ids, mask = random_ids(3, 9), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 9 - length :] = 1
    ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    batch = generate(model, ids, attention_mask=mask)
    uncached = generate(model, ids, attention_mask=mask, use_cache=False)
    for row, length in enumerate(lengths):
        alone = greedy_by_hand(model, ids[row : row + 1, 9 - length :])[0, length:]
        assert batch[row, 9:].tolist() == alone.tolist()
        assert uncached[row, 9:].tolist() == alone.tolist()


@every_model
@torch.no_grad()
def test_beams_with_cache_are_beams_without(case, pattern):
    model, ids = tiny_hybrid(case, pattern), random_ids(2, 5)
    given = {"num_beams": 4, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    cached, plain = (generate(model, ids, use_cache=use_cache, **given) for use_cache in (True, False))
    assert cached.sequences.shape == (6, 5 + NEW)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    assert_same(cached.sequences_scores, plain.sequences_scores)


@one_each
@torch.no_grad()
def test_several_samples_of_a_prompt(case):
    model, ids = tiny_hybrid(case), random_ids(1, 5)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        samples.append(generate(model, ids, do_sample=True, num_return_sequences=4, use_cache=use_cache))
    assert samples[0].tolist() == samples[1].tolist()
    assert len({tuple(row) for row in samples[0].tolist()}) > 1


@one_each
@torch.no_grad()
def test_no_prompt_starts_at_the_first_token(case):
    model = tiny_hybrid(case)
    bos = torch.tensor([[model.config.bos_token_id]])
    assert generate(model).tolist() == greedy_by_hand(model, bos).tolist()


@one_each
@torch.no_grad()
def test_embeddings_as_prompt(case):
    model, ids = tiny_hybrid(case), random_ids(1, 5)
    embeds = model.get_input_embeddings()(ids)
    assert generate(model, inputs_embeds=embeds).tolist() == greedy_by_hand(model, ids)[:, 5:].tolist()


@one_each
@torch.no_grad()
def test_a_second_turn_goes_on_from_the_first_ones_cache(case):
    model, ids = tiny_hybrid(case), random_ids(1, 6)
    first = generate(model, ids, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, random_ids(1, 3, seed=1)], 1)
    # without a mask, generate would take a generated padding token for padding
    again = generate(model, turn, attention_mask=torch.ones_like(turn), past_key_values=first.past_key_values)
    assert again.tolist() == greedy_by_hand(model, turn).tolist()


@one_each
@torch.no_grad()
def test_a_prefill_in_chunks_changes_nothing(case):
    model, ids = tiny_hybrid(case), random_ids(1, 11)
    assert generate(model, ids, prefill_chunk_size=4).tolist() == greedy_by_hand(model, ids).tolist()


@one_each
def test_what_cannot_work_is_refused(case):
    model, ids = tiny_hybrid(case), random_ids(1, 5)
    with pytest.raises(HmfError, match="cache_implementation='static' is not supported"):
        generate(model, ids, cache_implementation="static")
    for given in ({"assistant_model": tiny_hybrid(case)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises((HmfError, ValueError), match="assisted"):
            generate(model, ids, **given)
    with pytest.raises(HmfError, match="past_key_values.*DynamicCache"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(HmfError, match="past_key_values.*DynamicCache"):
        generate(model, ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
