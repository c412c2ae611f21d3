# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of a model: its mixers and attentions work on parts of rows as if they were whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hmf.errors import HmfError
from hmf.layers.base import Mixer
from hmf.layers.layout import document_starts
from hmf.ops.dispatch import put_around

from .collectives import Group
from .mixing import ATTENTION, around
from .shards import ShardedLayout, Shards

IGNORED = -100  # the label that transformers' losses leave out


def shard(group: Group, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch of whole rows, the same on all processes of `group`, as what this process passes to its model.

    batch: input_ids [B, T]; optional position_ids [B, T], which restart where a document begins, and labels [B, T].
    T must divide into two chunks a process. Returns parts [B, T/R] of them, the `shards` and, of labels, `shift_labels`
    too: the label of each position's next token, which may be of another part.

    Raises:
        HmfError: T does not divide, or the batch has padding or anything else that cannot be cut.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise HmfError("attention_mask: sequence parallelism takes no padding; pack documents into whole rows")
    if unknown := batch.keys() - {"input_ids", "position_ids", "labels", "attention_mask"}:
        raise HmfError(f"{', '.join(sorted(unknown))}: sequence parallelism cannot cut it; leave it out of the batch")
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    positions = positions.expand(ids.shape)
    starts = document_starts(tuple(ids.shape), positions)
    shards = Shards(torch.ones_like(ids) if starts is None else starts, group)
    parts = {"input_ids": shards.take(ids), "position_ids": shards.take(positions), "shards": shards}
    if (labels := batch.get("labels")) is not None:
        parts["labels"] = shards.take(labels)
        parts["shift_labels"] = shards.take(F.pad(labels[:, 1:], (0, 1), value=IGNORED))
    return parts


def attach(model: PreTrainedModel) -> None:
    """Make `model` take batches from `shard`; whole batches go on as before, with transformers' "sdpa" attention."""
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)


def _enter(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layout = kwargs.get("layout")
    if isinstance(layout, ShardedLayout):
        layout.shards.group.label = f"{mixer.layer_idx} {mixer.symbol}"
        put_around(around(layout.shards))


def _leave(mixer: nn.Module, args: Any, output: Any) -> None:
    put_around({})
