# SPDX-License-Identifier: Apache-2.0
"""Rows cut among processes give what whole rows give on one, for every layer type.

The first run on a GPU takes minutes: the kernels are compiled for each layer type.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hmf.bench.doctor import one_variant
from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.model.convert import drop_teacher, hybridise
from hmf.ops import dispatch, linear_attention, short_conv
from hmf.parallel.collectives import Group
from hmf.parallel.sequence import attach, shard
from tests.hybrids import random_ids, randomise, tiny_hybrid
from tests.model.test_families import stock_model
from tests.model.test_recurrent_bases import FIT
from tests.numerics import assert_near, assert_same, in_float64
from tests.parallel import ranks
from tests.parallel.ranks import JOBS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks.run(ranks.run_jobs, 4, folder)
    return [torch.load(folder / str(number)) for number in range(len(JOBS))]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(JOBS)), ids=map(str, JOBS))
def test_outputs_and_gradients_are_those_of_one_process(results, number):
    job = JOBS[number]
    with in_float64():
        exact = ranks.loss_and_gradients(replace(job, checkpointing=False).model(), job.batch())
    found = results[number][:2]
    assert found[1].keys() == exact[1].keys()
    if job.checkpointing:  # what it computes again has the norms of transformers round to float32
        assert_near(found, exact, ranks.loss_and_gradients(job.model(), job.batch()))
    else:
        assert_same(found, exact)


@pytest.mark.slow
def test_only_attention_sends_more_for_longer_rows(results):
    received = {
        job.documents: result[2]
        for job, result in zip(JOBS, results, strict=True)
        if job.pattern == ranks.EVERY and job.ranks == 4
    }
    short, long = received["whole"], received["twice as long"]
    short.pop("test"), long.pop("test")
    assert {label.split()[1] for label in short} == {"GDN", "KDA", "GKA", "M2", "BMF", "SWA", "attention"}
    for label, size in short.items():
        assert long[label] == (2 * size if "attention" in label else size), label


@pytest.fixture
def alone(tmp_path, in_float64):
    """A group of this process only."""
    ranks.join(0, 1, tmp_path / "store")
    yield Group()
    dist.destroy_process_group()


def test_what_cannot_be_cut_is_refused(alone):
    model = tiny_hybrid(ranks.ONE_EACH[0])
    attach(model)
    ids = random_ids(1, 12)
    with pytest.raises(HmfError, match="multiple of 2"):
        shard(alone, {"input_ids": random_ids(1, 11)})
    with pytest.raises(HmfError, match="padding"):
        shard(alone, {"input_ids": ids, "attention_mask": torch.tensor([[0] + [1] * 11])})
    with pytest.raises(HmfError, match="pixel_values"):
        shard(alone, {"input_ids": ids, "pixel_values": ids})
    with pytest.raises(HmfError, match="neither padding nor a cache"):
        model(**shard(alone, {"input_ids": ids}), use_cache=True)
    same = model(**shard(alone, {"input_ids": ids}), use_cache=False).logits, model(ids, use_cache=False).logits
    assert_same(*same)


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next"])
def test_recurrent_layers_of_the_base_run_on_shards(family, alone):
    """One process holds two chunks of each row; documents, states and convolutions cross from one to the other."""
    # Qwen3-Next without experts, which do not support float64; new layers of Qwen3.5 in the shape of the base's own.
    fields = {"mlp_only_layers": [0, 1, 2, 3]} if family == "qwen3_next" else FIT
    base = stock_model(family, "listed", **fields).double()
    model = drop_teacher(hybridise(base, Pattern.parse("*-GDN-*-*"), {"gdn_config": {"conv_size": 3}}))
    randomise(model)
    batch = ranks.Job(ranks.ONE_EACH[0], "", "packed", 1).batch()
    whole = ranks.loss_and_gradients(copy.deepcopy(model), dict(batch))
    assert_same(ranks.on_shards(model, batch, Group()), whole)


def test_an_op_that_is_not_known_is_refused():
    dispatch.set_wrappers({"conv": short_conv})
    try:
        with pytest.raises(HmfError, match="ssd: this op has no wrapper; .* parallelism, .* composition of caches"):
            linear_attention(*torch.ones(3, 1, 2, 1, 4), torch.zeros(1, 2, 1))
    finally:
        dispatch.set_wrappers({})


@pytest.mark.gpu
@pytest.mark.parametrize("case", ranks.ONE_EACH, ids=str)
def test_two_chunks_on_one_gpu(case, tmp_path):
    """The kernels, with states that enter, wider values and keys from before a chunk."""
    job = ranks.Job(replace(case, base={"head_dim": 64}), "X-*-X", "long", 1)
    model = job.model().float().cuda()
    batch = {name: x.cuda() for name, x in job.batch().items()}
    with one_variant():
        logits, wanted = ranks.loss_and_gradients(copy.deepcopy(model), dict(batch))
    ranks.join(0, 1, tmp_path / "store", "nccl")
    try:
        with one_variant():
            found, gradients = ranks.on_shards(model, batch, Group())
    finally:
        dist.destroy_process_group()
    assert (found - logits).abs().max() < 0.02 * logits.abs().max()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() < 0.02 * gradient.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_two_gpus_over_nccl(tmp_path):
    ranks.run(ranks.on_gpus, 2, 2, tmp_path)
    for case in ranks.ONE_EACH:
        (logits, gradients), (exact, exact_gradients) = torch.load(tmp_path / case.symbol)
        assert (logits - exact).abs().max() < 0.02 * exact.abs().max(), case.symbol
        for name, gradient in exact_gradients.items():
            assert (gradients[name] - gradient).norm() < 0.02 * gradient.norm(), (case.symbol, name)
