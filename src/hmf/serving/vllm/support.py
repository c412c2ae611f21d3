# SPDX-License-Identifier: Apache-2.0
"""What the plugin serves and what it refuses: one table that start-up enforces and the documentation prints."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from hmf.config.layers import base_head_dim, experts_per_token, has_key, layer_options, needed_kinds
from hmf.config.pattern import ATTENTION, is_fused
from hmf.errors import HmfError, notice, unknown_name
from hmf.layers.base import heads_fit
from hmf.layers.own import RECURRENT
from hmf.layers.registry import mixer_class

from ..process import REASON_FILE
from . import configs
from .configs import ELSEWHERE, READ_BY_VLLM, READ_BY_VLLM_ALWAYS
from .start import PREFILL, PREFILLS, Start

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

Problem = Callable[[Start], str | None]
STILL_FUSED = "still has the teacher (Stage 0 or 1); run `hmf export` on it and serve the result"


@dataclass(frozen=True)
class Row:
    """One row of the table. `problem` returns why a start of the server is refused, or None."""

    feature: str
    supported: bool
    note: str = ""
    problem: Problem | None = None


def _when(condition: Callable[[Start], bool], line: str) -> Problem:
    return lambda start: line if condition(start) else None


def mixer_module(symbol: str) -> Any:
    """The module that serves a layer symbol. It imports vLLM's layers, so only processes that run the model call it."""
    return importlib.import_module(SERVED_BY[symbol])


def layer_symbols(config: Any) -> list[str]:
    """The symbol of each layer of a Hybrid; `RECURRENT` for a recurrent layer that the base has of its own."""
    layers = zip(config.pattern.symbols, config.attention_types, strict=True)
    return [kind if symbol == ATTENTION and kind == RECURRENT else symbol for symbol, kind in layers]


def _fused(start: Start) -> str | None:
    return f"this checkpoint {STILL_FUSED}" if is_fused(start.config) else None


def _unknown_layers(start: Start) -> str | None:
    symbols = set(start.config.pattern.symbols) - {ATTENTION, *SERVED_BY}
    if not symbols:
        return None
    return f"layers of type {', '.join(sorted(symbols))} have no row in SERVED_BY; {ELSEWHERE}"


# Keys of a config whose values the ranks divide; the last two are of recurrent layers that a base has of its own.
SPLIT_SIZES = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("linear_num_key_heads", "linear_num_value_heads"),
)


def split_problem(config: Any, ranks: int) -> str | None:
    """The reason why a Hybrid does not split over `ranks` tensor-parallel ranks, or None."""
    if ranks == 1:
        return None
    if not heads_fit(config, ranks):
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        return f"{queries} query and {keys} key/value heads do not split over {ranks} ranks; use a divisor of both"
    for name in SPLIT_SIZES:
        if has_key(config, name) and (size := getattr(config, name)) % ranks:
            return f"{name} {size} does not split over {ranks} ranks; use a divisor of it"
    for kind in needed_kinds(config, config.pattern.symbols):
        if getattr(layer_options(config, kind.symbol), "kv_proj_rank", None):
            return f"{kind.config_key}.kv_proj_rank mixes all key/value heads; use --tensor-parallel-size 1"
    return None


def keeps_states(symbol: str, config: Any) -> bool:
    """Whether a layer type has a recurrent state under a Hugging Face `config`; attention and windows have none."""
    if symbol in (ATTENTION, RECURRENT):
        return symbol == RECURRENT
    return any(state.kind == "recurrent" for state in mixer_class(symbol).state_shapes(config).values())


def _stages(start: Start) -> str | None:
    stages = start.stages
    if stages == 1 or not start.prefix_caching:
        return None
    from vllm.distributed.utils import get_pp_indices

    recurrent = [keeps_states(symbol, start.config) for symbol in layer_symbols(start.config)]
    bounds = [get_pp_indices(len(recurrent), stage, stages) for stage in range(stages)]
    without = [stage for stage, (first, last) in enumerate(bounds) if not any(recurrent[first:last])]
    if not without or not any(recurrent):
        return None
    return (
        f"pipeline stage {without[0] + 1} of {stages} has no recurrent layer, and vLLM cannot cache prefixes there; "
        "use --no-enable-prefix-caching, fewer stages, or VLLM_PP_LAYER_PARTITION for another split"
    )


def _one_cache(start: Start) -> str | None:
    if not start.one_cache or not any(keeps_states(symbol, start.config) for symbol in layer_symbols(start.config)):
        return None
    return "states and keys need cache blocks of their own; drop --disable-hybrid-kv-cache-manager"


def _split(start: Start) -> str | None:
    return split_problem(start.config, start.ranks)


def _head_dim(start: Start) -> str | None:
    if not start.on_cpu or all(keeps_states(symbol, start.config) for symbol in layer_symbols(start.config)):
        return None
    if importlib.util.find_spec("vllm") is None:  # `hmf serve --dry-run`
        return None
    logging.disable(logging.WARNING)  # importing vLLM logs what it lacks
    try:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    finally:
        logging.disable(logging.NOTSET)
    sizes, head_dim = CPUAttentionBackend.get_supported_head_sizes(), base_head_dim(start.config)
    if head_dim in sizes:
        return None
    supported = ", ".join(map(str, sizes))
    return f"vLLM's attention on a CPU has no kernel for head_dim {head_dim} (only {supported}); use a GPU"


QUANTISED = ("compressed-tensors", "fp8", "fp8_per_tensor", "fp8_per_channel")


def _quantised(start: Start) -> str | None:
    method, family = start.quantization, start.config.family
    if method is None:
        return None
    if method not in QUANTISED:
        return f"--quantization {method} is not supported; use {', '.join(QUANTISED)}, or the unquantised checkpoint"
    if method in ("fp8", "fp8_per_tensor") and start.on_cpu:
        return f"vLLM's CPU build cannot quantise to {method}; use fp8_per_channel, compressed-tensors, or a GPU"
    if family.model_type == "phi3" or family.own_recurrence:
        name = "Phi-3" if family.model_type == "phi3" else family.prefix
        return f"quantised {name} is not supported; serve the unquantised checkpoint without --quantization"
    if experts_per_token(start.config):
        return "quantised experts are not supported; serve the unquantised checkpoint without --quantization"
    if start.quantised_checkpoint and start.stages > 1:
        return "pipeline parallelism does not support quantised checkpoints; drop --pipeline-parallel-size"
    return None


KNOWN_PREFILLS = ("auto", *PREFILLS, "cutedsl", "aiter_flydsl")  # the last two: of recurrent layers of the base


def _prefill(start: Start) -> str | None:
    if start.prefill is None or start.prefill in KNOWN_PREFILLS:
        return None
    return f"--additional-config: {PREFILL}: {unknown_name('backend', str(start.prefill), KNOWN_PREFILLS)}"


TABLE: tuple[Row, ...] = (
    Row(f"Hybrids of {', '.join(f'`{name}`' for name in READ_BY_VLLM)}", True),
    Row("Hybrids of other families", False, "`hmf chat`, or generate with Hugging Face", configs.family),
    Row(
        "`--hf-overrides` with incomplete tables or contradictions",
        False,
        "give all keys, as of `rope_parameters`",
        configs.unsettled,
    ),
    Row("GDN, KDA, GKA, Mamba2, B'MOJO-F and SWA layers, with all options, mixed in any pattern", True),
    Row(
        "Recurrent layers of the base (Qwen3.5, Qwen3-Next)",
        True,
        "by vLLM's module on a GPU in bfloat16 and float16, otherwise by the one of `hmf`",
    ),
    Row("Continuous batching, chunked prefill, preemption, `n > 1`", True),
    Row("Prefix caching", True, "`--mamba-cache-mode align`, which is also vLLM's choice"),
    Row("Tool calls, reasoning parsers, streaming", True, "vLLM's own"),
    Row("Tensor parallelism", True, "all layer types, without `kv_proj_rank`"),
    Row("Pipeline, data and expert parallelism", True, "vLLM's own"),
    Row(
        "Quantised weights",
        True,
        "compressed-tensors and fp8 checkpoints, `--quantization fp8_per_tensor` or `fp8_per_channel`: attention, MLPs "
        "and q, k, v and o of GDN and KDA, with GDN's g; a checkpoint must list all other modules in `ignore`; without "
        "Phi-3, experts, and bases with recurrent layers",
        _quantised,
    ),
    Row("Sliding windows of attention layers, all or some", True, "as the config of the base has them"),
    Row("Rotary positions: `default`, `linear`, `yarn`, `llama3`", True, "and Ministral 3's queries"),
    Row("Layer types of your own without a row in `SERVED_BY`", False, "generate with Hugging Face", _unknown_layers),
    Row("Stage-0 and Stage-1 checkpoints", False, "`hmf export` first", _fused),
    Row("Heads or MLPs that do not split over the ranks", False, "use a divisor of their sizes", _split),
    Row("Prefix caching where a pipeline stage has no recurrent layer", False, "`--no-enable-prefix-caching`", _stages),
    Row(
        "Rotary positions of other types or beyond their table",
        False,
        "generate with Hugging Face",
        configs.positions,
    ),
    Row("Activations other than SiLU", False, "generate with Hugging Face", configs.activation),
    Row(
        "Qwen2 with a `head_dim` that is not hidden size / heads",
        False,
        "generate with Hugging Face",
        configs.whole_width,
    ),
    Row(
        "Short convolutions of width 1, and on a GPU of a width above 4",
        False,
        "generate with Hugging Face",
        configs.convolutions,
    ),
    Row(
        "Config keys that vLLM reads and transformers does not",
        False,
        ", ".join(f"`{key}`" for key in sorted({*READ_BY_VLLM_ALWAYS, *sum(READ_BY_VLLM.values(), ())})),
        configs.unlike_transformers,
    ),
    Row("Unknown prefill kernels of GDN", False, f"correct `{PREFILL}` in `--additional-config`", _prefill),
    Row("Head dimensions without an attention kernel on a CPU", False, "use a GPU", _head_dim),
    Row(
        "Expert parallelism on a CPU",
        False,
        "use tensor parallelism alone",
        _when(
            lambda s: s.on_cpu and s.expert_parallel,
            "vLLM does not support expert parallelism on a CPU; drop --enable-expert-parallel",
        ),
    ),
    Row(
        "Pipeline parallelism on a CPU",
        False,
        "use tensor parallelism",
        _when(
            lambda s: s.on_cpu and s.stages > 1,
            "vLLM does not support pipeline parallelism on a CPU; use --tensor-parallel-size instead",
        ),
    ),
    Row(
        "Speculative decoding",
        False,
        "drop `--speculative-config` and `--spec-method`: recurrent states cannot be rolled back",
        _when(
            lambda s: s.speculation,
            "speculative decoding cannot roll a recurrent state back; drop --speculative-config and --spec-method",
        ),
    ),
    Row(
        "LoRA adapters",
        False,
        "merge the adapter into the checkpoint",
        _when(
            lambda s: s.lora,
            "LoRA is not supported on Hybrids; merge the adapter into the checkpoint and drop --enable-lora",
        ),
    ),
    Row(
        "`--mamba-cache-mode all`",
        False,
        "use `align`",
        _when(
            lambda s: s.cache_mode not in ("auto", "none", "align"),
            "--mamba-cache-mode: only `none` and `align` are supported; use --mamba-cache-mode align",
        ),
    ),
    Row(
        "KV transfer between engines, and to the CPU",
        False,
        "drop `--kv-transfer-config` and `--kv-offloading-size`: states are not moved",
        _when(
            lambda s: s.kv_transfer,
            "KV transfer does not move recurrent states; drop --kv-transfer-config and --kv-offloading-size",
        ),
    ),
    Row(
        "One kind of cache blocks for attention and recurrent layers",
        False,
        "drop `--disable-hybrid-kv-cache-manager`",
        _one_cache,
    ),
    Row(
        "ReplaySSM",
        False,
        "drop `--use-replayssm`",
        _when(lambda s: s.replay, "ReplaySSM does not support Hybrids; drop --use-replayssm"),
    ),
    Row(
        "Stochastic rounding of states",
        False,
        "drop `--enable-mamba-cache-stochastic-rounding`",
        _when(
            lambda s: s.stochastic_rounding,
            "stochastic rounding of states is not supported; drop --enable-mamba-cache-stochastic-rounding",
        ),
    ),
    Row(
        "Context parallelism",
        False,
        "use tensor parallelism",
        _when(
            lambda s: s.context_ranks > 1,
            "context parallelism does not split recurrent states; use --tensor-parallel-size",
        ),
    ),
    Row(
        "Experts of Qwen3.5-MoE and Qwen3-Next under tensor, data and expert parallelism at once",
        False,
        "drop one of them",
        _when(
            lambda s: bool(s.config.family.own_recurrence) and s.divided_tokens,
            "vLLM then divides tokens over the ranks in this family's layers, which new layers do not support; drop "
            "--enable-expert-parallel",
        ),
    ),
    Row(
        "Expert load balancing",
        False,
        "drop `--enable-eplb`",
        _when(lambda s: s.balanced_experts, "expert load balancing is not supported; drop --enable-eplb"),
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
    """Raise HmfError for the first row of the table that refuses this configuration of vLLM."""
    require_served(vllm_config.model_config.model, Start.of(vllm_config))


def require_served(source: str | Path, start: Start) -> None:
    """Raise HmfError for the first row of the table that refuses a start of the server with the Hybrid `source`."""
    for row in TABLE:
        if row.problem is not None and (problem := row.problem(start)):
            raise HmfError(f"{source}: {problem}")


def require_stock(source: str | Path, start: Start) -> None:
    """Raise HmfError for a base that vLLM's own class would serve with wrong positions; print where it differs."""
    if problem := configs.unsettled(start) or configs.beyond_table(start):
        raise HmfError(f"{source}: {problem}")
    for difference in configs.of_stock_classes(start):
        notice(f"{source}: {difference}; hmf chat and transformers compute what the config says")
    if start.config.family.package in ("qwen3_5", "qwen3_5_moe") and importlib.util.find_spec("torchvision") is None:
        notice(f"{source}: vLLM's class of this base needs torchvision, which is not installed here; install it first")


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
