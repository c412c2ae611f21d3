# SPDX-License-Identifier: Apache-2.0
"""Rows cut among processes give what whole rows give on one, for every layer type."""

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from hmf.errors import HmfError
from hmf.parallel.collectives import Group
from hmf.parallel.sequence import attach, shard
from tests.hybrids import random_ids, tiny_hybrid
from tests.parallel import ranks
from tests.parallel.ranks import JOBS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    ranks.run(ranks.run_jobs, 4, folder)
    return [torch.load(folder / str(number)) for number in range(len(JOBS))]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=map(str, JOBS))
def test_outputs_and_gradients_are_those_of_one_process(results, number):
    logits, gradients = ranks.loss_and_gradients(JOBS[number].model(), JOBS[number].batch())
    found, found_gradients, _ = results[number]
    assert_close(found, logits, atol=2e-5, rtol=0)
    assert found_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max().clamp_min(1e-3)
        assert_close(found_gradients[name] / scale, gradient / scale, atol=2e-4, rtol=0, msg=name)


def test_only_attention_sends_more_for_longer_rows(results):
    received = {
        job.documents: result[2]
        for job, result in zip(JOBS, results, strict=True)
        if job.pattern == ranks.EVERY and job.ranks == 4
    }
    short, long = received["whole"], received["twice as long"]
    short.pop("test"), long.pop("test")
    assert {label.split()[1] for label in short} == {"GDN", "GKA", "M2", "BMF", "SWA", "attention"}
    for label, size in short.items():
        assert long[label] == (2 * size if "attention" in label else size), label


@pytest.fixture
def alone(tmp_path):
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
    assert_close(*same, atol=2e-5, rtol=0)
