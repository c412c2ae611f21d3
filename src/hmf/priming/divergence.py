# SPDX-License-Identifier: Apache-2.0
"""The KL divergence of the next-token distributions of student and teacher, from their final hidden states.

Legend: N tokens, D hidden_size, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from hmf.errors import HmfError

LOGITS_AT_ONCE = 2**26  # elements: 256 MiB in float32; about seven tensors of this size exist at a time


def logit_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    head: nn.Module,
    direction: str = "forward",
    top_k: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    differing_weight: float = 1.0,
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda projected: projected,
    compiled: bool = False,
) -> torch.Tensor:
    """Divergence of next-token distributions, [N] in nats, from final hidden states [N, D] of both paths.

    `finish` gives the logits from the head's output (`hmf.model.modeling.logits_of`). `compiled`: torch.compile makes
    the passes over the logits fewer.

    Logits are computed for `chunk_size` tokens at a time (None: as many as fit LOGITS_AT_ONCE elements) and only once:
    the forward pass computes the gradient too, and stores it in the hidden states' shape for the backward pass.

    With `top_k`, the distributions are over the teacher's k most likely tokens and one outcome for all others. The
    result is a true divergence, at most the full one. Normalising over the k tokens alone would not penalise
    probability that the student assigns to other tokens.

    `temperature` divides the logits. The result is multiplied by its square, which keeps the size of the gradients
    (Hinton et al., arXiv 1503.02531, section 2).

    `differing_weight` multiplies the result of each token for which another outcome is the likeliest in the student
    than in the teacher. HmfError if the head is trainable or top_k is too large.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in head.parameters()):
        raise HmfError("lm_head: the head must be frozen in distillation; call train_only_mixers(model) first")
    weight, vocabulary = whole(head.weight), head.weight.shape[0]
    if torch.is_autocast_enabled(place := student.device.type):  # once, as autocast would for each chunk
        weight = weight.to(torch.get_autocast_dtype(place))
    require_below(top_k, vocabulary)

    def logits(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Not head(x): the hooks of a sharded module would mistake this gradient for that of the step.
        ours, theirs = (finish(F.linear(x, weight, head.bias)) for x in (ours, theirs))
        if temperature != 1:
            ours, theirs = wide(ours) / temperature, wide(theirs) / temperature
        if top_k is None:
            return ours, theirs
        kept = theirs.topk(top_k, -1).indices
        return _with_rest(wide(ours), kept), _with_rest(wide(theirs), kept)

    chunk_size = chunk_size or max(1, LOGITS_AT_ONCE // vocabulary)
    rule = partial(_compiled_divergence() if compiled else divergence, direction=direction)
    return _ByRow.apply(student, teacher, logits, rule, chunk_size, differing_weight) * temperature**2


def require_below(top_k: int | None, vocabulary: int) -> None:
    """HmfError if `top_k` leaves no other tokens."""
    if top_k is not None and top_k >= vocabulary:
        raise HmfError(f"objective.kl_top_k: {top_k} is not below the vocabulary size, {vocabulary}; leave it out")


class _ByRow(torch.autograd.Function):
    """The divergence by `rule` of the logits of two tensors [n, D], `chunk_size` rows at a time: [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        logits: Any,
        rule: Any,
        chunk_size: int,
        differing_weight: float,
    ) -> torch.Tensor:
        values, gradients, needs_grad = [], [], ctx.needs_input_grad[0]
        for mine, other in zip(ours.split(chunk_size), theirs.split(chunk_size), strict=True):
            with torch.set_grad_enabled(needs_grad):
                mine = mine.detach().requires_grad_(needs_grad)
                our_logits, their_logits = logits(mine, other)
                value, gradient = rule(our_logits.detach(), their_logits)
                if differing_weight != 1:
                    differs = our_logits.argmax(-1) != their_logits.argmax(-1)
                    weight = torch.where(differs, differing_weight, 1.0).to(value.dtype)
                    value, gradient = value * weight, gradient.mul_(weight[:, None])
                if needs_grad:
                    gradients += torch.autograd.grad(our_logits, mine, gradient)
            values.append(value)
        if needs_grad:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (weight.unsqueeze(-1) * gradient).to(gradient.dtype), None, None, None, None, None


def divergence(ours: torch.Tensor, theirs: torch.Tensor, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence of two softmax distributions, [n], and its gradient with respect to `ours`, from logits [n, V].

    Computed in float32 or wider, in place, with half of the passes over these large tensors that autograd would need.
    """
    log_q, log_p = wide(ours).log_softmax(-1), wide(theirs).log_softmax(-1)
    if direction == "forward":
        p = log_p.exp()
        value = torch.linalg.vecdot(p, log_p.sub_(log_q))
        return value, log_q.exp_().sub_(p).to(ours.dtype)
    difference = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    value = torch.linalg.vecdot(q, difference)
    return value, difference.sub_(value.unsqueeze(-1)).mul_(q).to(ours.dtype)


@functools.cache
def _compiled_divergence() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(divergence)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The full tensor of a frozen parameter, gathered if FSDP has sharded it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _with_rest(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] -> [n, k + 1]: the logits of the tokens `kept` [n, k], and one for all other tokens."""
    rest = logits.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, kept), rest], -1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32; float64 is unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
