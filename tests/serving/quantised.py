# SPDX-License-Identifier: Apache-2.0
"""Checkpoints quantised to eight bits as they are published, and the Hugging Face model that computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Format:
    """largest: what the largest weight of a scale becomes, and `inputs` the largest input of a token; scheme: the names
    of a quantisation in compressed-tensors, or None for the method "fp8", which has one scale a tensor."""

    dtype: torch.dtype
    largest: float
    inputs: float
    scheme: tuple[str, str] | None

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.round() if self.dtype == torch.int8 else x.to(self.dtype).float()


FORMATS = {
    "int8": Format(torch.int8, 64, 127, ("int-quantized", "int")),  # more overflows on processors without VNNI
    "float8": Format(torch.float8_e4m3fn, 448, 448, ("float-quantized", "float")),
    "fp8": Format(torch.float8_e4m3fn, 448, 448, None),
}


def quantise(path: Path, model: Any, chosen: Callable[[str], bool], name: str = "int8") -> None:
    """Rewrite the checkpoint of `model` at `path` with the projections that `chosen` names in format `name`.

    `model` then computes with the same weights, and rounds the inputs of these projections a token at a time.
    """
    from safetensors.torch import load_file, save_file

    form, tensors = FORMATS[name], load_file(path / "model.safetensors")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ignored = [name for name in linears if not chosen(name)]
    for name in ignored:
        del linears[name]
    # Projections that vLLM joins share a tensor and so its scale: here all do.
    shared = max(linear.weight.detach().abs().max() for linear in linears.values()) / form.largest
    for name, linear in linears.items():
        rows = linear.weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-12)  # a row may be all zero
        scale = rows / form.largest if form.scheme else shared
        rounded = form.rounded(linear.weight.detach() / scale)
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = rounded.to(form.dtype), scale.clone()
        linear.weight.data = rounded * scale
        linear.register_forward_pre_hook(lambda module, inputs: (_rounded(inputs[0], form), *inputs[1:]))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = _description(form, ignored)
    (path / "config.json").write_text(json.dumps(config))


def _description(form: Format, ignored: list[str]) -> dict[str, Any]:
    if form.scheme is None:
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ignored}
    layout, kind = form.scheme
    scheme = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = scheme | {"strategy": "channel", "dynamic": False}
    inputs = scheme | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
    }


def _rounded(x: torch.Tensor, form: Format) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / form.inputs
    return (form.rounded((x / scale).clamp(-form.inputs - 1, form.inputs)) * scale).to(x.dtype)
