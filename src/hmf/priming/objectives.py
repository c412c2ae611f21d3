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
from torch import nn
from transformers import PreTrainedModel

from hmf.config.runs import LayerTarget
from hmf.errors import HmfError
from hmf.model.convert import mixer_names
from hmf.model.modeling import STUDENT, TEACHER

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
    """MSE of the hidden states before the head, and of layer outputs by `layers` (a key of PARTS).

    Call it with a fused model and a batch (input_ids [B, T], optional attention_mask and position_ids); it returns
    scalar losses by name, "loss" being their sum. Padded positions do not count.
    """

    layers: str = "none"
    pre_lm_head: bool = True

    def __call__(self, model: PreTrainedModel, **batch: Any) -> dict[str, torch.Tensor]:
        config = model.config
        if not config.pattern.fused:
            raise HmfError("distillation needs a fused checkpoint (teacher and student); make one with `hmf init`")
        if not self.pre_lm_head and not PARTS[self.layers]:
            raise HmfError("objective: nothing to compare; set pre_lm_head: true or choose a layer target")
        decoder, parts = model.model, PARTS[self.layers]
        mask = batch.get("attention_mask")
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
            error = (ours.float() - theirs.float()).square().mean(-1)
            return error.mean() if mask is None else (error * mask).sum() / mask.sum()

        losses = {"hidden": distance(decoder.norm(student), target)} if self.pre_lm_head else {}
        for part in parts:
            pairs = zip(found[part], wanted[part], strict=True)
            losses[part] = torch.stack([distance(ours, theirs) for ours, theirs in pairs]).sum() / count
        return {"loss": torch.stack(list(losses.values())).sum(), **{k: v.detach() for k, v in losses.items()}}


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
