# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of a model: dividing batches over processes, and attaching the wrappers to its mixers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hmf.data.encoding import IGNORED
from hmf.errors import HmfError
from hmf.layers.base import Stateful
from hmf.layers.layout import document_starts
from hmf.ops.dispatch import set_wrappers

from .collectives import Group
from .mixing import ATTENTION, op_wrappers
from .shards import ShardedLayout, Shards, own_part

STARTS = "document_starts"  # key of a divided batch: the document starts of the whole rows


def sequence_group(ranks: int) -> Group:
    """This process's group of `ranks` neighbours that share rows. All processes must call it.

    Raises:
        HmfError: the number of processes is not a multiple of `ranks`.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes % ranks:
        raise HmfError(
            f"training.sequence_parallel: {processes} processes do not divide into groups of {ranks}; start a multiple "
            f"of {ranks} with torchrun, or change the key"
        )
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, processes, ranks)]
    return Group(groups[dist.get_rank() // ranks])


def split_batch(batch: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """The part of a batch of whole rows that process `rank` of `ranks` holds. All processes pass the same batch.

    batch: input_ids [B, T]; optional position_ids [B, T], which restart where a document begins, and labels [B, T].
    T must be a multiple of 2R. Returns parts [B, T/R] of input_ids and position_ids, in place of labels `shift_labels`
    (the label of each position's next token, which may be in another part), and the whole rows' `document_starts`
    [B, T].

    Raises:
        HmfError: T is not a multiple of 2R, or the batch has padding or a tensor that cannot be divided.
    """
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and not bool(mask.all()):
        raise HmfError("attention_mask: sequence parallelism supports no padding; pack documents into whole rows")
    if unknown := batch.keys() - {"input_ids", "position_ids", "labels", "attention_mask"}:
        raise HmfError(
            f"{', '.join(sorted(unknown))}: sequence parallelism cannot divide this; leave it out of the batch"
        )
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    positions = positions.expand(ids.shape)
    starts = document_starts(tuple(ids.shape), positions)
    parts = {"input_ids": ids, "position_ids": positions}
    if (labels := batch.get("labels")) is not None:
        parts["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    parts = {name: own_part(x, rank, ranks) for name, x in parts.items()}
    return {**parts, STARTS: torch.zeros_like(ids, dtype=torch.bool) if starts is None else starts}


def with_shards(group: Group, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch from `split_batch` in the form that the model accepts: with `shards` in place of `document_starts`."""
    batch = dict(batch)
    return {**batch, "shards": Shards(batch.pop(STARTS), group)}


def shard(group: Group, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The batch that this process of `group` passes to its model for a batch of whole rows (see `split_batch`)."""
    return with_shards(group, split_batch(batch, group.rank, group.size))


def attach(model: PreTrainedModel) -> None:
    """Make `model` accept batches from `shard`. Whole batches work as before, with transformers' "sdpa" attention."""
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if isinstance(module, Stateful):
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)


def _enter(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layout = kwargs.get("layout")
    if isinstance(layout, ShardedLayout):
        layout.shards.group.label = f"{mixer.layer_idx} {mixer.symbol}"
        set_wrappers(op_wrappers(layout.shards))


def _leave(mixer: nn.Module, args: Any, output: Any) -> None:
    set_wrappers({})
