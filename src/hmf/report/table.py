# SPDX-License-Identifier: Apache-2.0
"""Tables of the scores of several models."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hmf.errors import counted


def print_scores(scores: dict[str, dict[str, Any]]) -> None:
    """Print one row per model: perplexity, task accuracies (with the share of truncated answers, if any), footprint."""
    first = next(iter(scores.values()))
    table = Table(caption=_caption(first), caption_justify="left")
    table.add_column("model", no_wrap=True)
    if "text" in first:
        table.add_column("perplexity", justify="right", no_wrap=True)
    for task in first["tasks"]:
        table.add_column(task, justify="right", no_wrap=True)
    for name in ("parameters", "KV bytes/token", "state bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, score in scores.items():
        row = [name]
        if "text" in score:
            row.append(f"{score['text']['perplexity']:.2f}")
        row += [_accuracy(task) for task in score["tasks"].values()]
        sizes = [score["footprint"].get(key) for key in ("parameters", "kv_bytes_per_token", "state_bytes")]
        row += ["-" if size is None else f"{size:,}" for size in sizes]
        table.add_row(*row)
    console = Console(width=max(110, Console().width), markup=False, emoji=False)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def _accuracy(task: dict[str, Any]) -> str:
    truncated = f" ({task['truncated']:.0%} cut off)" if task["truncated"] else ""
    return f"{task['accuracy']:.0%}{truncated}"


def _caption(score: dict[str, Any]) -> str:
    parts = []
    if "text" in score:
        parts.append(f"perplexity on {score['text']['tokens']:,} tokens of held-out text")
    if score["tasks"]:
        count = next(iter(score["tasks"].values()))["n"]
        prompts = counted(count, "prompt")
        parts.append(f"accuracy of greedy answers to {prompts} a task, of up to {score['length']:,} tokens each")
    if baselines := score.get("baselines"):
        values = ", ".join(f"{name.removeprefix('order3_')} {value:.3f}" for name, value in baselines.items())
        parts.append(f"order-3 models, bits per byte: {values} (the first model: {score['text']['bits_per_byte']:.3f})")
    return "; ".join(parts)


def next_commands(run: Path, hmf: str) -> str:
    """Commands to run after priming. hmf: the command's name on this machine."""
    model = shlex.quote(str(run / "model"))
    return "\n".join(
        (
            "Next:",
            f"  {hmf} chat {model}    # chat with the Hybrid",
            f"  {hmf} evaluate {model} --tasks recall,arithmetic,tool_call",
            f"  {hmf} serve {model}   # an OpenAI-compatible API by vLLM; in a clone, make serve MODEL={model}",
        )
    )
