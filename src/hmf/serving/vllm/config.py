# SPDX-License-Identifier: Apache-2.0
"""vLLM's configuration hook: refuses unsupported settings, and sets defaults from the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CompilationConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from . import support
from .configs import IMAGE_AXES

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handler prints it

OPERATOR = "hmf::recurrent_mix"


class HybridConfig(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Runs once at the start, in the front end, before weights are loaded. Raises HmfError."""
        support.check(vllm_config)
        _set_state_dtypes(vllm_config)
        config = vllm_config.model_config.hf_config
        if not any(support.keeps_states(symbol, config) for symbol in set(support.layer_symbols(config))):
            # With sliding windows only, the caches are keys and values, so the model is not a hybrid for vLLM.
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        for key in IMAGE_AXES:
            config.rope_parameters.pop(key, None)
        # A rank must read all experts to account for every tensor; the filter would skip those of other ranks.
        vllm_config.parallel_config.enable_ep_weight_filter = False
        # CUDA graphs are split at the operator, for Hybrids only: other models keep vLLM's list.
        compilation = vllm_config.compilation_config
        object.__setattr__(compilation, "_attention_ops", [*CompilationConfig._attention_ops, OPERATOR])


# Measured by `hmf bench states runs/quickstart/model`: 4 x 1,024 tokens of held-out text.
DRIFT = "in bfloat16, log-probabilities of the quickstart's Hybrid moved by 0.003 nats on average and by 0.04 at most"


def _set_state_dtypes(vllm_config: Any) -> None:
    """Store states in the checkpoint's `state_dtype` (default float32), unless the user gives another dtype."""
    cache = vllm_config.cache_config
    default = getattr(vllm_config.model_config.hf_config, "state_dtype", None) or "float32"
    narrow = []
    for option in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
        dtype = getattr(cache, option)
        if dtype == "auto":
            setattr(cache, option, default)
        elif getattr(torch, dtype).itemsize < getattr(torch, default).itemsize:
            narrow.append(f"--{option.replace('_', '-')} {dtype}")
    if narrow:
        logger.warning_once(
            "%s: recurrent states are stored less precisely than the checkpoint's state_dtype, %s, and outputs drift: "
            "%s. `hmf bench states MODEL` measures another model.",
            " and ".join(narrow),
            default,
            DRIFT,
        )
