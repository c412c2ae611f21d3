# SPDX-License-Identifier: Apache-2.0
"""The effect of storing recurrent states, or keys and values, in fewer bits: how far log-probabilities drift.

Text is read a token at a time, as a server decodes, once with the caches as they are and once with every recurrent and
convolution state, and each new key and value, rounded after each token. Weights and activations are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from hmf.data.text import STDLIB, documents
from hmf.data.tokenizer import encode_texts, load_tokenizer
from hmf.errors import HmfError
from hmf.folders import shown
from hmf.layers.registry import layer_states
from hmf.model.checkpoint import load_model

from . import machine


@dataclass(frozen=True)
class Drift:
    """The drift over positions `first` to `last`: the mean and largest change of the next token's log-probability, in
    nats; the change of the mean loss; and the share of positions whose most likely token changed."""

    first: int
    last: int
    mean: float
    worst: float
    loss: float
    changed: float


@dataclass(frozen=True)
class Stored:
    """How a cache stores numbers: states in `dtype`, rounded to the nearest number or at random such that the expected
    value is exact (stochastic); keys and values in `kv_dtype`, to the nearest with a scale of 1, as vLLM does by
    default. None: as they are."""

    dtype: torch.dtype | None = None
    stochastic: bool = False
    kv_dtype: torch.dtype | None = None

    def rounded(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A state, rounded, in its own dtype."""
        nearest = x.to(self.dtype)
        if not self.stochastic:
            return nearest.to(x)
        # The two neighbours of x in the dtype, and its distance from the lower one as the probability of the upper one.
        back = nearest.to(x)
        toward = torch.where(back > x, -torch.inf, torch.inf).to(nearest)
        other = torch.nextafter(nearest, toward).to(x)
        share = torch.where(back == x, 0.0, (x - back) / (other - back))
        take = torch.rand(x.shape, generator=generator, device=x.device, dtype=torch.float32) < share
        return torch.where(take, other, back)


@torch.inference_mode()
def state_drift(model: PreTrainedModel, input_ids: torch.Tensor, stored: Stored, parts: int = 4) -> list[Drift]:
    """The drift of a Hybrid's log-probabilities in up to `parts` parts of input_ids [B, T], for caches `stored` so."""
    changes = []
    steps = zip(_decode(model, input_ids, Stored()), _decode(model, input_ids, stored), strict=True)
    for (full, best), (narrow, other) in tqdm(steps, "decoding", input_ids.shape[1] - 1, unit="token", disable=None):
        if not full.isfinite().all():
            raise HmfError(f"{model.name_or_path}: log-probabilities are not finite; check the weights of the model")
        changes.append(torch.stack([narrow - full, (best != other).to(full)]))
    table = torch.stack(changes)  # [T-1, 2, B]
    parts = min(parts, len(table))
    bounds = [len(table) * part // parts for part in range(parts + 1)]
    drifts = []
    for first, end in zip(bounds, bounds[1:], strict=False):
        moved, changed = table[first:end].unbind(1)
        size = moved.abs()
        drifts.append(
            Drift(first, end - 1, size.mean().item(), size.max().item(), -moved.mean().item(), changed.mean().item())
        )
    return drifts


def _decode(
    model: PreTrainedModel, input_ids: torch.Tensor, stored: Stored
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each position except the last: the log-probability [B] of the next token, and the most likely token [B]."""
    config, cache = model.config, DynamicCache(config=model.config)
    generator = torch.Generator(input_ids.device).manual_seed(0)
    narrowed = {
        index: [n for n, s in layer_states(config, index).items() if s.kind in ("recurrent", "conv")]
        for index in config.recurrent_layers
    }
    attention = [index for index in range(len(config.pattern)) if index not in config.recurrent_layers]
    for now, after in zip(input_ids.T[:-1], input_ids.T[1:], strict=True):
        output = model(now[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if stored.dtype is not None:
            for index, names in narrowed.items():
                states = cache.layers[index].states
                states |= {name: stored.rounded(states[name], generator) for name in names}
        if stored.kv_dtype is not None:
            for index in attention:
                for x in (cache.layers[index].keys, cache.layers[index].values):
                    x[..., -1:, :] = x[..., -1:, :].to(stored.kv_dtype).to(x)
        scores = output.logits[:, -1].float().log_softmax(-1)
        yield scores.gather(1, after[:, None])[:, 0], scores.argmax(-1)


def measure(
    source: str | Path, stored: Stored, tokens: int, batch: int, device: str = "cpu", corpus: str = STDLIB
) -> list[Drift]:
    """The drift on `batch` sequences of `tokens` tokens of held-out text, for the Hybrid at `source`."""
    model = load_model(source).to(device).eval()
    if not getattr(model.config, "recurrent_layers", None):
        raise HmfError(f"{shown(Path(source))}: has no recurrent layer; give a Hybrid")
    limit = model.config.max_position_embeddings
    if not 2 <= tokens <= limit:
        raise HmfError(f"--tokens: {tokens} is not between 2 and {limit}, the model's max_position_embeddings")
    texts = [document.text for document in documents(corpus, "heldout", 40 * tokens * batch)]
    stream = [token for ids in encode_texts(load_tokenizer(source), texts) for token in ids]
    if len(stream) < tokens * batch:
        raise HmfError(f"--tokens, --batch: the held-out text has only {len(stream):,} tokens; give smaller values")
    ids = torch.tensor(stream[: tokens * batch], device=device).view(batch, tokens)
    return state_drift(model, ids, stored)


def print_drift(drifts: list[Drift], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption="\n".join(machine.lines()), caption_justify="left")
    for name in ("positions", "mean |drift|", "worst", "change of loss", "other first choice"):
        table.add_column(name, justify="right")
    for drift in drifts:
        positions, loss = f"{drift.first:,}-{drift.last:,}", f"{drift.loss:+.1g}"
        table.add_row(positions, f"{drift.mean:.2g}", f"{drift.worst:.2g}", loss, f"{drift.changed:.2%}")
    Console().print(table)
