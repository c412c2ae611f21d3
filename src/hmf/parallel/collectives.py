# SPDX-License-Identifier: Apache-2.0
"""The two collectives of sequence parallelism, all-gather and all-to-all, with gradients and byte counts.

All processes must call them in the same order. Their backwards then run in the same order too, because autograd runs
backward in the reverse order of creation.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

# The second names are those of torch up to 2.12.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """The processes that hold parts of the same rows.

    `received` counts the bytes that this process received from the others, by the `label` at the time of the forward
    call. The bytes of its backward have the same label.
    """

    def __init__(self, group: Any = None):
        """group: a group of torch.distributed; None for all processes."""
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.received: Counter[str] = Counter()
        self.label = ""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...], of the same shape on all ranks -> [R, ...] by rank. Its gradient is the sum over all ranks."""
        return _Gather.apply(x, self)

    def exchange(self, x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Send the first send[0] entries of x [N, ...] to rank 0, the next send[1] to rank 1, and so on.

        receive[r]: the number of entries that rank r sends to this one. Returns the received entries, by rank.
        """
        return _Exchange.apply(x, self, send, receive)

    def count(self, label: str, size: int) -> None:
        self.received[label] += size


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group, ctx.label = group, group.label
        out = x.new_empty(group.size, *x.shape)
        _all_gather(out.flatten(), x.contiguous().flatten(), group=group.group)
        group.count(ctx.label, (group.size - 1) * x.nbytes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        out = grad.new_empty(grad.shape[1:])
        _reduce_scatter(out.flatten(), grad.contiguous().flatten(), group=ctx.group.group)
        ctx.group.count(ctx.label, (ctx.group.size - 1) * out.nbytes)
        return out, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, send: list[int], receive: list[int]) -> torch.Tensor:
        ctx.group, ctx.label, ctx.send, ctx.receive = group, group.label, send, receive
        return _all_to_all(x, group, ctx.label, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_to_all(grads[0], ctx.group, ctx.label, ctx.receive, ctx.send), None, None, None


def _all_to_all(x: torch.Tensor, group: Group, label: str, send: list[int], receive: list[int]) -> torch.Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.group)
    others = out.shape[0] - receive[group.rank]
    group.count(label, others * out.element_size() * math.prod(out.shape[1:]))
    return out
