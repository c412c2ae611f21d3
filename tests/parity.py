# SPDX-License-Identifier: Apache-2.0
"""Where the cases of the published software are: small ones in `tests/data`, which every run tests, and full ones.

The full ones are in $HMF_PARITY, or in shared/parity beside the repository. They only add cases.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hmf.config.pattern import Pattern

ROOT = Path(__file__).resolve().parent.parent
SMALL = ROOT / "tests" / "data"
FULL = Path(os.environ.get("HMF_PARITY") or ROOT.parent / "shared" / "parity")


def full_case(name: str) -> Any:
    """The folder of a full case as a parameter of a test, which is skipped with the reason where there is none."""
    path = FULL / name
    reason = f"no full case of the published software at {path}: set HMF_PARITY to the folder of the cases"
    return pytest.param(path, id=f"full-{name}", marks=() if path.is_dir() else pytest.mark.skip(reason=reason))


def small_case(name: str) -> Any:
    """The folder of a case in this repository as a parameter of a test, which fails where it is missing."""
    return pytest.param(SMALL / name, id=name)


@dataclass(frozen=True)
class Stage0And1:
    """A base, the fused model that the published software makes of it, and the losses and gradients of that."""

    base: Path
    pattern: Pattern
    origin: dict[str, list[str]]  # kind of start -> tensors
    fused: dict[str, torch.Tensor]
    stage1: dict[str, torch.Tensor]  # "input_ids", "loss.eval.*"
    gradients: dict[str, torch.Tensor]  # of mixers' parameters; the small case has those of the small ones
    by_kernels: dict[str, torch.Tensor]  # the same, as the published kernels compute them


def stage_0_and_1(folder: Path) -> Stage0And1:
    """The case fused_gdn, small or full."""
    base, origin = folder / "base", json.loads((folder / "tensor_origin.json").read_text())
    stage1 = load_file(folder / "stage1.safetensors")
    if (folder / "mixers.safetensors").is_file():
        weights = load_file(base / "model.safetensors")
        fused = weights | load_file(folder / "mixers.safetensors")
        fused |= {name: weights[source] for name, source in origin["same_as"].items()}
        kinds = [{k: x for k, x in stage1.items() if k.startswith(f"{kind}.")} for kind in ("grad", "kernels")]
    else:
        fused = load_file(folder / "fused" / "model.safetensors")
        kinds = [load_file(folder / f"stage1_grads_none_prelmhead{end}.safetensors") for end in ("", "_kernels")]
    gradients, by_kernels = ({name.partition(".")[2]: x for name, x in kind.items()} for kind in kinds)
    replaced = {int(name.split(".")[2]) for name in fused if ".gdn." in name}
    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    pattern = Pattern.parse("-".join("GDN" if layer in replaced else "*" for layer in range(layers)))
    return Stage0And1(base, pattern, origin, fused, stage1, gradients, by_kernels)
