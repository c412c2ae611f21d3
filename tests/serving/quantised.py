# SPDX-License-Identifier: Apache-2.0
"""A checkpoint quantised to int8 as compressed-tensors writes it, and the Hugging Face model that computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
LARGEST = 64  # more overflows on processors without VNNI


def quantise_int8(path: Path, model: Any, chosen: Callable[[str], bool]) -> None:
    """Rewrite the checkpoint of `model` at `path` with the projections that `chosen` names in int8, a scale a channel.

    `model` then computes with the same weights, and rounds the inputs of these projections a token at a time.
    """
    from safetensors.torch import load_file, save_file

    tensors, ignored = load_file(path / "model.safetensors"), []
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        if not chosen(name):
            ignored.append(name)
            continue
        scale = linear.weight.data.abs().amax(1, keepdim=True) / LARGEST
        rounded = (linear.weight.data / scale).round()
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rounded.to(torch.int8), scale
        linear.weight.data = rounded * scale
        linear.register_forward_pre_hook(lambda module, inputs: (_rounded(inputs[0]), *inputs[1:]))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    weights = SCHEME | {"strategy": "channel", "dynamic": False}
    inputs = SCHEME | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignored,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round().clamp(-128, 127) * scale
