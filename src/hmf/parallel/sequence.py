# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of a model: its mixers and attentions work on parts of rows as if they were whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hmf.data.encoding import IGNORED
from hmf.errors import HmfError
from hmf.layers.base import Mixer
from hmf.layers.layout import document_starts
from hmf.ops.dispatch import set_wrappers

from .collectives import Group
from .mixing import ATTENTION, around
from .shards import ShardedLayout, Shards, own_part

STARTS = "document_starts"  # of the whole rows, in a batch of parts


def sequence_group(ranks: int) -> Group:
    """This process's group of `ranks` neighbours that share rows; all processes must call it.

    Raises:
        HmfError: the processes do not divide into such groups.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes % ranks:
        raise HmfError(
            f"training.sequence_parallel: {processes} processes do not divide into groups of {ranks}; start a multiple "
            f"of {ranks} with torchrun, or change it"
        )
    groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, processes, ranks)]
    return Group(groups[dist.get_rank() // ranks])


def cut(batch: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What process `rank` of `ranks` holds of a batch of whole rows, the same in all of them; tensors only.

    batch: input_ids [B, T]; optional position_ids [B, T], which restart where a document begins, and labels [B, T].
    T must divide into two chunks a process. Returns parts [B, T/R] of them; for labels `shift_labels`, the label of
    each position's next token, which may be of another part; and the whole rows' `document_starts` [B, T].

    Raises:
        HmfError: T does not divide, or the batch has padding or anything else that cannot be cut.
    """
    ids, mask, positions = batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids")
    if mask is not None and not bool(mask.all()):
        raise HmfError("attention_mask: sequence parallelism takes no padding; pack documents into whole rows")
    if unknown := batch.keys() - {"input_ids", "position_ids", "labels", "attention_mask"}:
        raise HmfError(f"{', '.join(sorted(unknown))}: sequence parallelism cannot cut it; leave it out of the batch")
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
    """A batch from `cut` as a model takes it: with `shards` in the place of `document_starts`."""
    batch = dict(batch)
    return {**batch, "shards": Shards(batch.pop(STARTS), group)}


def shard(group: Group, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What this process of `group` passes to its model for a batch of whole rows (see `cut`)."""
    return with_shards(group, cut(batch, group.rank, group.size))


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
        set_wrappers(around(layout.shards))


def _leave(mixer: nn.Module, args: Any, output: Any) -> None:
    set_wrappers({})
