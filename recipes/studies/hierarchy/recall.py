# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall (arXiv 2312.04927) on models of two layers, all of one type.

A row has P pairs of a key and a value, then each key once more in random order; the model answers with the key's value.
"""

from __future__ import annotations

import fcntl
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config

from hmf.config.pattern import Pattern
from hmf.layers.registry import MIXERS
from hmf.model.convert import drop_teacher, hybridise
from hmf.priming.stage0 import initialise

KEYS, VALUES = 64, 16
PAIRS, FEW = (4, 8, 16, 32, 64), (2, 4, 8)
LAYERS, HIDDEN = 2, 64
TOKENS = 1024  # of a step
QUERIES = 1024  # that are scored, for each number of pairs
WARMUP = 20
ITERATIONS = (0, 1, 2, 4, 8, 15, 30)
SCORED = 10**6  # added to a seed, to draw rows that no training reads


@dataclass(frozen=True)
class Type:
    """A layer type in one shape. The projections of all have the same width, `heads` times `head_dim`."""

    symbol: str
    heads: int = 2
    head_dim: int = 16
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


# The first ones have the heads of the attention that they replace. GKA keeps two states a head. The windows, and the
# one wide head of the last three, make the other states as large.
TYPES = {
    "gka": Type("GKA"),
    "bmojo": Type("BMF", options={"bmojo_config": {"window_size": 3, "ssm_mixer": "mamba2"}}),
    "kda": Type("KDA"),
    "gdn": Type("GDN"),
    "mamba2": Type("M2"),
    "swa": Type("SWA", options={"swa_config": {"window_size": 17}}),
    "kda-wide": Type("KDA", 1, 32),
    "gdn-wide": Type("GDN", 1, 32),
    "mamba2-wide": Type("M2", 1, 32),
}


def rows(pairs: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [count, 3 pairs] and the values of the last `pairs` tokens, [count, pairs], both int64."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs), generator=generator)
    order = torch.rand(count, pairs, generator=generator).argsort(-1)
    given = torch.stack([keys, KEYS + values], -1).flatten(1)
    return torch.cat([given, keys.gather(1, order)], 1), values.gather(1, order)


def answers(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Logits of the values at the last `count` tokens, [B, count, VALUES]."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[..., KEYS:]


def train(model: Any, steps: int, rate: float, seed: int, growing: bool = False) -> None:
    """AdamW with cosine decay, steps of TOKENS tokens, whose number of pairs goes round.

    growing: the first half has few pairs only, because attention learns from these first.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for step in range(steps):
        known = FEW if growing and step < steps / 2 else PAIRS
        pairs = known[step % len(known)]
        ids, values = rows(pairs, max(1, TOKENS // (3 * pairs)), generator)
        loss = F.cross_entropy(answers(model, ids, pairs).flatten(0, 1), values.flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, seed: int) -> dict[str, float]:
    """Share of right answers by number of pairs, on the same rows for every model of a seed."""
    generator, scores = torch.Generator().manual_seed(seed + SCORED), {}
    for pairs in PAIRS:
        ids, values = rows(pairs, max(1, QUERIES // pairs), generator)
        scores[str(pairs)] = (answers(model, ids, pairs).argmax(-1) == values).float().mean().item()
    return scores


def attention(work: Path, heads: int, head_dim: int, steps: int, rate: float, seed: int) -> Path:
    """A checkpoint of attention alone that has learned the task, made by the first process that asks."""
    folder = work / f"attention-{heads}x{head_dim}-seed{seed}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "config.json").is_file():
            torch.manual_seed(seed)
            config = Qwen3Config(
                vocab_size=KEYS + VALUES,
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                head_dim=head_dim,
                max_position_embeddings=4 * KEYS,
                tie_word_embeddings=False,
                initializer_range=0.05,
                bos_token_id=None,
                eos_token_id=None,
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            train(model, steps, rate, seed, growing=True)
            model.save_pretrained(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return folder


def converted(base: Path, kind: Type, seed: int, num_iter: int | None = None) -> Any:
    """The base with each attention replaced by a mixer as Stage 0 initialises it, every parameter trainable."""
    options = dict(kind.options) if num_iter is None else {"gka_config": {"num_iter": num_iter}}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fused = hybridise(model, Pattern((kind.symbol,) * LAYERS), options)
    initialise(fused, seed, "identity")
    return drop_teacher(fused).requires_grad_(True)


def sizes(model: Any, symbol: str) -> dict[str, int]:
    """Parameters, and values that one layer keeps of a sequence: in states and windows, and for its convolutions."""
    count = {"parameters": model.num_parameters(), "state": 0, "convolutions": 0}
    for state in MIXERS[symbol].state_shapes(model.config).values():
        if state.kind != "count":
            count["convolutions" if state.kind == "conv" else "state"] += math.prod(state.shape)
    return count


def over_iterations(model: Any, base: Path, kind: Type, seed: int) -> dict[str, dict[str, float]]:
    """`accuracy` of a trained GKA model with other numbers of iterations."""
    scores = {}
    for num_iter in ITERATIONS:
        other = converted(base, kind, seed, num_iter)
        other.load_state_dict(model.state_dict())
        scores[str(num_iter)] = accuracy(other.eval(), seed)
    return scores
