# SPDX-License-Identifier: Apache-2.0
"""vLLM answers as Hugging Face does under all that a scheduler does: batches, chunks, prefixes, aborts, preemption.

One Hybrid has a layer of every type, so that each of them goes through all of it.
"""

import itertools
import random

import pytest
import torch

from tests import numerics
from tests.hybrids import Case
from tests.serving import engines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOKENS = 64
LENGTHS = [1, 3, 17, 64, 130, 257, 300, 513]
LONGEST = 3072
PATTERN = "GKA-*-GDN-SWA-M2-BMF"
WINDOWS = {"swa_config": {"window_size": 7}, "bmojo_config": {"window_size": 9, "ssm_mixer": "gdn"}}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A directory, its Hugging Face model, prompts and greedy answers."""
    path = tmp_path_factory.mktemp("hybrid")
    model = engines.save_hybrid(path, Case("GDN", "vllm"), PATTERN, **WINDOWS)
    prompts = engines.random_prompts(LENGTHS)
    return path, model, prompts, [engines.hugging_face(model, prompt, TOKENS) for prompt in prompts]


@pytest.fixture(scope="class")
def caching(hybrid):
    """An engine with the flags of the model card."""
    flags = {"mamba_cache_mode": "align", "mamba_cache_dtype": "float32", "mamba_ssm_cache_dtype": "float32"}
    with engines.engine(hybrid[0], enable_prefix_caching=True, max_model_len=LONGEST, **flags) as llm:
        yield llm


@pytest.fixture(scope="class")
def crowded(hybrid):
    """A small budget of tokens a step and a pool too small for all requests; no prefix caching, no flags for states."""
    small = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "num_gpu_blocks_override": 40}
    with engines.engine(hybrid[0], enable_prefix_caching=False, **small) as llm:
        yield llm


class TestPrefixCaching:
    def test_cold_and_warm(self, caching, hybrid):
        _, _, prompts, answers = hybrid
        caching.reset_prefix_cache()
        cold = engines.greedy(caching, prompts, TOKENS)
        assert all(output.num_cached_tokens == 0 for output in cold)
        engines.assert_same(cold, answers)
        hits = engines.metric(caching, "vllm:prefix_cache_hits")
        warm = engines.greedy(caching, prompts, TOKENS)
        engines.assert_same(warm, answers)
        block = caching.llm_engine.vllm_config.cache_config.block_size
        assert [output.num_cached_tokens for output in warm] == [(n - 1) // block * block for n in LENGTHS]
        assert engines.metric(caching, "vllm:prefix_cache_hits") - hits == sum(o.num_cached_tokens for o in warm)
        assert sum(output.num_cached_tokens for output in warm) > 0

    @pytest.mark.parametrize("offset", [-1, 0, 1])
    def test_block_boundary(self, caching, hybrid, offset):
        block = caching.llm_engine.vllm_config.cache_config.block_size
        prompts = engines.random_prompts([2 * block + offset], seed=10 + offset)
        answers = [engines.hugging_face(hybrid[1], prompts[0], 8)]
        for _ in range(2):
            outputs = engines.greedy(caching, prompts, 8)
            engines.assert_same(outputs, answers)
        assert outputs[0].num_cached_tokens == (2 * block + offset - 1) // block * block

    def test_shared_prefix(self, caching, hybrid):
        """Two prompts that share two blocks and then differ."""
        block = caching.llm_engine.vllm_config.cache_config.block_size
        head, *tails = engines.random_prompts([2 * block, 5, 40], seed=20)
        prompts = [head + tail for tail in tails]
        first = engines.greedy(caching, [head + [5]], 1)
        assert first[0].num_cached_tokens == 0
        outputs = engines.greedy(caching, prompts, 16)
        engines.assert_same(outputs, [engines.hugging_face(hybrid[1], prompt, 16) for prompt in prompts])
        assert [output.num_cached_tokens for output in outputs] == [2 * block, 2 * block]

    def test_samples_are_independent(self, caching, hybrid):
        """n > 1: each sample's log-probabilities are those of its own tokens."""
        from vllm import SamplingParams

        prompt = hybrid[2][4]
        params = SamplingParams(
            n=4, temperature=1.0, seed=1, max_tokens=24, logprobs=1, ignore_eos=True, detokenize=False
        )
        completions = caching.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs
        assert len({tuple(completion.token_ids) for completion in completions}) == 4
        for completion in completions:
            tokens = list(completion.token_ids)
            given = torch.tensor([row[token].logprob for row, token in zip(completion.logprobs, tokens, strict=True)])
            engines.assert_forced(given, hybrid[1], prompt, tokens)

    def test_poisoned_pool(self, caching, hybrid):
        """Fresh requests start from zeros whatever their slot holds, and slots of nobody stay as they are."""
        _, _, prompts, answers = hybrid
        caching.reset_prefix_cache()
        engines.poison(caching)
        engines.assert_same(engines.greedy(caching, prompts, TOKENS), answers)
        # All kinds of layers take blocks from the same memory: one of each kind, at most, for every block of tokens.
        block = caching.llm_engine.vllm_config.cache_config.block_size
        allowed = 1 + engines.groups(caching) * sum(-(-(n + TOKENS) // block) for n in LENGTHS)
        for mixer in engines.mixers(caching):
            for pool in (pool for pool in mixer.kv_cache if pool.is_floating_point()):
                written = ~pool.flatten(1).isnan().any(1)
                assert 0 < written.sum() <= allowed

    def test_longest_prompts(self, caching, hybrid):
        """To the last token that `max_model_len` allows, several chunks long, beside a short one."""
        prompts = engines.random_prompts([LONGEST - 1, 2999, 2], seed=30)
        outputs = engines.greedy(caching, prompts, 1)
        engines.assert_same(outputs, [engines.hugging_face(hybrid[1], prompt, 1) for prompt in prompts])

    def test_soak(self, caching, hybrid):
        """1,000 random requests, up to 64 at once, every fifth aborted: in mid-prefill, in mid-decode, or waiting.

        The others answer as Hugging Face does, and every block is free again.
        """
        from vllm import SamplingParams

        draw = random.Random(5)
        lengths = [1, 2, 5, *(draw.randint(3, 90) for _ in range(24)), 127, 128, 129, 400]
        prompts = engines.random_prompts(lengths, seed=40)
        answers = [engines.hugging_face(hybrid[1], prompt, 8) for prompt in prompts]
        doomed = engines.random_prompts([1, 40, 300, 2900], seed=41)
        caching.reset_prefix_cache()
        free, engine = engines.free_blocks(caching), caching.llm_engine
        running: dict[str, int] = {}  # request -> its prompt
        ends: dict[str, int] = {}  # request to abort -> the step after which
        started = finished = aborted = most = step = 0
        while started < 1000 or running or ends:
            while started < 1000 and len(running) + len(ends) < 64 and draw.random() < 0.9:
                abort, which = started % 5 == 0, draw.randrange(len(prompts))
                params = SamplingParams(
                    temperature=0,
                    max_tokens=64 if abort else draw.randint(1, 8),
                    logprobs=0,
                    ignore_eos=True,
                    detokenize=False,
                )
                prompt = draw.choice(doomed) if abort else prompts[which]
                name = str(started)
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
                if abort:
                    ends[name] = step + draw.randrange(5)
                else:
                    running[name] = which
                started += 1
            most = max(most, len(running) + len(ends))
            for output in engine.step():
                if output.finished:
                    completion, answer = output.outputs[0], answers[running.pop(output.request_id)]
                    count = engines.agreement(completion.token_ids, answer)
                    tokens = list(completion.token_ids)[:count]
                    given = [row[token].logprob for row, token in zip(completion.logprobs, tokens, strict=False)]
                    wanted = answer.logprobs[range(count), tokens]
                    numerics.check(numerics.off(torch.tensor(given), wanted), answer.bound, "log-probabilities")
                    finished += 1
            late = [name for name, after in ends.items() if after <= step]
            engine.abort_request(late)
            aborted += len(late)
            ends = {name: after for name, after in ends.items() if name not in late}
            step += 1
        assert (finished, aborted, most) == (800, 200, 64)
        engines.drain(caching)
        assert engines.free_blocks(caching) == free


def test_bfloat16_keeps_the_decay_in_float32(hybrid):
    path, model, prompts, answers = hybrid
    with engines.engine(path, dtype="bfloat16", enable_prefix_caching=False) as llm:
        loaded = dict(engines.runner(llm).model.named_parameters())
        kept = {name: x for name, x in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
        assert len(kept) == 8  # of GKA, GDN, Mamba2 and the GDN in B'MOJO-F
        for name, stored in kept.items():
            place = {"0": "self_attn.mixer.", "4": "self_attn.mixer.", "5": "self_attn.gdn."}
            layer, parameter = name.split(".")[2], name.split(".")[-1]
            found = loaded[f"model.layers.{layer}.{place.get(layer, 'self_attn.')}{parameter}"]
            torch.testing.assert_close(found.data.cpu(), stored.data, atol=0, rtol=0)
        assert loaded["model.layers.2.self_attn.qkv_proj.weight"].dtype == torch.bfloat16
        dtypes = {pool.dtype for mixer in engines.mixers(llm) for pool in mixer.kv_cache}
        assert dtypes == {torch.float32, torch.bfloat16}  # the last one: B'MOJO-F's windows
        outputs = engines.greedy(llm, prompts, 1)
    rounded = type(model).from_pretrained(path, dtype=torch.bfloat16)
    theirs = engines.first_logprobs(rounded, prompts)
    exact = torch.stack([answer.logprobs[0] for answer in answers])
    numerics.assert_near(engines.first_rows(outputs), exact, theirs)
    numerics.assert_mean_near(engines.first_rows(outputs), exact, theirs)


class TestScheduler:
    def test_states_are_float32(self, crowded):
        pools = {pool.dtype for mixer in engines.mixers(crowded) for pool in mixer.kv_cache}
        assert pools == {torch.float32}

    @torch.inference_mode()
    def test_fresh_requests(self, crowded):
        """As run before memory is measured: several together get what each gets alone, whatever their slots held."""
        from vllm.forward_context import set_forward_context

        from hmf.serving.vllm.backends import fresh_requests

        def dirty(mixer, slots):
            fill = {True: torch.nan, False: 10**9}
            pools = mixer.kv_cache
            return tuple(x.new_full((1 + slots, *x.shape[1:]), fill[x.is_floating_point()]) for x in pools)

        mixers = engines.mixers(crowded)
        assert sum(mixer.kept_by != mixer.prefix for mixer in mixers) == 1  # the GDN in B'MOJO-F
        for mixer in mixers:
            # A recurrent layer within another one writes its own states, the first of that one's.
            others = sum(len(x.states) for x in mixers if x.kept_by == mixer.prefix and x is not mixer)
            device = mixer.kv_cache[0].device
            hidden_states = torch.randn(50, engines.DIMENSIONS["hidden_size"], device=device)
            with set_forward_context(None, crowded.llm_engine.vllm_config, num_tokens=50):
                inputs, _ = mixer.project(torch.arange(50, device=device), hidden_states)
            # Outside of a batch a recurrent layer within another gives zeros.
            inputs = tuple(x if x.any() else torch.randn_like(x) for x in inputs)
            wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
            pools, together = dirty(mixer, 3), fresh_requests(50, 3, device)
            mixed = mixer.prefill(inputs, pools, together)
            for n, (first, last) in enumerate(itertools.pairwise(together.query_start_loc_p.tolist())):
                own, single = dirty(mixer, 1), fresh_requests(last - first, 1, device)
                alone = mixer.prefill(tuple(x[first:last] for x in inputs), own, single)
                own_exact = tuple(x.double() if x.is_floating_point() else x for x in dirty(mixer, 1))
                with numerics.in_float64():
                    exact = mixer.double().prefill(tuple(x[first:last] for x in wide), own_exact, single)
                mixer.float()
                states = ((pools, 1 + n), (own, 1), (own_exact, 1))
                found, mine, true = ([pool[slot] for pool in some[others:]] for some, slot in states)
                numerics.assert_near([mixed[first:last], *found], [exact, *true], [alone, *mine])

    def test_small_chunks(self, crowded, hybrid):
        _, _, prompts, answers = hybrid
        engines.assert_same(engines.greedy(crowded, prompts, TOKENS), answers)

    def test_preemption(self, crowded, hybrid):
        """As many requests as get blocks, and then each needs one more."""
        block = crowded.llm_engine.vllm_config.cache_config.block_size
        prompts = engines.random_prompts([block - 8] * 8, seed=3)
        answers = [engines.hugging_face(hybrid[1], prompt, 24) for prompt in prompts]
        before = engines.metric(crowded, "vllm:num_preemptions")
        engines.assert_same(engines.greedy(crowded, prompts, 24), answers)
        assert engines.metric(crowded, "vllm:num_preemptions") > before

    def test_aborts(self, crowded, hybrid):
        """Requests that go away in mid-prefill and mid-decode leave no trace, and their slots are free again."""
        from vllm import SamplingParams

        _, _, prompts, answers = hybrid
        free = engines.free_blocks(crowded)
        params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=61, ignore_eos=True, detokenize=False)
        engine, finished = crowded.llm_engine, {}

        def step(times):
            for _ in range(times):
                for output in engine.step():
                    if output.finished:
                        finished[output.request_id] = output

        def add(name, prompt):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)

        add("decoding", prompts[1])
        step(4)
        add("prefilling", prompts[7])  # 513 tokens at 48 a step
        step(3)
        for i in (2, 5):
            add(f"kept-{i}", prompts[i])
        engine.abort_request(["decoding", "prefilling"])
        while engine.has_unfinished_requests():
            step(1)
        engines.drain(crowded)
        assert finished.keys() == {"kept-2", "kept-5"}
        engines.assert_same([finished[f"kept-{i}"] for i in (2, 5)], [answers[i] for i in (2, 5)])
        assert engines.free_blocks(crowded) == free
