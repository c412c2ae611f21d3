# SPDX-License-Identifier: Apache-2.0
"""The config and the settings of vLLM that decide whether the plugin can serve a Hybrid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFILL = "gdn_prefill_backend"  # key of vLLM's --additional-config
PREFILLS = ("flashinfer", "triton", "hmf")  # its values for GDN layers of a Hybrid
# Settings that turn speculative decoding on; vLLM adds the others to the first.
SPECULATION = ("speculative_config", "spec_method", "spec_model", "spec_tokens")


@dataclass(frozen=True)
class Start:
    """A start of the server.

    config: the Hugging Face config; longest: tokens of the longest sequence; quantization: vLLM's method, for a
    quantised checkpoint that of its config; divided_tokens: whether vLLM divides tokens over ranks for the experts;
    one_cache: whether all layers share one kind of cache blocks; prefill: the value of `PREFILL`, or None.
    """

    config: Any
    longest: int
    on_cpu: bool
    quantization: str | None = None
    quantised_checkpoint: bool = False
    ranks: int = 1
    stages: int = 1
    context_ranks: int = 1
    prefix_caching: bool = False
    expert_parallel: bool = False
    divided_tokens: bool = False
    balanced_experts: bool = False
    speculation: bool = False
    lora: bool = False
    kv_transfer: bool = False
    one_cache: bool = False
    cache_mode: str = "auto"
    replay: bool = False
    stochastic_rounding: bool = False
    prefill: Any = None

    @classmethod
    def of(cls, vllm_config: Any) -> Start:
        """The start that vLLM's checked configuration describes."""
        from vllm.platforms import current_platform

        model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
        return cls(
            config=model.hf_config,
            longest=model.max_model_len,
            on_cpu=current_platform.is_cpu(),
            quantization=model.quantization,
            quantised_checkpoint=bool(getattr(model.hf_config, "quantization_config", None)),
            ranks=parallel.tensor_parallel_size,
            stages=parallel.pipeline_parallel_size,
            context_ranks=max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size),
            prefix_caching=bool(cache.enable_prefix_caching),
            expert_parallel=parallel.enable_expert_parallel,
            divided_tokens=parallel.use_sequence_parallel_moe,
            balanced_experts=parallel.enable_eplb,
            speculation=vllm_config.speculative_config is not None,
            lora=vllm_config.lora_config is not None,
            # vLLM makes a KV connector of the second one later in its start.
            kv_transfer=vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            one_cache=bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
            cache_mode=cache.mamba_cache_mode,
            replay=cache.use_replayssm,
            stochastic_rounding=vllm_config.mamba_config.enable_stochastic_rounding,
            prefill=_prefill(vllm_config.additional_config),
        )

    @classmethod
    def given(cls, config: Any, on_cpu: bool, quantization: Any, options: Mapping[str, Any]) -> Start:
        """The start that options of `vllm serve` describe, by the names of vLLM's settings, before vLLM reads them.

        quantization: the `quantization_config` of the checkpoint, or None.
        """
        ranks, experts = options.get("tensor_parallel_size", 1), bool(options.get("enable_expert_parallel"))
        longest = options.get("max_model_len") or 0
        contexts = (options.get(f"{kind}_context_parallel_size", 1) for kind in ("decode", "prefill"))
        stored = quantization.get("quant_method") if quantization else None
        return cls(
            config=config,
            longest=longest if longest > 0 else _default_length(config),
            on_cpu=on_cpu,
            quantization=options.get("quantization") or stored,
            quantised_checkpoint=bool(quantization),
            ranks=ranks,
            stages=options.get("pipeline_parallel_size", 1),
            context_ranks=max(contexts),
            prefix_caching=options.get("enable_prefix_caching") is not False,
            expert_parallel=experts,
            divided_tokens=experts and ranks > 1 and options.get("data_parallel_size", 1) > 1,
            balanced_experts=bool(options.get("enable_eplb")),
            speculation=any(options.get(key) for key in SPECULATION),
            lora=bool(options.get("enable_lora")),
            kv_transfer=bool(options.get("kv_transfer_config")) or options.get("kv_offloading_size") is not None,
            one_cache=bool(options.get("disable_hybrid_kv_cache_manager")),
            cache_mode=options.get("mamba_cache_mode", "auto"),
            replay=bool(options.get("use_replayssm")),
            stochastic_rounding=bool(options.get("enable_mamba_cache_stochastic_rounding")),
            prefill=_prefill(options.get("additional_config")),
        )


def _default_length(config: Any) -> int:
    """vLLM's default of --max-model-len."""
    rope, length = config.rope_parameters, config.max_position_embeddings
    if rope.get("rope_type") == "dynamic":
        return int(length * rope["factor"])
    if rope.get("rope_type") == "longrope":
        return getattr(config, "original_max_position_embeddings", length)
    return length


def _prefill(additional_config: Any) -> Any:
    return additional_config.get(PREFILL) if isinstance(additional_config, Mapping) else None
