# SPDX-License-Identifier: Apache-2.0
"""Two-way accounting of a checkpoint's tensors: none missing, none unknown, none of a wrong shape."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from hmf.errors import HmfError
from hmf.model.families import family_of
from hmf.model.modeling import hybrid_classes

# Computed from the configuration; old checkpoints carry it and every loader drops it.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
SHOWN = 5


def expected_tensors(config: Any) -> tuple[dict[str, torch.Size], set[str]]:
    """Names and shapes of a published checkpoint's tensors, from the Hugging Face model of this configuration.

    The second value names those that may be absent because they are tied to others.
    """
    # Not through AutoModel: a worker process gets a copy of the config's class, which the Auto classes do not know.
    with torch.device("meta"):
        model = hybrid_classes(family_of(config.model_type)).causal_lm(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    published = revert_weight_conversion(model, model.state_dict())  # experts stacked in memory, one by one in the file
    return {name: tensor.shape for name, tensor in published.items()}, tied


def account(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, torch.Size], optional: Collection[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass `weights` on; at their end raise HmfError, one line, if they are not exactly the `expected` tensors.

    Those of `optional` may be absent.
    """
    seen, unexpected, misshapen = set(), [], []
    for name, tensor in weights:
        if IGNORED.search(name):
            continue
        if name not in expected:
            unexpected.append(name)
        elif tensor.shape != expected[name]:
            seen.add(name)
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(expected[name])}")
        else:
            seen.add(name)
            yield name, tensor
    missing = [name for name in expected if name not in seen and name not in optional]
    problems = [
        f"{what}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise HmfError(f"the checkpoint's tensors do not fit its config.json; {'; '.join(problems)}")
