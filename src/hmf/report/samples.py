# SPDX-License-Identifier: Apache-2.0
"""Prints training documents as the model reads them, and counts of them."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hmf.config.data import DataRecipe
from hmf.data.encoding import IGNORED
from hmf.data.prepared import PreparedDataset
from hmf.data.shards import Counts, Encoder
from hmf.data.sources import Source
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import counted

SUPERVISED, CONTEXT, OMITTED = "bold green", "dim", "yellow"


def show_prepared(folder: Path, resolve: Callable[[str], Path], samples: int, tokens: int) -> None:
    """Print counts of a prepared data set and `samples` documents, spread over its rows and alternating its sources.

    No document is printed twice, so a small set prints fewer.
    """
    prepared = PreparedDataset(folder)
    tokenizer = load_tokenizer(resolve(prepared.index["recipe"]["tokenizer"]))
    console = _console()
    names = [source["name"] for source in prepared.index["sources"]]
    shown = set[tuple[int, int]]()
    for sample in range(samples):
        found = _document(prepared, sample * len(prepared) // samples, names[sample % len(names)], shown)
        if found is None:
            continue
        shown.add(found)
        row, place = prepared.stored[found[0]], found[1]
        bounds = np.cumsum([0, *row["lengths"]])
        part = slice(bounds[place], bounds[place + 1])
        _print(console, tokenizer, str(row["where"][place]), row["input_ids"][part], row["supervised"][part], tokens)
    if samples:
        _legend(console)
    print_counts(prepared.index, console)


def _document(
    prepared: PreparedDataset, first: int, source: str, shown: Container[tuple[int, int]]
) -> tuple[int, int] | None:
    """Numbers of a row from `first` on and of a document in it that is not `shown`. It is from `source` if one of the
    next 200 rows has such a document. None if all are shown."""
    for start in (f"{source}: ", ""):
        for number in range(first, min(first + 200, len(prepared))):
            for place, where in enumerate(prepared.stored[number]["where"]):
                if where and where.startswith(start) and (number, place) not in shown:
                    return number, place
    return None


def show_recipe(recipe: DataRecipe, tokenizer: str | Path, samples: int, tokens: int, records: int) -> None:
    """Print the first `samples` documents of each source of a recipe, and counts of its first `records` records.

    Raises:
        HmfError: the first bad record.
    """
    loaded, console, table = load_tokenizer(tokenizer), _console(), []
    for settings in recipe.sources:
        encoder, counts = Encoder.of(settings, recipe), Counts()
        shown = truncated = 0
        for record in islice(Source(settings).records(), records):
            for document in encoder.encode(record, loaded, counts):
                truncated += settings.chat and len(document) > recipe.sequence_length
                if shown < samples:
                    supervised = np.array(document.labels) != IGNORED
                    where = f"{settings.title}: {record.where}"
                    _print(console, loaded, where, np.array(document.ids), supervised, tokens)
                    shown += 1
        kind = "chat" if settings.chat else "text"
        table.append(asdict(counts) | {"name": settings.title, "kind": kind, "truncated": truncated})
    if samples:
        _legend(console)
    console.print(_table(table, f"the first {records:,} records of each source, before mixing"))
    for source in table:
        _notes(console, source)
        if source["truncated"] > recipe.max_truncated_share * source["documents"]:
            console.print(
                f"{source['name']}: {source['truncated']:,} of {source['documents']:,} conversations are longer than "
                f"sequence_length {recipe.sequence_length:,}; `hmf data prepare` refuses more than the "
                f"max_truncated_share {recipe.max_truncated_share:g}",
                style=OMITTED,
                highlight=False,
            )


def print_counts(index: dict[str, Any], console: Console | None = None) -> None:
    """Print the counts of each source, and of the rows."""
    console = console or _console()
    console.print(_table(index["sources"]))
    pieces = index["documents"] > sum(source["used"]["documents"] for source in index["sources"])
    console.print(
        f"{counted(index['rows'], 'row')} of {index['sequence_length']:,} tokens from "
        f"{counted(index['documents'], 'document')}{' and pieces of them' * pieces}, {index['filled']:.1%} filled",
        highlight=False,
    )
    for source in index["sources"]:
        _notes(console, source)
        if source["unusable"]:
            text = f"{source['unusable']:,} truncated conversations have no supervised token left and are not used"
            console.print(f"{source['name']}: {text}", highlight=False)


def _notes(console: Console, source: dict[str, Any]) -> None:
    if source["filtered"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(source["filtered"].items()))
        console.print(f"{source['name']}: filtered by {reasons}", highlight=False)
    if unread := source.get("unread"):
        names = ", ".join(f"{name} ({count:,})" for name, count in sorted(unread.items()))
        console.print(f"{source['name']}: fields of conversations that are not read: {names}", highlight=False)
    if count := source.get("special_tokens"):
        text = "special tokens in their text, which split_special_tokens: true encodes as plain text"
        console.print(f"{source['name']}: {count:,} records have {text}", highlight=False)
    if count := source.get("after_answers"):
        text = f"{count:,} messages after the last supervised turn of their conversation are not used"
        console.print(f"{source['name']}: {text}", highlight=False)


def _table(sources: list[dict[str, Any]], caption: str | None = None) -> Table:
    """A table with one row per source. For a mixture, `tokens` and `supervised` are those in the rows."""
    mixed = any("used" in source for source in sources)
    table = Table(caption=caption, caption_justify="left")
    table.add_column("source", overflow="fold")
    table.add_column("kind", no_wrap=True)
    names = ["records", "filtered", "documents", "truncated", "tokens", "supervised"]
    for name in names + ["share", "passes"] * mixed:
        table.add_column(name, justify="right", no_wrap=True)
    total = sum(source["used"]["tokens"] for source in sources) if mixed else 0
    for source in sources:
        used = source.get("used", source)
        row = [f"{source['records']:,}", f"{sum(source['filtered'].values()):,}", f"{used['documents']:,}"]
        row += [f"{source['truncated']:,}", f"{used['tokens']:,}"]
        row.append(f"{used['supervised']:,} ({used['supervised'] / max(1, used['tokens']):.0%})")
        if mixed:
            row += [f"{used['tokens'] / total:.1%}", f"{source['passes']:.2f}"]
        table.add_row(source["name"], source["kind"], *row)
    return table


def _print(
    console: Console, tokenizer: PreTrainedTokenizerBase, where: str, ids: Any, supervised: Any, tokens: int
) -> None:
    count = f"{len(ids):,} tokens, {int(supervised.sum()):,} supervised"
    console.rule(Text(f"{where}   {count}"), align="left", style="cyan")
    text = Text()
    halves = [(0, len(ids))] if len(ids) <= tokens else [(0, tokens // 2), (len(ids) - tokens // 2, len(ids))]
    for number, (start, stop) in enumerate(halves):
        if number:
            text.append(f"\n… {len(ids) - 2 * (tokens // 2):,} tokens …\n", style=OMITTED)
        changes = np.flatnonzero(np.diff(supervised[start:stop])) + start + 1
        for first, last in zip([start, *changes], [*changes, stop], strict=True):
            part = tokenizer.decode(ids[first:last].tolist())
            if supervised[first]:
                # Without colours, supervised text is marked by brackets.
                text.append(part if console.color_system else f"⟦{part}⟧", style=SUPERVISED)
            else:
                text.append(part, style=CONTEXT)
    console.print(text, highlight=False, soft_wrap=True)


def _legend(console: Console) -> None:
    marked = Text("bold green", style=SUPERVISED) if console.color_system else Text("⟦marked⟧")
    console.rule(style="cyan")
    console.print(Text.assemble("What the model learns to write is ", marked, "; the rest is context."))


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 120, markup=False, emoji=False)
