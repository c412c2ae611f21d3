# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: `vllm serve DIR` supports Hybrids once this package is installed.

vLLM calls `register` in each of its processes (front end, engine core, workers), so it must be cheap and re-entrant.
"""

from __future__ import annotations


def register() -> None:
    """Register the Hybrid architectures with vLLM; other models are not affected.

    Raises HmfError, which stops vLLM, if this vLLM is outside the tested range.
    """
    from .support import check_version

    check_version()
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from hmf.model.families import FAMILIES  # importing hmf registers their configs with AutoConfig

    from .backends import state_backend
    from .config import HybridConfig
    from .configs import READ_BY_VLLM
    from .support import SERVED_BY

    for symbol in SERVED_BY:
        state_backend(symbol)  # in every process, because vLLM sends these enum members between its processes
    for family in FAMILIES.values():
        architecture = f"{family.hybrid_prefix}ForCausalLM"
        MODELS_CONFIG_MAP[architecture] = HybridConfig
        # By name, so that the front end does not import kernels.
        # `support.check` refuses families that are not served. They are registered with the base class to reach it.
        name = architecture if family.model_type in READ_BY_VLLM else "HybridForCausalLM"
        ModelRegistry.register_model(architecture, f"hmf.serving.vllm.models:{name}")
