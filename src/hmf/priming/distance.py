# SPDX-License-Identifier: Apache-2.0
"""What is worth knowing of a fused model beside its loss: how far each layer is off, and what a token costs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hmf.model.modeling import STUDENT, TEACHER


@torch.no_grad()
def layer_errors(model: PreTrainedModel, **batch: Any) -> dict[int, torch.Tensor]:
    """Squared distance of the student's hidden states to the teacher's, relative to the teacher's, after each layer.

    By layer index, from the first replaced layer on (before it both are the same); scalars. batch: input_ids [B, T],
    optional attention_mask and position_ids. Errors of earlier layers are carried on, as they are in use.
    """
    decoder, mask = model.model, batch.get("attention_mask")
    inputs = decoder.prepare(**batch, use_cache=False)
    first = model.config.pattern.replaced[0]
    teacher = student = decoder.run_layers(inputs.hidden_states, inputs, range(first))
    errors = {}
    for index in range(first, len(decoder.layers)):
        teacher = decoder.run_layers(teacher, inputs, range(index, index + 1), TEACHER)
        student = decoder.run_layers(student, inputs, range(index, index + 1), STUDENT)
        off, size = (student.float() - teacher.float()).square().sum(-1), teacher.float().square().sum(-1)
        if mask is not None:
            off, size = off * mask, size * mask
        errors[index] = off.sum() / size.sum()
    return errors


def stage1_flops_per_token(model: PreTrainedModel, head: bool = False) -> float | None:
    """Floating-point operations that Stage 1 needs for a token, from parameter counts (2 for each forward pass).

    Layers before the first trained one run once; later ones run on both paths, the student's also backward to its
    activations (2 more) and its mixers to their weights (2 more). `head`: whether both paths' logits are computed. What
    grows with the sequence (attention's scores, states) and what is computed twice to save memory do not count. None
    for mixtures of experts, whose tokens use part of the parameters only.
    """
    if getattr(model.config, "num_experts", None) or getattr(model.config, "num_local_experts", None):
        return None
    total, started = 0, False
    for layer in model.model.layers:
        trained = sum(x.numel() for x in layer.parameters() if x.requires_grad)
        frozen = sum(x.numel() for x in layer.parameters() if not x.requires_grad)
        if trained:
            started = True
            student = trained + frozen - sum(x.numel() for x in layer.self_attn.parameters())
        else:
            student = frozen
        total += 2 * frozen + (4 * student + 2 * trained if started else 0)
    if head:
        total += 6 * model.get_output_embeddings().weight.numel()
    return float(total)
