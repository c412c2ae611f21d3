# SPDX-License-Identifier: Apache-2.0
"""`hmf data prepare`: sources are tokenised (shards.py), mixed, packed by best fit, and written as rows.

A finished folder holds
    rows/00000.arrow ...  input_ids, supervised [T]; lengths and places of the row's documents
    index.json            written last: the recipe, counts, hashes of the files and of the vocabulary
While the run is unfinished, tokenised/ holds the shards from which it can continue. The result depends only on the
recipe and the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from hmf.config.data import DataRecipe
from hmf.config.strict import seal_json
from hmf.data.packing import best_fit
from hmf.data.prepared import INDEX, TOKENISED, check_files, read_index, sha256_of
from hmf.data.progress import Progress
from hmf.data.shards import (
    Counts,
    Encoder,
    read_shard,
    shard_counts,
    shard_folder,
    shard_path,
    tokenise,
    versions,
    vocabulary,
    write_file,
)
from hmf.data.sources import Source
from hmf.data.tokenizer import document_separator, load_tokenizer
from hmf.errors import HmfError
from hmf.folders import HOLDER, locked, require_unused

ROWS = "rows"
MOST_PASSES = 1000  # limit of passes over a source; more are probably a mistake, and their order would fill the memory
FILE_TOKENS = 1 << 24  # tokens in a file of rows
EXAMPLES = 3  # documents that an error message names
_ROW_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.bool_()),
        "lengths": pa.list_(pa.int32()),
        "where": pa.list_(pa.string()),
    }
)


def prepare(recipe: DataRecipe, tokenizer: str | Path, workers: int = 1) -> dict[str, Any]:
    """Prepare the rows of a recipe.

    An interrupted run continues with the shards that are complete. Interruptions and the number of processes do not
    change the result by a single byte.

    Args:
        tokenizer: the tokenizer's checkpoint directory.
        workers: number of processes.
    Returns:
        The content of the index.
    Raises:
        HmfError: a bad record (with its file and line); too many conversations that are longer than a row; an output
            folder that holds something else.
    """
    output = recipe.output
    if (output / INDEX).is_file():
        index = read_index(output)
        if index["recipe"] != _stated(recipe):
            raise HmfError(f"{output}: holds the rows of another recipe; choose another output or remove it")
        check_files(output, index)
        _check_sources(recipe, index)
        shutil.rmtree(output / TOKENISED, ignore_errors=True)
        return index
    require_unused(output, lambda name: name == HOLDER or name.split(".")[0] in (ROWS, TOKENISED, "index"))
    loaded = load_tokenizer(tokenizer)
    pairs = [(Source(settings), Encoder.of(settings, recipe)) for settings in recipe.sources]  # before the long steps
    cache = recipe.cache or output / TOKENISED
    try:
        with locked(output):
            sources = []
            for source, encoder in pairs:
                folder = cache / shard_folder(source, encoder, loaded, recipe)
                count = tokenise(source, encoder, folder, recipe, str(tokenizer), workers, loaded)
                sources.append(Tokenised.read(encoder, folder, count, recipe))
            index = _write(recipe, sources, loaded, [_content(source) for source, _ in pairs])
    except OSError as error:
        raise HmfError(
            f"{error.filename or output}: cannot be written: {error.strerror or error}; fix this and run the command "
            "again to continue"
        ) from None
    shutil.rmtree(output / TOKENISED, ignore_errors=True)
    return index


def _check_sources(recipe: DataRecipe, index: dict[str, Any]) -> None:
    """HmfError if a source of the finished set still exists, but has changed since."""
    index_time = (recipe.output / INDEX).stat().st_mtime_ns
    for settings, stated in zip(recipe.sources, index["sources"], strict=True):
        if settings.path is None or not (has_magic(settings.path) or Path(settings.path).exists()):
            continue
        source = Source(settings)
        newer = any(path.stat().st_mtime_ns > index_time for path in source.files)
        if newer or _content(source) != stated.get("content"):
            raise HmfError(
                f"{recipe.output}: source {settings.title} has changed since the rows were prepared; choose "
                "another output or remove this one"
            )


def _content(source: Source) -> str:
    """A hash of the names and sizes of a source's files."""
    facts = [[source.name(path), path.stat().st_size] for path in source.files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass
class Tokenised:
    """The tokenised documents of a source, in the source's order; arrays have one entry per document."""

    encoder: Encoder
    folder: Path
    counts: Counts
    starts: np.ndarray  # [shards + 1] number of documents before each shard
    lengths: np.ndarray  # used tokens of each document
    truncated: int  # conversations that are longer than a row and were truncated

    @property
    def title(self) -> str:
        return self.encoder.source.title

    @property
    def chat(self) -> bool:
        return self.encoder.source.chat

    @classmethod
    def read(cls, encoder: Encoder, folder: Path, shard_count: int, recipe: DataRecipe) -> Tokenised:
        counts, shard_lengths = Counts(), []
        for number in range(shard_count):
            counts.add(shard_counts(shard_path(folder, number)))
            shard_lengths.append(read_shard(shard_path(folder, number)).column("input_ids").value_lengths().to_numpy())
        lengths = np.concatenate([*shard_lengths, np.zeros(0, np.int32)]).astype(np.int64)
        starts = np.cumsum([0, *map(len, shard_lengths)])
        self = cls(encoder, folder, counts, starts, lengths, 0)
        if not counts.documents:
            left_out = ", ".join(f"{count:,} by {reason}" for reason, count in sorted(counts.filtered.items()))
            raise HmfError(
                f"{self.title}: none of {counts.records:,} records gives a document ({left_out or 'nothing to read'}); "
                "check the source and its filters"
            )
        if self.chat:
            self._truncate(recipe)
        return self

    def _truncate(self, recipe: DataRecipe) -> None:
        """Truncate conversations to the length of a row; those that lose all supervised tokens are not used."""
        longer = np.flatnonzero(self.lengths > recipe.sequence_length)
        self.truncated = len(longer)
        if self.truncated > recipe.max_truncated_share * len(self.lengths):
            examples = "; ".join(
                f"{self.where(document)} has {self.lengths[document]:,} tokens" for document in longer[:EXAMPLES]
            )
            raise HmfError(
                f"{self.title}: {self.truncated:,} of {len(self.lengths):,} conversations are longer than "
                "sequence_length "
                f"{recipe.sequence_length:,}, more than max_truncated_share {recipe.max_truncated_share:g} allows: "
                f"{examples}; raise one of these two, or set filters.max_tokens to leave them out"
            )
        self.lengths = np.minimum(self.lengths, recipe.sequence_length)
        for document in longer:
            if not self.tokens(document, 0, recipe.sequence_length)[1].any():
                self.lengths[document] = 0

    def where(self, document: int) -> str:
        batch, place = self._find(document)
        return f"{self.title}: {batch.column('where')[place]}"

    def tokens(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a part of a document, and whether each is supervised; the first token of a part never is."""
        batch, place = self._find(document)
        ids, supervised = (
            batch.column(name).slice(place, 1).flatten()[start:stop].to_numpy(zero_copy_only=False)
            for name in ("input_ids", "supervised")
        )
        supervised = supervised.copy()
        supervised[:1] = False
        return ids, supervised

    def _find(self, document: int) -> tuple[pa.RecordBatch, int]:
        number = int(np.searchsorted(self.starts, document, side="right")) - 1
        return read_shard(shard_path(self.folder, number)), int(document - self.starts[number])


def _stated(recipe: DataRecipe) -> dict[str, Any]:
    """The part of the recipe that the rows depend on."""
    return json.loads(recipe.model_dump_json(exclude={"output", "cache", "shard_documents"}))


def _chosen(recipe: DataRecipe, sources: list[Tokenised]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The documents that are used of each source, and how many tokens of each.

    Without weights, every document is used once. With weights, documents are used in shuffled order, pass after pass,
    until they have the source's share of the tokens; the last one is truncated if it is a text.
    """
    usable = [np.flatnonzero(source.lengths) for source in sources]
    if recipe.sources[0].weight is None:
        return [(documents, source.lengths[documents]) for documents, source in zip(usable, sources, strict=True)]
    weights = np.array([source.encoder.source.weight for source in sources], dtype=np.float64)
    weights /= weights.sum()
    total = recipe.tokens or (np.array([source.lengths.sum() for source in sources]) / weights).min()
    chosen = []
    for number, source in enumerate(sources):
        if not len(usable[number]):
            raise HmfError(
                f"{source.title}: no conversation has a supervised token within a row; raise sequence_length"
            )
        rng = np.random.default_rng([recipe.seed, 1, number])
        missing, parts = round(total * weights[number]), list[np.ndarray]()
        if missing > MOST_PASSES * (available := int(source.lengths.sum())):
            raise HmfError(
                f"tokens: {total:,.0f} need {missing / available:,.0f} passes over the {available:,} tokens of "
                f"{source.title}, more than {MOST_PASSES:,}; lower tokens or the source's weight"
            )
        while missing > 0:
            order = rng.permutation(usable[number])
            before = np.cumsum(source.lengths[order]) - source.lengths[order]
            parts.append(order[before < missing])
            missing -= int(source.lengths[parts[-1]].sum())
        documents = np.concatenate([*parts, usable[number][:0]])
        sizes = source.lengths[documents].copy()
        if not source.chat and len(sizes):
            sizes[-1] += missing  # negative: the tokens that exceed the share
        chosen.append((documents, sizes))
    return chosen


def _write(
    recipe: DataRecipe, sources: list[Tokenised], tokenizer: PreTrainedTokenizerBase, contents: list[str]
) -> dict[str, Any]:
    length, chosen = recipe.sequence_length, _chosen(recipe, sources)
    # Pieces of documents: (source, document, start, length). A text that is longer than a row is split.
    pieces = np.concatenate([_pieces(number, *chosen[number], length) for number in range(len(sources))])
    if not len(pieces):
        raise HmfError(
            f"{recipe.output}: no document can be used; check the filters of the sources and sequence_length"
        )
    pieces = pieces[np.random.default_rng([recipe.seed, 2]).permutation(len(pieces))]
    rows = best_fit(pieces[:, 3].tolist(), length, recipe.packing_window)
    order = np.random.default_rng([recipe.seed, 3]).permutation(len(rows))
    filler, per_file = document_separator(tokenizer), max(1, FILE_TOKENS // length)
    used = [{"documents": len(documents), "tokens": 0, "supervised": 0} for documents, _ in chosen]
    staged, target = recipe.output / f"{ROWS}.part", recipe.output / ROWS
    for unfinished in (staged, target):
        shutil.rmtree(unfinished, ignore_errors=True)
    for part in recipe.output.glob(f"{INDEX}.*"):
        part.unlink()
    staged.mkdir(parents=True)
    files, progress = {}, Progress("pack", len(rows), unit=" rows")
    for first in range(0, len(rows), per_file):
        columns: dict[str, list[Any]] = {name: [] for name in _ROW_SCHEMA.names}
        for place in order[first : first + per_file]:
            for name, value in _row(pieces[rows[place]], sources, length, filler, used).items():
                columns[name].append(value)
            progress.add(1, length)
        path = staged / f"{first // per_file:05d}.arrow"
        write_file(path, partial(_write_rows, columns=columns))
        files[f"{ROWS}/{path.name}"] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    progress.close()
    os.rename(staged, target)
    index = {
        "recipe": _stated(recipe),
        "sequence_length": length,
        "rows": len(rows),
        "documents": len(pieces),
        "filled": float(pieces[:, 3].sum() / (len(rows) * length)),
        "sources": [
            asdict(source.counts)
            | {
                "name": source.title,
                "content": contents[number],
                "kind": "chat" if source.chat else "text",
                "truncated": source.truncated,
                "unusable": int((source.lengths == 0).sum()),
                "passes": round(used[number]["tokens"] / max(1, int(source.lengths.sum())), 4),
                "used": used[number],
            }
            for number, source in enumerate(sources)
        ],
        "vocabulary": vocabulary(tokenizer),
        "versions": versions(),
        "files": files,
    }
    write_file(recipe.output / INDEX, lambda file: file.write(seal_json(index).encode()))
    return index


def _row(
    pieces: np.ndarray, sources: list[Tokenised], length: int, filler: int, used: list[dict[str, int]]
) -> dict[str, Any]:
    """The columns of a row of these pieces, filled up with `filler`. Their tokens are added to `used`, by source."""
    ids, supervised, lengths, where = [], [], [], []
    for number, document, start, size in pieces.tolist():
        part, is_supervised = sources[number].tokens(document, start, start + size)
        ids.append(part)
        supervised.append(is_supervised)
        lengths.append(size)
        where.append(sources[number].where(document) + (f" from token {start}" if start else ""))
        used[number]["tokens"] += size
        used[number]["supervised"] += int(is_supervised.sum())
    if room := length - sum(lengths):
        ids.append(np.full(room, filler, np.int32))
        supervised.append(np.zeros(room, bool))
        lengths.append(room)
        where.append("")
    values = np.concatenate(ids), np.concatenate(supervised), lengths, where
    return dict(zip(_ROW_SCHEMA.names, values, strict=True))


def _pieces(number: int, documents: np.ndarray, sizes: np.ndarray, length: int) -> np.ndarray:
    counts = -(-sizes // length)  # conversations were truncated to one row
    which = np.repeat(np.arange(len(documents)), counts)
    start = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return np.stack([np.full(len(which), number), documents[which], start, np.minimum(length, sizes[which] - start)], 1)


def _write_rows(file: Any, columns: dict[str, list[Any]]) -> None:
    table = pa.Table.from_pydict(columns, schema=_ROW_SCHEMA)
    with pa.ipc.new_stream(file, _ROW_SCHEMA) as stream:
        stream.write_table(table, max_chunksize=64)
