# SPDX-License-Identifier: Apache-2.0
"""What the plugin serves and what it refuses: one table that start-up enforces and the documentation prints."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from hmf.config.layers import base_activation, base_head_dim, layer_options, needed_kinds
from hmf.config.pattern import ATTENTION, is_fused
from hmf.config.runs import ROPE_KEYS, ROPE_SCALING_KEYS
from hmf.errors import HmfError
from hmf.layers.base import heads_fit
from hmf.layers.own import RECURRENT
from hmf.layers.registry import mixer_class

TESTED_VLLM = SpecifierSet(">=0.32.0,<0.33")

# Layer symbols and the modules that serve them, each with two functions, `states` of a request and `build`
# a mixer, and, where there are states, the `BUILDER` of what the mixer asks of a batch.
SERVED_BY = {
    "GDN": "hmf.serving.vllm.gdn",
    "KDA": "hmf.serving.vllm.kda",
    "GKA": "hmf.serving.vllm.gka",
    "M2": "hmf.serving.vllm.mamba2",
    "BMF": "hmf.serving.vllm.bmojo",
    "SWA": "hmf.serving.vllm.window",
    RECURRENT: "hmf.serving.vllm.own",  # no symbol of a pattern: see `layer_symbols`
}

# Environment variable: a file to which a process of the server writes why it cannot continue. `hmf serve` prints it.
REASON_FILE = "HMF_SERVE_REASON_FILE"

Problem = Callable[[Any], str | None]
STILL_FUSED = "still has the teacher (Stage 0 or 1); run `hmf export` on it and serve the result"
ELSEWHERE = "generate with Hugging Face instead"


@dataclass(frozen=True)
class Row:
    """One row of the table. `problem` returns why a vLLM configuration is refused, or None."""

    feature: str
    supported: bool
    note: str = ""
    problem: Problem | None = None


def _when(condition: Callable[[Any], bool], line: str) -> Problem:
    return lambda config: line if condition(config) else None


def mixer_module(symbol: str) -> Any:
    """The module that serves a layer symbol. It imports vLLM's layers, so only processes that run the model call it."""
    return importlib.import_module(SERVED_BY[symbol])


def layer_symbols(config: Any) -> list[str]:
    """The symbol of each layer of a Hybrid; `RECURRENT` for a recurrent layer that the base has of its own."""
    layers = zip(config.pattern.symbols, config.attention_types, strict=True)
    return [kind if symbol == ATTENTION and kind == RECURRENT else symbol for symbol, kind in layers]


def _fused(config: Any) -> str | None:
    return f"this checkpoint {STILL_FUSED}" if is_fused(config.model_config.hf_config) else None


def _unknown_layers(config: Any) -> str | None:
    symbols = set(config.model_config.hf_config.pattern.symbols) - {ATTENTION, *SERVED_BY}
    if not symbols:
        return None
    return f"layers of type {', '.join(sorted(symbols))} have no row in SERVED_BY; {ELSEWHERE}"


def split_problem(config: Any, ranks: int) -> str | None:
    """The reason why a Hybrid does not split over `ranks` tensor-parallel ranks, or None."""
    if ranks == 1:
        return None
    if not heads_fit(config, ranks):
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        return f"{queries} query and {keys} key/value heads do not split over {ranks} ranks; use a divisor of both"
    for name in ("intermediate_size", "moe_intermediate_size"):
        if (size := getattr(config, name, 0)) % ranks:
            return f"{name} {size} does not split over {ranks} ranks; use a divisor of it"
    for kind in needed_kinds(config, config.pattern.symbols):
        if getattr(layer_options(config, kind.symbol), "kv_proj_rank", None):
            return f"{kind.config_key}.kv_proj_rank mixes all key/value heads; use --tensor-parallel-size 1"
    return None


def _split(config: Any) -> str | None:
    return split_problem(config.model_config.hf_config, config.parallel_config.tensor_parallel_size)


def keeps_states(symbol: str, config: Any) -> bool:
    """Whether a layer type has a recurrent state under a Hugging Face `config`; attention and windows have none."""
    if symbol in (ATTENTION, RECURRENT):
        return symbol == RECURRENT
    return any(state.kind == "recurrent" for state in mixer_class(symbol).state_shapes(config).values())


def _stages(config: Any) -> str | None:
    stages = config.parallel_config.pipeline_parallel_size
    if stages == 1 or not config.cache_config.enable_prefix_caching:
        return None
    from vllm.distributed.utils import get_pp_indices

    hf_config = config.model_config.hf_config
    recurrent = [keeps_states(symbol, hf_config) for symbol in layer_symbols(hf_config)]
    bounds = [get_pp_indices(len(recurrent), stage, stages) for stage in range(stages)]
    without = [stage for stage, (first, last) in enumerate(bounds) if not any(recurrent[first:last])]
    if not without or not any(recurrent):
        return None
    return (
        f"pipeline stage {without[0] + 1} of {stages} has no recurrent layer, and vLLM cannot cache prefixes there; "
        "use --no-enable-prefix-caching, fewer stages, or VLLM_PP_LAYER_PARTITION for another split"
    )


def _head_dim(config: Any) -> str | None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or ATTENTION not in config.model_config.hf_config.pattern.symbols:
        return None
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    sizes, head_dim = CPUAttentionBackend.get_supported_head_sizes(), config.model_config.get_head_size()
    if head_dim in sizes:
        return None
    supported = ", ".join(map(str, sizes))
    return f"vLLM's attention on a CPU has no kernel for head_dim {head_dim} (only {supported}); use a GPU"


def _on_cpu(condition: Callable[[Any], bool], line: str) -> Problem:
    def problem(config: Any) -> str | None:
        from vllm.platforms import current_platform

        return line if current_platform.is_cpu() and condition(config) else None

    return problem


QUANTISED = ("compressed-tensors", "fp8", "fp8_per_tensor", "fp8_per_channel")


def _quantised(config: Any) -> str | None:
    from vllm.platforms import current_platform

    method, hf_config = config.model_config.quantization, config.model_config.hf_config
    if method is None:
        return None
    if method not in QUANTISED:
        return f"--quantization {method} is not supported; use {', '.join(QUANTISED)}, or the unquantised checkpoint"
    if method in ("fp8", "fp8_per_tensor") and current_platform.is_cpu():
        return f"vLLM's CPU build cannot quantise to {method}; use fp8_per_channel, compressed-tensors, or a GPU"
    if hf_config.family.model_type == "phi3":
        return "quantised Phi-3 is not supported; serve the unquantised checkpoint without --quantization"
    if getattr(hf_config, "num_experts", 0):
        return "quantised experts are not supported; serve the unquantised checkpoint without --quantization"
    if getattr(hf_config, "quantization_config", None) and config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism does not support quantised checkpoints; drop --pipeline-parallel-size"
    return None


OWN_RECURRENCE = ("dual_chunk_attention_config", "layer_scale", "output_gate_type", "qkv_bias")
# The families with a class in models.py, and the keys that vLLM's stock layers for them read and transformers' do not.
# With such a key the two would compute different functions.
READ_BY_VLLM = {
    "llama": ("bias", "qkv_bias", "target_layer_count"),
    "ministral3": (
        "ada_rms_norm_t_cond",
        "attention_bias",
        "bias",
        "mlp_bias",
        "qkv_bias",
        "target_layer_count",
    ),
    "mistral": (
        "ada_rms_norm_t_cond",
        "attention_bias",
        "bias",
        "llama_4_scaling",
        "mlp_bias",
        "qkv_bias",
        "target_layer_count",
    ),
    "phi3": ("attention_bias", "bias", "mlp_bias", "qkv_bias", "target_layer_count"),
    "qwen2": ("dual_chunk_attention_config", "qk_norm"),
    "qwen3": ("dual_chunk_attention_config",),
    "qwen3_5_moe_text": OWN_RECURRENCE,
    "qwen3_5_text": OWN_RECURRENCE,
    "qwen3_moe": ("dual_chunk_attention_config", "shared_expert_intermediate_size"),
    "qwen3_next": OWN_RECURRENCE,
    "smollm3": ("bias", "qkv_bias", "target_layer_count"),
}
# And those that vLLM reads in every model.
READ_BY_VLLM_ALWAYS = ("mrope_section", "rotary_emb_base", "rotary_emb_fraction", "rotary_pct", "xdrope_section")


def _family(config: Any) -> str | None:
    family = config.model_config.hf_config.family
    if family.model_type in READ_BY_VLLM:
        return None
    return (
        f"vLLM's decoder for {family.model_type} does not take the layers of a Hybrid; use hmf chat, or generate with "
        "Hugging Face"
    )


def _unlike_transformers(config: Any) -> str | None:
    hf_config = config.model_config.hf_config
    names = (*READ_BY_VLLM[hf_config.family.model_type], *READ_BY_VLLM_ALWAYS)
    unsupported = [name for name in names if getattr(hf_config, name, None)]
    if "qkv_bias" in names and hasattr(hf_config, "qkv_bias"):  # also false, because it overrides `attention_bias`
        unsupported.append("qkv_bias")
    if not unsupported:
        return None
    return f"{unsupported[0]} in config.json: vLLM's layers read it and transformers' do not; remove it"


def _activation(config: Any) -> str | None:
    activation = base_activation(config.model_config.hf_config)
    return None if activation == "silu" else f"hidden_act {activation!r}: vLLM's MLPs support only silu; {ELSEWHERE}"


def _whole_width(config: Any) -> str | None:
    hf_config = config.model_config.hf_config
    width = base_head_dim(hf_config) * hf_config.num_attention_heads
    if hf_config.family.model_type != "qwen2" or width == hf_config.hidden_size:
        return None
    return (
        f"head_dim {hf_config.head_dim}: vLLM's Qwen2 assumes hidden_size / num_attention_heads, "
        f"{hf_config.hidden_size // hf_config.num_attention_heads}; {ELSEWHERE}"
    )


# Keys of `rope_parameters` that vLLM and transformers use in the same way.
ROPE = ROPE_SCALING_KEYS | {"rope_type", "type", "rope_theta", "llama_4_scaling_beta", "max_position_embeddings"}

IMAGE_AXES = {"mrope_section", "mrope_interleaved"}  # in text, positions on all axes of an image are the same

PARTIAL = ("phi3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")  # families in which transformers rotates a part of each head, if the config says so


def _positions(config: Any) -> str | None:
    model, rope = config.model_config, config.model_config.hf_config.rope_parameters
    kind, length = rope["rope_type"], model.hf_config.max_position_embeddings
    if kind not in ROPE_KEYS:
        return f"rope_type {kind!r}: vLLM computes other positions than transformers; {ELSEWHERE}"
    if rope.get("partial_rotary_factor", 1) != 1 and model.hf_config.family.model_type not in PARTIAL:
        return "partial_rotary_factor: transformers rotates whole heads in this family; remove it"
    of_images = IMAGE_AXES if model.hf_config.family.position_axes() > 1 else set()
    if unknown := sorted(rope.keys() - ROPE - {"partial_rotary_factor"} - of_images):
        return f"rope_parameters.{unknown[0]}: transformers does not read it, and vLLM may; remove it"
    # vLLM computes a table of `length` positions, and does not check for positions beyond its end.
    if kind == "yarn":
        length = rope["original_max_position_embeddings"] * rope["factor"]
    elif kind == "linear":
        length *= rope["factor"]
    if model.max_model_len <= length:
        return None
    return (
        f"vLLM's table of rotary positions ({kind}) ends at {int(length)}, before the {model.max_model_len} of the "
        f"longest sequence; use --max-model-len {int(length)}"
    )


TABLE: tuple[Row, ...] = (
    Row(f"Hybrids of {', '.join(f'`{name}`' for name in READ_BY_VLLM)}", True),
    Row("Hybrids of other families", False, "`hmf chat`, or generate with Hugging Face", _family),
    Row("GDN, KDA, GKA, Mamba2, B'MOJO-F and SWA layers, with all options, mixed in any pattern", True),
    Row("Continuous batching, chunked prefill, preemption, `n > 1`", True),
    Row("Prefix caching", True, "`--mamba-cache-mode align`, which is also vLLM's choice"),
    Row("Tool calls, reasoning parsers, streaming", True, "vLLM's own"),
    Row("Tensor parallelism", True, "all layer types, without `kv_proj_rank`"),
    Row("Pipeline, data and expert parallelism", True, "vLLM's own"),
    Row(
        "Quantised weights",
        True,
        "compressed-tensors and fp8 checkpoints, `--quantization fp8_per_tensor` or `fp8_per_channel`: attention, MLPs "
        "and q, k, v and o of GDN and KDA, with GDN's g; a checkpoint must list all other modules in `ignore`",
        _quantised,
    ),
    Row("Sliding windows of attention layers, all or some", True, "as the config of the base has them"),
    Row("Rotary positions: `default`, `linear`, `yarn`, `llama3`", True, "and Ministral 3's queries"),
    Row("Layer types of your own without a row in `SERVED_BY`", False, "generate with Hugging Face", _unknown_layers),
    Row("Stage-0 and Stage-1 checkpoints", False, "`hmf export` first", _fused),
    Row("Heads or MLPs that do not split over the ranks", False, "use a divisor of their sizes", _split),
    Row("Prefix caching where a pipeline stage has no recurrent layer", False, "`--no-enable-prefix-caching`", _stages),
    Row("Rotary positions of other types or beyond their table", False, "generate with Hugging Face", _positions),
    Row("Activations other than SiLU", False, "generate with Hugging Face", _activation),
    Row("Qwen2 with a `head_dim` that is not hidden size / heads", False, "generate with Hugging Face", _whole_width),
    Row(
        "Config keys that vLLM reads and transformers does not",
        False,
        ", ".join(f"`{key}`" for key in sorted({*READ_BY_VLLM_ALWAYS, *sum(READ_BY_VLLM.values(), ())})),
        _unlike_transformers,
    ),
    Row("Head dimensions without an attention kernel on a CPU", False, "use a GPU", _head_dim),
    Row(
        "Expert parallelism on a CPU",
        False,
        "use tensor parallelism alone",
        _on_cpu(
            lambda c: c.parallel_config.enable_expert_parallel,
            "vLLM does not support expert parallelism on a CPU; drop --enable-expert-parallel",
        ),
    ),
    Row(
        "Pipeline parallelism on a CPU",
        False,
        "use tensor parallelism",
        _on_cpu(
            lambda c: c.parallel_config.pipeline_parallel_size > 1,
            "vLLM does not support pipeline parallelism on a CPU; use --tensor-parallel-size instead",
        ),
    ),
    Row(
        "Speculative decoding",
        False,
        "drop `--speculative-config`: recurrent states cannot be rolled back",
        _when(
            lambda c: c.speculative_config is not None,
            "speculative decoding cannot roll a recurrent state back; drop --speculative-config",
        ),
    ),
    Row(
        "LoRA adapters",
        False,
        "merge the adapter into the checkpoint",
        _when(
            lambda c: c.lora_config is not None,
            "LoRA is not supported on Hybrids; merge the adapter into the checkpoint and drop --enable-lora",
        ),
    ),
    Row(
        "`--mamba-cache-mode all`",
        False,
        "use `align`",
        _when(
            lambda c: c.cache_config.mamba_cache_mode not in ("none", "align"),
            "--mamba-cache-mode: only `none` and `align` are supported; use --mamba-cache-mode align",
        ),
    ),
    Row(
        "KV transfer between engines",
        False,
        "drop `--kv-transfer-config`: states are not moved",
        _when(
            lambda c: c.kv_transfer_config is not None,
            "KV transfer does not move recurrent states; drop --kv-transfer-config",
        ),
    ),
    Row(
        "ReplaySSM",
        False,
        "drop `--use-replayssm`",
        _when(lambda c: c.cache_config.use_replayssm, "ReplaySSM does not support Hybrids; drop --use-replayssm"),
    ),
    Row(
        "Stochastic rounding of states",
        False,
        "drop `--enable-mamba-cache-stochastic-rounding`",
        _when(
            lambda c: c.mamba_config.enable_stochastic_rounding,
            "stochastic rounding of states is not supported; drop --enable-mamba-cache-stochastic-rounding",
        ),
    ),
    Row(
        "Context parallelism",
        False,
        "use tensor parallelism",
        _when(
            lambda c: (
                max(c.parallel_config.decode_context_parallel_size, c.parallel_config.prefill_context_parallel_size) > 1
            ),
            "context parallelism does not split recurrent states; use --tensor-parallel-size",
        ),
    ),
    Row(
        "Expert load balancing",
        False,
        "drop `--enable-eplb`",
        _when(lambda c: c.parallel_config.enable_eplb, "expert load balancing is not supported; drop --enable-eplb"),
    ),
)


@contextmanager
def reported() -> Iterator[None]:
    """Write an HmfError of the block to `REASON_FILE`, because vLLM prints other messages after it."""
    try:
        yield
    except HmfError as error:
        if file := os.environ.get(REASON_FILE):
            Path(file).write_text(str(error), encoding="utf-8")
        raise


@reported()
def check(vllm_config: Any) -> None:
    """Raise HmfError for the first row of the table that refuses this configuration."""
    for row in TABLE:
        if row.problem is not None and (problem := row.problem(vllm_config)):
            raise HmfError(f"{vllm_config.model_config.model}: {problem}")


@reported()
def check_version() -> None:
    """Raise HmfError if the installed vLLM is outside the tested range."""
    import vllm

    if not TESTED_VLLM.contains(vllm.__version__, prereleases=True):
        raise HmfError(
            f"the hmf plugin is tested with vLLM {TESTED_VLLM} and this is {vllm.__version__}; install a vLLM in that "
            "range, or set VLLM_PLUGINS to a list without hmf to serve other models"
        )


def markdown() -> str:
    """The table as documentation."""
    lines = ["| feature | served | note |", "|---|---|---|"]
    lines += [f"| {row.feature} | {'yes' if row.supported else 'refused'} | {row.note} |" for row in TABLE]
    return "\n".join(lines)
