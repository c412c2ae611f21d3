# SPDX-License-Identifier: Apache-2.0
"""Answers and log-probabilities of a model that is loaded here, against plain computations of the same."""

import copy

import pytest
import torch

from hmf.evaluation.local import CHUNK, Local, Sampling
from hmf.evaluation.positions import by_position, nats_by_range, ranges, window
from hmf.evaluation.prompts import Prompter
from hmf.evaluation.retention import TASKS
from hmf.model.checkpoint import load_model
from tests.numerics import assert_same


@pytest.fixture(scope="module", params=["base", "hybrid"])
def model(tiny, request):
    return load_model(tiny / request.param, dtype=torch.float64).eval()


def prompts(tokenizer, name="needle_single", count=5, **options):
    maker = Prompter(tokenizer, 0, **({"thinking": True, "max_new_tokens": 6} | options), context=2048, of="it has")
    return [one for length in (400, 600) for one in maker.prompts(TASKS[name], length, count)]


def test_likelihood_is_the_mean_log_probability_of_the_expected_answer(in_float64, model, tokenizer):
    asked = prompts(tokenizer)
    found = {id(prompt): value for prompt, _, value in Local(model, tokenizer, Sampling(), 4).answers(asked)}
    for prompt in asked:
        ids = prompt.direct_ids(tokenizer)
        logits = model(torch.tensor([[*ids, *prompt.answer_ids]])).logits[0].log_softmax(-1)
        values = [logits[len(ids) - 1 + place, token] for place, token in enumerate(prompt.answer_ids)]
        assert_same(torch.tensor(found[id(prompt)], dtype=torch.float64), torch.stack(values).mean())


def test_answers_do_not_depend_on_the_batch_and_end_as_they_say(in_float64, model, tokenizer):
    asked = prompts(tokenizer)
    answers = [
        {id(prompt): answer for prompt, answer, _ in Local(model, tokenizer, Sampling(), size, False).answers(asked)}
        for size in (1, 7)
    ]
    assert answers[0] == answers[1]
    assert all(answers[0][id(prompt)].tokens == prompt.limit for prompt in asked if answers[0][id(prompt)].truncated)


def test_a_model_that_ends_at_once_is_not_truncated(model, tokenizer):
    ending = copy.deepcopy(model)
    with torch.no_grad():
        ending.lm_head.weight.zero_()
    ending.generation_config.eos_token_id = [0]  # the likeliest of equals
    [(_, answer, likelihood)] = Local(ending, tokenizer, Sampling(), 1, False).answers(prompts(tokenizer, count=1)[:1])
    assert (answer.text, answer.truncated, answer.tokens, likelihood) == ("", False, 1, None)


def test_an_answer_to_a_plain_prompt_ends_at_an_empty_line(tiny, model, tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    talking = copy.deepcopy(model)
    [newlines] = plain("\n\n", add_special_tokens=False)["input_ids"][:1]
    with torch.no_grad():
        talking.lm_head.weight.zero_()
    talking.generation_config.eos_token_id = None
    plain.eos_token_id = plain.pad_token_id

    class Always(torch.nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(torch.full(hidden.shape[:-1], newlines), len(plain)).double()

    talking.lm_head = Always()
    [(_, answer, _)] = Local(talking, plain, Sampling(), 1, False).answers(prompts(plain, count=1)[:1])
    assert (answer.text, answer.truncated) == ("", False) and answer.tokens < 6


def test_drawn_answers_follow_the_seed(model, tokenizer):
    asked = prompts(tokenizer, count=1)

    def texts(seed, top_p=1.0):
        drawn = Local(model, tokenizer, Sampling(1.0, top_p, seed), 2, False).answers(asked)
        return [answer.text for _, answer, _ in drawn]

    assert texts(1) == texts(1) != texts(2)
    greedy = [answer.text for _, answer, _ in Local(model, tokenizer, Sampling(), 2, False).answers(asked)]
    assert texts(1, top_p=1e-6) == greedy


def test_scores_in_chunks_are_those_of_the_whole(in_float64, model, tokenizer, monkeypatch):
    ids = window(tokenizer, 0, 0, 700)
    assert len(ids) == 700 < CHUNK
    monkeypatch.setattr("hmf.evaluation.local.CHUNK", 150)
    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    exact = logits[torch.arange(699), torch.tensor(ids[1:])]
    scorer = Local(model, tokenizer, Sampling(), 1)
    assert_same(torch.tensor(scorer.token_log_probabilities(ids), dtype=torch.float64), exact)
    parts = nats_by_range(scorer, ids)
    assert [(part["start"], part["end"]) for part in parts] == [(0, 256), (256, 512), (512, 700)]
    assert [part["tokens"] for part in parts] == [255, 256, 188]
    total = sum(part["nats"] for part in parts)
    assert_same(torch.tensor(total, dtype=torch.float64), -exact.sum())
    # Two equal texts have the perplexity of one.
    [first, *_] = by_position([parts, parts])
    [alone, *_] = by_position([parts])
    assert first["perplexity"] == pytest.approx(alone["perplexity"]) and first["tokens"] == 510


@pytest.mark.parametrize("length", [1, 255, 256, 257, 4096, 5000])
def test_ranges_hold_each_position_once(length):
    assert [place for start, end in ranges(length) for place in range(start, end)] == list(range(length))
