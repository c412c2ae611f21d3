# SPDX-License-Identifier: Apache-2.0
"""Stage 1: how far the student's path is from the teacher's, in one module.

Both paths share embeddings, MLPs, norms and every layer before the first replaced one, which therefore runs once. The
teacher's path keeps no activations for a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hmf.config.runs import LayerTarget
from hmf.errors import HmfError
from hmf.model.convert import mixer_names
from hmf.model.modeling import STUDENT, TEACHER

IGNORED = -100  # the label that transformers' losses leave out
Part = Literal["mixer", "mlp", "decoder"]
# Which outputs of a layer each target compares; the mean over all layers of each part is added up.
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

    `kl` weighs the Kullback-Leibler divergence between the teacher's and the student's next-token distributions, in
    nats a token: KL(teacher || student) forward, KL(student || teacher) reverse. 0 leaves it out; `kl_tokens`
    "supervised" counts only positions whose next token has a label, so that answers are not lost among the tokens of
    their prompts.

    Call it with a fused model and a batch (input_ids [B, T], optional labels, attention_mask and position_ids); it
    returns scalar losses by name, "loss" being their sum. Padded positions do not count.
    """

    layers: str = "none"
    pre_lm_head: bool = True
    kl: float = 0.0
    kl_direction: Literal["forward", "reverse"] = "forward"
    kl_tokens: Literal["all", "supervised"] = "all"

    def __call__(self, model: PreTrainedModel, **batch: Any) -> dict[str, torch.Tensor]:
        require_fused(model)
        config = model.config
        if not self.pre_lm_head and not PARTS[self.layers] and not self.kl:
            raise HmfError("objective: nothing to compare; set pre_lm_head: true, kl or a layer target")
        decoder, parts = model.model, PARTS[self.layers]
        mask, labels = batch.get("attention_mask"), batch.pop("labels", None)
        inputs = decoder.prepare(**batch, use_cache=False)
        first, count = config.pattern.replaced[0], config.num_hidden_layers
        with torch.no_grad():
            shared = decoder.run_layers(inputs.hidden_states, inputs, range(first))
            with _recorded(model, TEACHER, parts, first) as wanted:
                teacher = decoder.run_layers(shared, inputs, range(first, count), TEACHER)
            target = decoder.norm(teacher)
        with _recorded(model, STUDENT, parts, first) as found:
            student = decoder.run_layers(shared, inputs, range(first, count), STUDENT)

        def distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            return token_mean((ours.float() - theirs.float()).square().mean(-1))

        def token_mean(error: torch.Tensor, weight: torch.Tensor | None = mask) -> torch.Tensor:
            return error.mean() if weight is None else (error * weight).sum() / weight.sum().clamp_min(1)

        final = decoder.norm(student)
        losses = {"hidden": distance(final, target)} if self.pre_lm_head else {}
        if self.kl:
            divergence = logit_divergence(final, target, model.get_output_embeddings(), self.kl_direction)
            counted = mask
            if self.kl_tokens == "supervised":
                if labels is None:
                    raise HmfError("objective: kl_tokens: supervised needs labels in the batch")
                counted = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # position t predicts token t + 1
            losses["kl"] = self.kl * token_mean(divergence, counted)
        for part in parts:
            pairs = zip(found[part], wanted[part], strict=True)
            losses[part] = torch.stack([distance(ours, theirs) for ours, theirs in pairs]).sum() / count
        return {"loss": torch.stack(list(losses.values())).sum(), **{k: v.detach() for k, v in losses.items()}}


@dataclass(frozen=True)
class LayerwiseObjective:
    """Every mixer alone: the teacher's own input in, the teacher's attention output wanted.

    The error of each layer is relative to the size of what is wanted; the loss is the mean over replaced layers. Layers
    do not see each other's errors and nothing runs backward through MLPs, so a step costs less than half of one with
    `Stage1Objective` and a start from attention becomes usable in a fraction of the tokens (attention transfer in
    LoLCATs, arXiv 2410.10254). Called as `Stage1Objective` is; the part is named "layerwise".
    """

    def __call__(self, model: PreTrainedModel, **batch: Any) -> dict[str, torch.Tensor]:
        require_fused(model)
        mask = batch.get("attention_mask")
        batch.pop("labels", None)
        inputs = model.model.prepare(**batch, use_cache=False)
        seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                seen[index] = (kwargs["hidden_states"], output[0])

            return hook

        replaced = model.config.pattern.replaced
        attentions = {index: model.model.layers[index].self_attn for index in replaced}
        hooks = [x.register_forward_hook(keep(index), with_kwargs=True) for index, x in attentions.items()]
        try:
            with torch.no_grad():
                model.model.run_layers(inputs.hidden_states, inputs, range(replaced[-1] + 1), TEACHER)
        finally:
            for hook in hooks:
                hook.remove()
        losses = []
        for index, name in mixer_names(model):
            given, wanted = seen.pop(index)
            mixer = model.model.layers[index].get_submodule(name)
            found, _ = mixer(given, layout=inputs.layout, position_embeddings=inputs.shared["position_embeddings"])
            error, size = (found.float() - wanted.float()).square().mean(-1), wanted.float().square().mean(-1)
            if mask is not None:
                error, size = error * mask, size * mask
            losses.append(error.sum() / size.sum())
        loss = torch.stack(losses).mean()
        return {"loss": loss, "layerwise": loss.detach()}


def require_fused(model: PreTrainedModel) -> None:
    """HmfError unless `model` holds teacher and student."""
    if not model.config.pattern.fused:
        raise HmfError("distillation needs a fused checkpoint (teacher and student); make one with `hmf init`")


def logit_divergence(
    student: torch.Tensor, teacher: torch.Tensor, head: nn.Module, direction: str = "forward", chunk_size: int = 2048
) -> torch.Tensor:
    """Divergence of next-token distributions, [B, T] in nats, from final hidden states [B, T, D] of both paths.

    Logits exist for `chunk_size` tokens at a time only, in the backward pass too, where they are computed again.
    """

    def of_chunk(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        ours, theirs = (head(x).float().log_softmax(-1) for x in (ours, theirs))
        if direction == "reverse":
            ours, theirs = theirs, ours
        return F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)

    if student.shape[:2].numel() <= chunk_size:
        return of_chunk(student, teacher)
    chunks = zip(student.flatten(0, 1).split(chunk_size), teacher.flatten(0, 1).split(chunk_size), strict=True)
    parts = [checkpoint(of_chunk, ours, theirs, use_reentrant=False) for ours, theirs in chunks]
    return torch.cat(parts).view(student.shape[:2])


@contextmanager
def _recorded(
    model: PreTrainedModel, path: str, parts: tuple[Part, ...], first: int
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the outputs of each layer from `first` on, by part, while the block runs one path."""
    outputs: dict[str, list[torch.Tensor]] = {part: [] for part in parts}
    names = dict(mixer_names(model)) if path == STUDENT else {}

    def keep(part: Part) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            outputs[part].append(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = []
    for index, layer in enumerate(model.model.layers):
        if index < first:
            continue
        modules = {"decoder": layer, "mlp": layer.mlp, "mixer": getattr(layer, names.get(index, "self_attn"))}
        hooks += [modules[part].register_forward_hook(keep(part)) for part in parts]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def train_only_mixers(model: PreTrainedModel) -> list[str]:
    """Freeze everything but the mixers; returns the names of the trainable parameters."""
    names = tuple(f"model.layers.{index}.{name}." for index, name in mixer_names(model))
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
        if parameter.requires_grad:
            trainable.append(name)
    return trainable
