# SPDX-License-Identifier: Apache-2.0
"""Accounting of a checkpoint's tensors: HmfError for missing, unknown and misshapen tensors."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from hmf.errors import HmfError
from hmf.model.families import family_of
from hmf.model.files import COMPUTED, not_finite, same_values
from hmf.model.modeling import hybrid_classes

# Tensors beside or in place of the weight of a quantised linear layer.
QUANTISED = re.compile(
    r"(?P<module>.*)\.(?:weight_(?:scale|scale_inv|zero_point|packed|shape)|input_(?:scale|zero_point))$"
)
SHOWN = 5


def expected_tensors(config: Any) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Names and shapes of a published checkpoint's tensors, from the Hugging Face model of this configuration.

    The second value maps each tensor that may be absent because it is tied to another one to this other tensor.
    """
    config = copy.copy(config)
    config._attn_implementation = config._experts_implementation = None  # a config may name code on the Hub
    config.layer_types = config.mixed_types()  # vLLM's are others if all layers have windows
    # Not with AutoModel: a worker process has a copy of the config's class, which is not registered.
    with torch.device("meta"):
        model = hybrid_classes(family_of(config.model_type)).causal_lm(config)
    tied = dict(getattr(model, "_tied_weights_keys", None) or {}) if config.tie_word_embeddings else {}
    published = revert_weight_conversion(model, model.state_dict())  # experts stacked in memory, one by one in the file
    return {name: tensor.shape for name, tensor in published.items()}, tied


def quantised_tensors(
    expected: Mapping[str, torch.Size], parameters: Callable[[str], Collection[str] | None]
) -> dict[str, torch.Size | None]:
    """The `expected` tensors as a quantised checkpoint has them; None stands for the shapes that its format decides.

    `parameters` names those that a published module has in the serving model; None: the module is not on this rank.
    """
    shapes: dict[str, torch.Size | None] = {}
    for name, shape in expected.items():
        module, _, kind = name.rpartition(".")
        names = parameters(module) if kind == "weight" else None
        shapes |= {name: shape} if names is None else {f"{module}.{x}": shape if x == kind else None for x in names}
    return shapes


def require_exact_products(name: str, tensor: torch.Tensor) -> None:
    """HmfError for int8 weights whose products overflow on this processor, or have no kernel.

    Without VNNI, x86 adds pairs of products of a weight and a number from 0 to 255 in 16 bits, and the sum may saturate
    for weights beyond 64. With AMX, vLLM uses a kernel whose inputs are bfloat16 or float16. While vLLM loads weights,
    torch's default dtype is the model's.
    """
    if tensor.dtype == torch.int8 and torch.get_default_dtype() == torch.float32 and _narrow_inputs_only(tensor):
        raise HmfError(
            f"{name}: int8 products do not support float32 inputs on this processor, which has AMX; "
            "add --dtype bfloat16, or serve the unquantised checkpoint"
        )
    if tensor.dtype == torch.int8 and not _adds_in_32_bits() and (largest := int(tensor.int().abs().max())) > 64:
        raise HmfError(
            f"{name}: int8 weights up to {largest} overflow on this processor, which has no VNNI; quantise to values "
            "of at most 64, or serve the unquantised checkpoint"
        )


def _narrow_inputs_only(weight: torch.Tensor) -> bool:
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu() and weight.dim() == 2 and check_cpu_sgl_kernel(*weight.shape, weight.dtype))


@functools.cache
def _adds_in_32_bits() -> bool:
    from vllm.platforms import current_platform

    known = torch.cpu.get_capabilities()
    x86 = current_platform.is_cpu() and known["architecture"] == "x86_64"
    return not x86 or any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def account(
    weights: Iterable[tuple[str, torch.Tensor]],
    expected: Mapping[str, torch.Size | None],
    optional: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `weights`; at the end raise HmfError if they are not exactly the `expected` tensors.

    Those of `optional` may be absent, or equal to the tensors that they name. No number may be NaN or infinite.
    """
    seen, quantised = set(), {}  # an ordered set of modules
    unexpected, misshapen, broken, pairs = [], [], [], {}
    for name, tensor in weights:
        if COMPUTED.search(name):
            continue
        if name not in expected:
            if match := QUANTISED.match(name):
                quantised[match["module"]] = True
            else:
                unexpected.append(name)
        elif (shape := expected[name]) is not None and tensor.shape != shape:
            seen.add(name)
            misshapen.append(f"{name} {list(tensor.shape)} instead of {list(shape)}")
        else:
            seen.add(name)
            if count := not_finite(tensor):
                broken.append(f"{name} ({count} of {tensor.numel()} numbers)")
            if name in optional or name in optional.values():
                pairs[name] = tensor
            yield name, tensor
    both = [(name, of) for name, of in optional.items() if name in pairs and of in pairs]
    untied = [name for name, of in both if not same_values(pairs[name], pairs[of])]
    missing = [name for name in expected if name not in seen and name not in optional]
    problems = [
        f"{what}: {', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
            ("NaN or infinite", broken),
            ("not equal to the embeddings, so tie_word_embeddings must be false", untied),
            ("quantised but only served unquantised, so it belongs in the checkpoint's ignore list", list(quantised)),
        )
        if names
    ]
    if problems:
        raise HmfError(f"the checkpoint's tensors do not fit its config.json; {'; '.join(problems)}")
