# SPDX-License-Identifier: Apache-2.0
"""The objectives of Stage 1: distances between the student's and the teacher's path of one fused model.

Both paths share embeddings, MLPs, norms and all layers before the first replaced one, which therefore run once. The
teacher's path runs without gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hmf.config.pattern import require_fused
from hmf.config.runs import LayerTarget, ObjectiveSettings
from hmf.data.encoding import IGNORED
from hmf.errors import HmfError
from hmf.layers.own import base_mixer
from hmf.model.convert import mixer_names
from hmf.model.modeling import TEACHER, logits_of

LOGITS_AT_ONCE = 2**26  # elements: 256 MiB in float32; about seven tensors of this size exist at a time
Part = Literal["mixer", "mlp", "decoder"]
# The outputs of a layer that each target compares. The loss is the sum over parts of the mean over all layers.
PARTS: dict[str, tuple[Part, ...]] = {
    "none": (),
    "mixer": ("mixer",),
    "decoder": ("decoder",),
    "residuals": ("mixer", "mlp"),
    "all": ("decoder", "mixer", "mlp"),
}
assert set(PARTS) == set(get_args(LayerTarget))


@dataclass(frozen=True)
class Stage1Objective:
    """MSE of the hidden states before the head, MSE of layer outputs by `layers` (a key of PARTS), KL of the logits.

    `pre_lm_head`, `layers_weight` and `kl` are their weights; 0 leaves a term out. The KL term is in nats per token:
    KL(teacher || student) forward, KL(student || teacher) reverse; see `logit_divergence` for `kl_top_k`,
    `kl_temperature`, `kl_chunk_size` and `kl_differing_weight`. With `kl_tokens` "supervised" the KL term is a mean
    over positions whose next token has a label, so that the tokens of long prompts do not dominate it. `replaced` names
    the layers in which the student runs mixers; None stands for all that have one. `compiled`: compile the divergence.

    Call it with a fused model and a batch (input_ids [B, T], optional labels, attention_mask and position_ids). It
    returns scalar losses by name; "loss" is their sum. Padding does not count. Each loss is a sum over the batch's
    tokens divided by `counts`: the batch's own (`token_counts`), or those of the whole optimiser step. With the latter,
    the losses of all its batches, in all processes, add up to the loss of one large batch.
    """

    layers: str = "none"
    pre_lm_head: float = 1.0
    kl: float = 0.0
    kl_direction: Literal["forward", "reverse"] = "forward"
    kl_tokens: Literal["all", "supervised"] = "all"
    layers_weight: float = 1.0
    kl_top_k: int | None = None
    kl_temperature: float = 1.0
    kl_chunk_size: int | None = None
    kl_differing_weight: float = 1.0
    replaced: frozenset[int] | None = None
    compiled: bool = False

    def __call__(
        self, model: PreTrainedModel, counts: torch.Tensor | None = None, **batch: Any
    ) -> dict[str, torch.Tensor]:
        require_fused(model.config, "distillation")
        config, parts = model.config, PARTS[self.layers] if self.layers_weight else ()
        if not (self.pre_lm_head or parts or self.kl):
            raise HmfError("objective: has no term; set pre_lm_head, kl or layers")
        if counts is None:
            counts = token_counts(**batch)
        tokens, supervised = counts.clamp_min(1)
        decoder, mask = model.model, batch.get("attention_mask")
        labeled = _predicts_a_label(batch.pop("labels", None), batch.pop("shift_labels", None))
        inputs = decoder.prepare(**batch, use_cache=False)
        mixed = frozenset(config.pattern.replaced) if self.replaced is None else self.replaced
        first, count = min(mixed), config.num_hidden_layers
        with torch.no_grad():
            shared = decoder.run_layers(inputs.hidden_states, inputs, range(first), TEACHER)
            with _recorded(model, frozenset(), parts, first) as teacher_outputs:
                teacher = decoder.run_layers(shared, inputs, range(first, count), TEACHER)
            target = decoder.norm(teacher)
        with _recorded(model, mixed, parts, first) as student_outputs:
            student = decoder.run_layers(shared, inputs, range(first, count), mixed)

        def distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return _total(_squared(ours, theirs), mask) / tokens

        final = decoder.norm(student)
        losses = {"hidden": self.pre_lm_head * distance(final, target)} if self.pre_lm_head else {}
        if self.kl:
            if self.kl_tokens == "all":
                chosen, number = mask, tokens
            elif labeled is None:
                raise HmfError("objective.kl_tokens: supervised needs labels in the batch; use all without labels")
            else:
                chosen, number = labeled, supervised
            ours, theirs = (x.flatten(0, 1) if chosen is None else x[chosen.bool()] for x in (final, target))
            divergence = logit_divergence(
                ours,
                theirs,
                model.get_output_embeddings(),
                self.kl_direction,
                self.kl_top_k,
                self.kl_temperature,
                self.kl_chunk_size,
                self.kl_differing_weight,
                partial(logits_of, model),
                self.compiled,
            )
            losses["kl"] = self.kl * divergence.sum() / number
        for part in parts:
            pairs = zip(student_outputs[part], teacher_outputs[part], strict=True)
            total = torch.stack([distance(ours, theirs) for ours, theirs in pairs]).sum()
            losses[part] = self.layers_weight * total / count
        return {"loss": torch.stack(list(losses.values())).sum(), **{k: v.detach() for k, v in losses.items()}}


@dataclass(frozen=True)
class LayerwiseObjective:
    """Each mixer alone: its input is the teacher's attention input, and its target is the teacher's attention output.

    The squared error of each layer is divided by `sizes`, the mean square of its target (`attention_sizes`; None: that
    of this batch). The loss is the mean over replaced layers. Errors do not propagate between layers and there is no
    backward pass through MLPs. A step therefore costs less than half of one with `Stage1Objective`, and mixers that
    start from attention become usable with a fraction of the tokens (attention transfer in LoLCATs, arXiv 2410.10254).
    Called like `Stage1Objective`; the part is named "layerwise".
    """

    sizes: tuple[float, ...] | None = None

    def __call__(
        self, model: PreTrainedModel, counts: torch.Tensor | None = None, **batch: Any
    ) -> dict[str, torch.Tensor]:
        require_fused(model.config, "distillation")
        if counts is None:
            counts = token_counts(**batch)
        batch.pop("labels", None)
        mask, tokens = batch.get("attention_mask"), counts[0].clamp_min(1)
        inputs = model.model.prepare(**batch, use_cache=False)
        attentions = _attentions(model, inputs)
        types, position_ids = model.config.attention_types, inputs.shared["position_ids"]
        losses = []
        for place, (index, name) in enumerate(mixer_names(model)):
            hidden_states, target = attentions.pop(index)
            mixer = model.model.layers[index].get_submodule(name)
            positions = {"position_ids": position_ids, "position_embeddings": inputs.rotary[types[index]]}
            output, _ = mixer(hidden_states, layout=inputs.layout, **positions)
            size = self.sizes[place] if self.sizes else _mean_square(target, mask)
            losses.append(_total(_squared(output, target), mask) / (tokens * size))
        loss = torch.stack(losses).mean()
        return {"loss": loss, "layerwise": loss.detach()}


Objective = Stage1Objective | LayerwiseObjective


def objective_at(
    settings: ObjectiveSettings, step: int, sizes: tuple[float, ...] | None = None, compiled: bool = False
) -> Objective:
    """The objective of a recipe at an optimiser step. sizes, compiled: see the two classes."""
    if step < settings.layerwise_steps:
        return LayerwiseObjective(sizes)
    weights = settings.weights_at(step)
    return Stage1Objective(
        layers=settings.layers,
        pre_lm_head=weights["pre_lm_head"],
        layers_weight=weights["layers"],
        kl=weights["kl"],
        compiled=compiled,
        **settings.model_dump(include={name for name in ObjectiveSettings.model_fields if name.startswith("kl_")}),
    )


def check_objective(settings: ObjectiveSettings, vocabulary: int) -> None:
    """HmfError for a term that cannot be computed at the step at which it begins, with a vocabulary of this size."""
    if any(settings.kl.values()):
        _require_below(settings.kl_top_k, vocabulary)


def _require_below(top_k: int | None, vocabulary: int) -> None:
    if top_k is not None and top_k >= vocabulary:
        raise HmfError(f"objective.kl_top_k: {top_k} is not below the vocabulary size, {vocabulary}; leave it out")


def token_counts(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    **batch: Any,
) -> torch.Tensor:
    """int64 [2]: the real tokens of a batch, and the tokens whose next token has a label; the divisors of losses."""
    ones = input_ids.new_tensor(input_ids.numel())
    tokens = ones if attention_mask is None else attention_mask.sum()
    labeled = _predicts_a_label(labels, shift_labels)
    supervised = torch.zeros_like(ones) if labeled is None else labeled.sum()
    return torch.stack([tokens.long(), supervised.long()])


@torch.no_grad()
def attention_sizes(model: PreTrainedModel, **batch: Any) -> tuple[float, ...]:
    """The mean square of each replaced attention's output (the teacher's) on a batch."""
    require_fused(model.config, "distillation")
    batch.pop("labels", None)
    attentions = _attentions(model, model.model.prepare(**batch, use_cache=False))
    return tuple(_mean_square(output, batch.get("attention_mask")).item() for _, output in attentions.values())


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
    _require_below(top_k, vocabulary)

    def logits(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Not head(x): the hooks of a sharded module would mistake this gradient for that of the step.
        ours, theirs = (finish(F.linear(x, weight, head.bias)) for x in (ours, theirs))
        if temperature != 1:
            ours, theirs = _wide(ours) / temperature, _wide(theirs) / temperature
        if top_k is None:
            return ours, theirs
        kept = theirs.topk(top_k, -1).indices
        return _with_rest(_wide(ours), kept), _with_rest(_wide(theirs), kept)

    chunk_size = chunk_size or max(1, LOGITS_AT_ONCE // vocabulary)
    rule = partial(_compiled_divergence() if compiled else divergence, direction=direction)
    return _ByRow.apply(student, teacher, logits, rule, chunk_size, differing_weight) * temperature**2


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
    log_q, log_p = _wide(ours).log_softmax(-1), _wide(theirs).log_softmax(-1)
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


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Convert to float32; float64 is unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _squared(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the last dimension."""
    return (_wide(ours) - _wide(theirs)).square().mean(-1)


def _total(error: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return (error if mask is None else error * mask).sum()


def _mean_square(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    square = _wide(x).square().mean(-1)
    return square.mean() if mask is None else (square * mask).sum() / mask.sum().clamp_min(1)


def _predicts_a_label(labels: torch.Tensor | None, shift_labels: torch.Tensor | None = None) -> torch.Tensor | None:
    """bool [B, T]: whether token t + 1, which position t predicts, has a label. None without labels.

    `shift_labels` [B, T] has the label of token t + 1 at position t.
    """
    if shift_labels is not None:
        return shift_labels != IGNORED
    return None if labels is None else F.pad(labels[:, 1:] != IGNORED, (0, 1))


def _attentions(model: PreTrainedModel, inputs: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output [B, T, D] of the base's token mixer in every replaced layer, on the teacher's path."""
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            recorded[index] = (kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)

        return hook

    replaced = model.config.pattern.replaced
    attentions = {index: base_mixer(model.model.layers[index]) for index in replaced}
    hooks = [x.register_forward_hook(keep(index), with_kwargs=True) for index, x in attentions.items()]
    try:
        with torch.no_grad(), _uncompiled():
            model.model.run_layers(inputs.hidden_states, inputs, range(replaced[-1] + 1), TEACHER)
    finally:
        for hook in hooks:
            hook.remove()
    return recorded


@contextmanager
def _recorded(
    model: PreTrainedModel, mixed: frozenset[int], parts: tuple[Part, ...], first: int
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """During the block, record the outputs of each layer from `first` on, by part. The block must run these mixers.

    With parts to record, compiled layers run uncompiled, because compiled code does not see the hooks of every step.
    """
    outputs: dict[str, list[torch.Tensor]] = {part: [] for part in parts}
    names = {index: name for index, name in mixer_names(model) if index in mixed}

    def keep(part: Part) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[part].append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = []
    for index, layer in enumerate(model.model.layers):
        if index < first:
            continue
        mixer = layer.get_submodule(names[index]) if index in names else base_mixer(layer)
        modules = {"decoder": layer, "mlp": layer.mlp, "mixer": mixer}
        hooks += [modules[part].register_forward_hook(keep(part)) for part in parts]
    try:
        with _uncompiled() if hooks else nullcontext():
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _uncompiled() -> Any:
    """A context in which compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager")


def train_only_mixers(model: PreTrainedModel) -> list[str]:
    """Freeze all parameters except those of the mixers; returns the names of the trainable parameters."""
    names = tuple(f"model.layers.{index}.{name}." for index, name in mixer_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
