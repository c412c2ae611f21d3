# SPDX-License-Identifier: Apache-2.0
"""Export of a fused checkpoint as a plain Hybrid, without its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hmf.config.pattern import is_fused
from hmf.errors import HmfError, listed, notice
from hmf.folders import require_unused, shown
from hmf.model.checkpoint import STORED, load_model, save_checkpoint
from hmf.model.convert import drop_teacher
from hmf.model.files import not_finite, require_finite


def export(
    fused: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    save: Callable[..., Any] = save_checkpoint,
) -> PreTrainedModel:
    """`hmf export`: remove the teacher's attention from the checkpoint `fused` and save the Hybrid at `out`.

    dtype: the dtype to cast the weights to (decay parameters stay float32); None keeps the stored dtypes.
    save: writes the result; `hmf.model.native.save_native` writes it as a stock Qwen3.5.

    The tokenizer's files are copied byte for byte. Returns the Hybrid. HmfError if `fused` has no teacher or `out` is
    in use.
    """
    require_unused(out)
    model = load_model(fused, dtype=STORED)
    if not is_fused(model.config):
        raise HmfError(
            f"{shown(Path(fused))}: has no teacher to remove; export takes the result of hmf init or hmf distill"
        )
    hybrid = drop_teacher(model)
    require_finite(Path(fused))
    if dtype is not None:
        before = {tensor: x.dtype for tensor, x in hybrid.named_parameters()}
        hybrid = hybrid.to(dtype)
        hybrid.config.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        if changed := [tensor for tensor, x in hybrid.named_parameters() if x.dtype != before[tensor]]:
            notice(f"{fused}: {len(changed)} of {len(before)} tensors are cast to {name}: {listed(changed, 2)}")
        for tensor in changed:
            if count := not_finite(hybrid.get_parameter(tensor)):
                raise HmfError(
                    f"--dtype {name}: tensor {tensor} has {count} values beyond its range; leave the dtype out, which "
                    "keeps that of each tensor"
                )
    save(hybrid, out, companions=fused)
    return hybrid
