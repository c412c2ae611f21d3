# SPDX-License-Identifier: Apache-2.0
"""The objectives of Stage 1: distances between the student's and the teacher's path of one fused model.

Both paths share embeddings, MLPs, norms and all layers before the first replaced one, which therefore run once. The
teacher's path runs without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from hmf.config.pattern import require_fused
from hmf.config.runs import LayerTarget, ObjectiveSettings
from hmf.data.encoding import IGNORED
from hmf.errors import HmfError
from hmf.layers.own import base_mixer
from hmf.model.convert import mixer_names
from hmf.model.modeling import TEACHER, logits_of

from .divergence import logit_divergence, require_below, wide

Part = Literal["mixer", "mlp", "decoder"]
# The outputs of a layer that each target compares. The loss is the sum over parts of the mean over all layers.
PARTS: dict[str, tuple[Part, ...]] = {
    "none": (),
    "mixer": ("mixer",),
    "decoder": ("decoder",),
    "residuals": ("mixer", "mlp"),
    "all": ("decoder", "mixer", "mlp"),
}
DROPOUT = ("attention_dropout", "resid_pdrop")  # keys of a base's config; the second is Phi-3's
assert set(PARTS) == set(get_args(LayerTarget))


@dataclass(frozen=True)
class Stage1Objective:
    """MSE of the hidden states before the head, MSE of layer outputs by `layers` (a key of PARTS), KL of the logits.

    `pre_lm_head`, `layers_weight` and `kl` are their weights; 0 leaves a term out. The KL term is in nats per token:
    KL(teacher || student) forward, KL(student || teacher) reverse; see `divergence.logit_divergence` for `kl_top_k`,
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
        with torch.no_grad(), _without_dropout(model):
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
        require_below(settings.kl_top_k, vocabulary)


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


def _squared(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the last dimension."""
    return (wide(ours) - wide(theirs)).square().mean(-1)


def _total(error: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return (error if mask is None else error * mask).sum()


def _mean_square(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    square = wide(x).square().mean(-1)
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
        with torch.no_grad(), _without_dropout(model), _uncompiled():
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


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """In the block, a base with dropout runs as in evaluation: the teacher's outputs are targets."""
    dropout = any(getattr(model.config, name, 0) for name in DROPOUT)
    training = [module for module in model.modules() if module.training] if dropout else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _uncompiled() -> Any:
    """A context in which compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager")


def train_only_mixers(model: PreTrainedModel) -> list[str]:
    """Freeze all parameters except those of the mixers; returns the names of the trainable parameters."""
    names = tuple(f"model.layers.{index}.{name}." for index, name in mixer_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
