# SPDX-License-Identifier: Apache-2.0
"""Measures of a fused model besides its loss: the error of each layer, and the FLOPs of a token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hmf.config.layers import experts_per_token
from hmf.layers.own import base_mixer
from hmf.model.modeling import STUDENT, TEACHER


@torch.no_grad()
def layer_errors(model: PreTrainedModel, **batch: Any) -> dict[int, torch.Tensor]:
    """Squared distance of the student's hidden states to the teacher's after each layer, relative to the teacher's.

    Scalars by layer index, from the first replaced layer on; before it, both paths are the same. batch: input_ids
    [B, T], optional attention_mask and position_ids. The student's errors accumulate over the layers, as in inference.
    """
    decoder, mask = model.model, batch.get("attention_mask")
    inputs = decoder.prepare(**batch, use_cache=False)
    first = model.config.pattern.replaced[0]
    teacher = student = decoder.run_layers(inputs.hidden_states, inputs, range(first))
    errors = {}
    for index in range(first, len(decoder.layers)):
        teacher = decoder.run_layers(teacher, inputs, range(index, index + 1), TEACHER)
        student = decoder.run_layers(student, inputs, range(index, index + 1), STUDENT)
        error, size = (student.float() - teacher.float()).square().sum(-1), teacher.float().square().sum(-1)
        if mask is not None:
            error, size = error * mask, size * mask
        errors[index] = error.sum() / size.sum()
    return errors


def stage1_flops_per_token(model: PreTrainedModel, head: bool = False) -> float | None:
    """Floating-point operations of Stage 1 per token, from parameter counts.

    A forward pass counts 2 per parameter, the backward to activations 2, and the backward to weights 2. Layers before
    the first trained one run forward once. Later layers run forward on both paths; the student's path also runs
    backward to activations, and its mixers to their weights. `head`: whether the logits of both paths are computed.
    Not counted are operations that grow with the sequence (attention scores, states), and recomputation. None for
    mixtures of experts, whose tokens use only part of the parameters.
    """
    if experts_per_token(model.config):
        return None
    total, started = 0, False
    for layer in model.model.layers:
        trained = sum(x.numel() for x in layer.parameters() if x.requires_grad)
        frozen = sum(x.numel() for x in layer.parameters() if not x.requires_grad)
        if trained:
            started = True
            student = trained + frozen - sum(x.numel() for x in base_mixer(layer).parameters())
        else:
            student = frozen
        total += 2 * frozen + (4 * student + 2 * trained if started else 0)
    if head:
        total += 6 * model.get_output_embeddings().weight.numel()
    return float(total)
