# SPDX-License-Identifier: Apache-2.0
"""The two ways tensors travel between the processes of a group, with their gradients, and how many bytes did.

Every process must call them in the same order. Their backwards then run in one order too, because autograd goes back
strictly by when a result was made.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

# Their names until torch 2.12.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """The processes that hold parts of the same rows.

    `received` counts the bytes that this process got from the others, by the `label` that was set when a forward pass
    asked for them; what its backward sends back is under the same label.
    """

    def __init__(self, group: Any = None):
        """group: of torch.distributed; None for all processes."""
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.received: Counter[str] = Counter()
        self.label = ""

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [...], of one shape everywhere -> [R, ...] by rank. Its gradient is the sum of all ranks' gradients."""
        return _Gather.apply(x, self)

    def exchange(self, x: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """The first send[0] entries of x [N, ...] to rank 0, the next to rank 1 and so on; returns what came, by rank.

        receive[r]: how many entries come from rank r.
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
