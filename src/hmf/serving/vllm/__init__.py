# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin: `vllm serve DIR` knows Hybrids once this package is installed.

vLLM calls `register` in each of its processes (front end, engine core, workers), so it must be cheap and re-entrant.
"""

from __future__ import annotations


def register() -> None:
    """Make the Hybrid architectures known to vLLM; other models are not touched.

    Raises HmfError, which stops vLLM, when this vLLM is outside the tested range.
    """
    from .support import check_version

    check_version()
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from hmf.model.families import FAMILIES  # importing hmf has made their configurations known to AutoConfig

    from .backends import state_backend
    from .config import HybridConfig
    from .support import SERVED_BY

    for symbol in SERVED_BY:
        state_backend(symbol)  # in every process: vLLM sends members of that table from one to another
    for family in FAMILIES.values():
        architecture = f"{family.hybrid_prefix}ForCausalLM"
        MODELS_CONFIG_MAP[architecture] = HybridConfig
        # By name, so that the front end never imports kernels.
        ModelRegistry.register_model(architecture, f"hmf.serving.vllm.models:{architecture}")
