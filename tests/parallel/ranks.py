# SPDX-License-Identifier: Apache-2.0
"""What each gloo process of tests/parallel does; forked from a server that has the imports done."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hmf.config.runs import DistillSettings, FinetuneRecipe
from hmf.layers.registry import MIXERS
from hmf.model.families import family_of
from hmf.model.modeling import hybrid_classes
from hmf.parallel.collectives import Group
from hmf.parallel.sequence import attach, shard
from hmf.training.distill import distill
from hmf.training.finetune import finetune
from tests.hybrids import Case, cases, random_ids, randomise, tiny_config
from tests.numerics import in_float64

# How two rows are cut into documents: over the borders of chunks, at them, of one token, longer than several chunks.
DOCUMENTS = {
    "whole": [[48], [48]],
    "packed": [[5, 1, 20, 22], [12, 30, 6]],
    "at the borders": [[12] * 4, [6, 18, 24]],
    "twice as long": [[96], [96]],
    "long": [[300, 84], [7, 57, 320]],
    # Of two ranks the second alone attends to tokens that it does not hold: the first must still join its backward.
    "one rank asks": [[12, 24, 12], [12, 24, 12]],
}
ONE_EACH = [next(case for case in cases() if case.symbol == symbol) for symbol in MIXERS]
EVERY = "-".join([*MIXERS, "*"])  # a pattern with every layer type


@dataclass(frozen=True)
class Job:
    """A model, its rows, and on how many ranks."""

    case: Case
    pattern: str
    documents: str
    ranks: int
    checkpointing: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [str(self.case), self.pattern, self.documents, f"{self.ranks} ranks", *self.fields]
        return " ".join(parts + ["checkpointing"] * self.checkpointing)

    def model(self) -> Any:
        config = tiny_config(self.case, self.pattern, **self.fields)
        model = hybrid_classes(family_of("qwen3")).causal_lm(config).double()
        randomise(model)
        if self.checkpointing:
            model.train().gradient_checkpointing_enable()
        return model

    def batch(self) -> dict[str, torch.Tensor]:
        """input_ids, position_ids and labels [2, T], for whole rows."""
        documents = DOCUMENTS[self.documents]
        tokens = sum(documents[0])
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
        return {
            "input_ids": random_ids(2, tokens),
            "position_ids": positions,
            "labels": random_ids(2, tokens, seed=1),
        }


SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
JOBS = [Job(case, "X-*-X", "packed", 4) for case in ONE_EACH]
JOBS += [Job(ONE_EACH[0], EVERY, documents, 4) for documents in ("whole", "at the borders", "twice as long")]
JOBS += [Job(ONE_EACH[0], EVERY, documents, 2) for documents in ("whole", "packed", "one rank asks")]
JOBS += [Job(ONE_EACH[0], EVERY, "packed", 2, checkpointing=True), Job(ONE_EACH[0], "X-*", "packed", 2, fields=SLIDING)]
JOBS += [Job(case, "X-*", "packed", 2) for case in cases() if case not in ONE_EACH and case.options]


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of a function of all of them, by parameter; embeddings are one."""
    whole = batch.pop("labels", None)
    next_tokens = batch.pop("shift_labels") if whole is None else F.pad(whole[:, 1:], (0, 1), value=-100)
    logits = model(**batch, use_cache=False).logits
    wanted = F.one_hot(next_tokens.clamp_min(0), logits.shape[-1])
    (logits.tanh() * (wanted + 0.1)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_shards(model: Any, batch: dict[str, torch.Tensor], group: Group) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same from shards on all ranks of `group`, put together again."""
    attach(model)
    part = shard(group, batch)
    logits, gradients = loss_and_gradients(model, part)
    group.label = "test"
    whole = part["shards"].gather_tokens(logits, 1)
    flat = parameters_to_vector(gradients.values())
    dist.all_reduce(flat, group=group.group)
    vector_to_parameters(flat, gradients.values())
    return whole, gradients


def join(rank: int, ranks: int, store: Path, backend: str = "gloo") -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience)


def run_jobs(rank: int, folder: Path) -> None:
    """All jobs on 4 ranks, or shared out to two pairs of ranks; the first of each group writes what came out."""
    join(rank, 4, folder / "store")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {4: Group(), 2: Group(pairs[rank // 2])}
    for number, job in enumerate(JOBS):
        group = groups[job.ranks]
        if job.ranks == 2 and number % 2 != rank // 2:
            continue
        group.received.clear()
        with contextlib.nullcontext() if job.checkpointing else in_float64():
            whole, gradients = on_shards(job.model(), job.batch(), group)
        if group.rank == 0:
            torch.save((whole, gradients, dict(group.received)), folder / str(number))
    dist.barrier()
    dist.destroy_process_group()


def on_gpus(rank: int, ranks: int, folder: Path) -> None:
    """Every layer type's row cut among GPUs, over NCCL; the first writes what came out, and the same on one GPU."""
    torch.cuda.set_device(rank)
    join(rank, ranks, folder / "store", "nccl")
    for case in ONE_EACH:
        job = Job(replace(case, base={"head_dim": 64}), "X-*-X", "long", ranks)
        model = job.model().float().cuda()
        batch = {name: x.cuda() for name, x in job.batch().items()}
        alone = loss_and_gradients(copy.deepcopy(model), dict(batch)) if rank == 0 else None
        whole = on_shards(model, batch, Group())
        if rank == 0:
            torch.save((whole, alone), folder / case.symbol)
    dist.destroy_process_group()


def train(
    rank: int, ranks: int, port: int, stage0: Path, output: Path, given: dict[str, Any], use_cpu: bool = True
) -> None:
    """Stage 1 as torchrun would start it; what it prints goes to `output`/rank<n>.txt."""
    # DeepSpeed brings its own CPU backend.
    as_torchrun(rank, ranks, port, use_cpu and given["training"].get("strategy") != "deepspeed")
    output.mkdir(exist_ok=True)
    with (output / f"rank{rank}.txt").open("w") as messages, contextlib.redirect_stderr(messages):
        distill(stage0, output, DistillSettings.model_validate(given))


def train_stage2(rank: int, ranks: int, port: int, given: dict[str, Any]) -> None:
    """Stage 2 as torchrun would start it."""
    as_torchrun(rank, ranks, port)
    finetune(FinetuneRecipe.model_validate(given))


def as_torchrun(rank: int, ranks: int, port: int, use_cpu: bool = True) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": str(use_cpu),
    }
    torch.set_num_threads(1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(target: Callable[..., None], count: int, *args: Any) -> None:
    """`target(rank, *args)` in `count` processes."""
    if torch.cuda.is_available():  # what is imported for a fork may have used CUDA, which a forked process cannot
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hmf.training.finetune", "tests.parallel.ranks"])
    processes = [context.Process(target=target, args=(rank, *args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * count
