# SPDX-License-Identifier: Apache-2.0
"""A plan of serving a model on GPUs, computed from its config: memory, sequences, blocks, decode throughput.

A decode step reads the weights and the caches of all sequences, and reads and writes their states. In addition, each
layer takes a constant time for its small kernels:

    seconds of a step = (weights + sum over n sequences of (keys and values + 2 * states + windows)) / bandwidth
                        + layers * layer_overhead

Tensor parallelism divides the bytes. The communication between GPUs is not included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hmf.config.pattern import ATTENTION, Pattern, is_fused
from hmf.errors import HmfError, unknown_name
from hmf.folders import reason
from hmf.gpus import COPY_SHARE, GIB, Device, parse_gpus
from hmf.layers.base import heads_fit
from hmf.layers.own import RECURRENT
from hmf.model.convert import hybrid_config
from hmf.model.text_only import require_language_model

from .memory import Blocks, LayerCache, Weights, layer_caches, require_unquantised, weights, working_bytes

# Seconds, fitted to vLLM 0.32 with Qwen3-8B and its GDN Hybrid on an H100 at 16K and 32K tokens, within 3%
# (docs/planning.md).
LAYER_OVERHEAD = 85e-6
UTILISATION = 0.9
# Values of vLLM's --kv-cache-dtype and --mamba-ssm-cache-dtype. None: the model's dtype, and the config's state_dtype.
KV_DTYPES = {
    "auto": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
STATE_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# vLLM's default for the largest captured batch size, and the sizes up to it.
LARGEST_CAPTURE = 512
CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST_CAPTURE + 1, 16))


@dataclass(frozen=True)
class ServingSettings:
    """utilisation: the share of GPU memory that vLLM may use; layer_overhead: the constant seconds of each layer in a
    decode step; batched_tokens and max_num_seqs (None: the device's default): vLLM's options that limit one step;
    kv_cache_dtype, mamba_ssm_cache_dtype: vLLM's options of these names, for keys and values and recurrent states."""

    utilisation: float = UTILISATION
    layer_overhead: float = LAYER_OVERHEAD
    prefix_caching: bool = True
    batched_tokens: int = 8192
    max_num_seqs: int | None = None
    kv_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, dtypes in (("kv_cache_dtype", KV_DTYPES), ("mamba_ssm_cache_dtype", STATE_DTYPES)):
            if (value := str(getattr(self, name))) not in dtypes:
                raise HmfError(f"--{name.replace('_', '-')}: {unknown_name('dtype', value, dtypes)}")
        if not 0 < self.utilisation <= 1:
            raise HmfError(f"--gpu-memory-utilization: {self.utilisation} is not in (0, 1]; give a share such as 0.9")


@dataclass(frozen=True)
class Plan:
    """The plan of one model on `ranks` GPUs. All bytes are those of one GPU, except for `weights`."""

    pattern: Pattern
    weights: Weights
    caches: tuple[LayerCache, ...]
    blocks: Blocks
    cache_bytes: int  # available for the caches of all sequences
    device: Device
    ranks: int
    settings: ServingSettings

    @property
    def num_blocks(self) -> int:
        return self.cache_bytes // self.blocks.bytes

    @property
    def max_num_seqs(self) -> int:
        return self.settings.max_num_seqs or self.device.max_num_seqs

    def capacity(self, context: int) -> int:
        """The size of the KV cache in tokens, as vLLM reports it for sequences of at most `context` tokens."""
        in_flight = self.device.steps * self.settings.batched_tokens
        needed = self.blocks.of_sequence(context, self.settings.prefix_caching, in_flight)
        return int(self.num_blocks / needed * context)

    def sequences(self, context: int) -> int:
        """The number of sequences of `context` tokens that can decode at once; vLLM reserves one block."""
        return max(0, self.num_blocks - 1) // self.blocks.of_sequence(context, self.settings.prefix_caching)

    def longest(self, limit: int) -> int:
        """The number of tokens of the longest sequence that fits, up to `limit`."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.sequences(middle) else (low, middle - 1)
        return low

    @property
    def smallest_prefix(self) -> int | None:
        """The number of tokens of the shortest prefix that the cache can reuse; None without prefix caching."""
        return self.blocks.tokens if self.settings.prefix_caching else None

    @property
    def most_requests(self) -> int:
        """The number of shortest requests that can run at once, limited by `max_num_seqs` and by the blocks."""
        return min(self.max_num_seqs, self.sequences(1))

    @property
    def capture_size(self) -> int:
        """The largest batch size for a CUDA graph. A captured batch needs a slot of state for each row."""
        limit = min(2 * self.most_requests, max(1, self.num_blocks - 1), self.settings.batched_tokens)
        return max((size for size in CAPTURE_SIZES if size <= limit), default=1)

    def sequence_bytes(self, context: int) -> tuple[int, int]:
        """(keys and values, states) of one sequence on one GPU."""
        states = sum(cache.state_bytes for cache in self.caches)
        return sum(cache.bytes(context) for cache in self.caches) - states, states

    def step_bytes(self, sequences: float, context: int) -> float:
        """Bytes that one GPU reads and writes in a decode step of `sequences` with `context` tokens each."""
        kv, _ = self.sequence_bytes(context)
        moved = sum(cache.moved_bytes for cache in self.caches)
        return self.weights.read(sequences) / self.ranks + sequences * (kv + moved)

    def decode_rate(self, sequences: float, context: int) -> float:
        """Decoded tokens per second of `sequences` with `context` tokens each."""
        moving = self.step_bytes(sequences, context) / (self.device.bandwidth * COPY_SHARE)
        return sequences / (moving + len(self.pattern) * self.settings.layer_overhead)


def make_plan(
    config: Any,
    device: Device,
    ranks: int = 1,
    dtype: torch.dtype | None = None,
    settings: ServingSettings | None = None,
    room: int | None = None,
) -> Plan:
    """A plan for a Hybrid or base `config`.

    Args:
        dtype: dtype of weights, keys and values; None is the config's own, or bfloat16 for float32.
        room: bytes for caches on each GPU; None is the remainder of vLLM's share after weights and working memory.
    Raises:
        HmfError: the room is too small for a cache, or the heads do not split over the GPUs.
    """
    settings = settings or ServingSettings()
    require_unquantised(config)
    config = as_hybrid(config)
    if is_fused(config):
        config = hybrid_config(config, config.pattern.with_fused(False))
    if not heads_fit(config, ranks):
        heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
        raise HmfError(f"--gpu: {heads} do not split over {ranks} GPUs; use a divisor of both")
    dtype = dtype or serving_dtype(config)
    size = weights(config, dtype)
    kv_dtype, state_dtype = KV_DTYPES[settings.kv_cache_dtype], STATE_DTYPES[settings.mamba_ssm_cache_dtype]
    caches = layer_caches(config, dtype, ranks, kv_dtype, state_dtype)
    blocks = Blocks.of(caches, device.block)
    if room is None:
        seqs = settings.max_num_seqs or device.max_num_seqs
        working = working_bytes(config, dtype, ranks, settings.batched_tokens, seqs)
        room = int(settings.utilisation * device.memory) - size.total // ranks - working
    if room < (least := 2 * blocks.bytes):
        spare = room + size.total // ranks
        enough = [
            n for n in (2 * ranks, 4 * ranks, 8 * ranks) if heads_fit(config, n) and spare - size.total // n >= least
        ]
        more = f"more GPUs, for example {device.name}x{enough[0]}, or larger ones" if enough else "larger GPUs"
        raise HmfError(
            f"--gpu: the weights, {size.total / ranks / GIB:.1f} GiB on each of {ranks} {device.name}, leave no room "
            f"for a cache; use {more}"
        )
    return Plan(config.pattern, size, tuple(caches), blocks, room, device, ranks, settings)


def serving_dtype(config: Any) -> torch.dtype:
    """The dtype in which vLLM serves a config on a GPU by default."""
    dtype = getattr(config, "dtype", None)
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def as_hybrid(config: Any) -> Any:
    """A base config as the equivalent Hybrid without replaced layers; a Hybrid's config unchanged."""
    if config.model_type.startswith("hybrid_"):
        return config
    require_language_model(config)
    return base_of(config)


def base_of(config: Any) -> Any:
    """The config of a Hybrid's base, as a Hybrid without replaced layers."""
    return hybrid_config(config, Pattern((ATTENTION,) * config.num_hidden_layers))


def plans(config: Any, gpus: str, settings: ServingSettings | None = None) -> list[Plan]:
    """Plans for the model and, if it has replaced layers, for its base, on `gpus`, such as "h200x8"."""
    device, ranks = parse_gpus(gpus)
    config = as_hybrid(config)
    kinds = [config, base_of(config)] if config.pattern.replaced else [config]
    return [make_plan(kind, device, ranks, settings=settings) for kind in kinds]


# ---- output


def title(plan: Plan) -> str:
    """What the model is, with its numbers of attention layers and of others."""
    replaced, own = len(plan.pattern.replaced), sum(cache.kind == RECURRENT for cache in plan.caches)
    if not replaced and not own:
        return "Transformer"
    layers = f"{len(plan.pattern) - replaced - own} + {replaced + own}"
    return f"Hybrid, {layers}" if replaced else f"Hybrid base, {layers}"


def figures(plan: Plan, context: int) -> dict[str, Any]:
    """The output of `hmf plan --json` for one plan. Bytes are summed over all GPUs; rates are in tokens/s."""
    kv, states = plan.sequence_bytes(context)
    fit = plan.sequences(context)
    return {
        "model": title(plan),
        "pattern": str(plan.pattern),
        "gpus": devices(plan),
        "context": context,
        "weight_bytes": plan.weights.total,
        "cache_bytes": plan.cache_bytes * plan.ranks,
        "kv_bytes_per_sequence": kv * plan.ranks,
        "state_bytes_per_sequence": states * plan.ranks,
        "block_tokens": plan.blocks.tokens,
        "smallest_prefix_tokens": plan.smallest_prefix,  # None: prefixes are not cached
        "cache_tokens": plan.capacity(context),
        "sequences": fit,
        "longest_tokens": plan.longest(context),  # of one sequence, up to `context`
        "cuda_graph_sequences": plan.capture_size,
        "decode_rate": plan.decode_rate(fit, context) if fit else None,  # of all that fit
        "decode_rate_one": plan.decode_rate(1, context) if fit else None,  # of one sequence
    }


def rows(plan: Plan, context: int) -> dict[str, str]:
    """The column that `hmf plan` prints for one plan, by row name; bytes are summed over all GPUs."""
    numbers = figures(plan, context)
    fit, prefix = numbers["sequences"], numbers["smallest_prefix_tokens"]

    def rate(value: float | None) -> str:
        return "none fits" if value is None else f"{value:,.0f} tokens/s"

    return {
        "weights": size_of(numbers["weight_bytes"]),
        "room for caches": size_of(numbers["cache_bytes"]),
        "keys and values of a sequence": size_of(numbers["kv_bytes_per_sequence"]),
        "states of a sequence": size_of(numbers["state_bytes_per_sequence"]),
        "cache block": f"{numbers['block_tokens']:,} tokens",
        "smallest cacheable prefix": f"{prefix:,} tokens" if prefix else "not cached",
        "cache capacity": f"{numbers['cache_tokens']:,} tokens",
        "sequences that fit": f"{fit:,}" if fit else f"0, longest: {numbers['longest_tokens']:,} tokens",
        "largest safe CUDA graph": f"{numbers['cuda_graph_sequences']} sequences",
        "decode, all that fit": rate(numbers["decode_rate"]),
        "decode, one sequence": rate(numbers["decode_rate_one"]),
    }


def size_of(size: float) -> str:
    for unit, width in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= width:
            return f"{size / width:,.2f} {unit}"
    return f"{size:,.0f} bytes" if size else "none"


def print_plans(plans: Sequence[Plan], context: int) -> None:
    from rich.console import Console
    from rich.table import Table

    first = plans[0]
    table = Table(
        title=f"{devices(first)}, sequences of {context:,} tokens",
        title_justify="left",
        caption=f"vLLM uses {first.settings.utilisation:g} of the memory. A decode step moves "
        f"its bytes at {COPY_SHARE:.2f} of {first.device.bandwidth * first.ranks / 1e12:g} TB/s, and each layer takes "
        f"{first.settings.layer_overhead * 1e6:g} µs in addition.",
        caption_justify="left",
    )
    table.add_column("")
    for plan in plans:
        table.add_column(title(plan), justify="right")
    columns = [rows(plan, context) for plan in plans]
    for name in columns[0]:
        table.add_row(name, *(row[name] for row in columns))
    Console(width=max(80, Console().width), markup=False, emoji=False).print(table)


def plot(plans: Sequence[Plan], context: int, path: Path, model: str) -> None:
    """Plot the sequences that fit and the decode throughput, at context lengths from 1K to `context`, to `path`.

    model: its name, for the title. The points of a Hybrid are annotated with the ratio to its base.
    """
    from matplotlib.figure import Figure

    lengths = [length for length in (2**power for power in range(10, 25)) if length < context] + [context]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    drawn = []
    for plan, colour in zip(plans, ("tab:blue", "tab:gray"), strict=False):
        # 0 means that no sequence fits; it cannot be drawn on a logarithmic axis.
        fit = [min(plan.sequences(length), plan.max_num_seqs) or math.nan for length in lengths]
        rates = [plan.decode_rate(n, length) for n, length in zip(fit, lengths, strict=True)]
        for panel, values in zip(panels, (fit, rates), strict=True):
            panel.plot(lengths, values, marker="o", markersize=4, color=colour, label=title(plan))
        drawn.append((fit, rates))
    for panel, *sides in zip(panels, *drawn, strict=True):
        for length, hybrid, base in zip(lengths, *sides, strict=True) if len(sides) == 2 else ():
            if not math.isnan(hybrid / base):
                panel.annotate(
                    f"{hybrid / base:.2f}×",
                    (length, hybrid),
                    (2, 4),
                    textcoords="offset points",
                    color="tab:blue",
                    fontsize=7,
                )
    for panel, name in zip(panels, ("sequences at once", "decoded tokens/s"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="tokens of context", title=name)
        panel.set_xticks(lengths, [short(length) for length in lengths])
        panel.minorticks_off()
        panel.margins(x=0.11, y=0.1)
        panel.grid(alpha=0.3)
    panels[1].legend(frameon=False)
    ratios = "; ratios: Hybrid to its base" if len(plans) > 1 else ""
    limit = f"at most {plans[0].max_num_seqs} sequences"
    figure.suptitle(f"{model} on {devices(plans[0])}, {limit}, planned{ratios}", fontsize=10)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        why = f"cannot be written: {reason(error)}" if isinstance(error, OSError) else error
        raise HmfError(f"--plot: {path}: {why}; give a .png or .svg file in an existing directory") from None


def short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def devices(plan: Plan) -> str:
    return f"{plan.ranks} x {plan.device.name}" if plan.ranks > 1 else plan.device.name
