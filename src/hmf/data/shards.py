# SPDX-License-Identifier: Apache-2.0
"""Shards: the tokenised documents of a source, in numbered Arrow files. A shard depends only on its own records.

The result therefore does not depend on the number of processes, on their order, or on the shards that an earlier run
wrote. A file gets its name only when it is complete. It holds an Arrow stream, whose metadata has a digest of the
records, and the SHA-256 of the stream. A shard that is damaged, or whose records have changed, is written again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from hmf.config.data import DataRecipe, FilterSettings, SourceSettings
from hmf.config.strict import parse_json
from hmf.data.conversation import messages_after, normalise, strings_of, text_of, thinking_of
from hmf.data.encoding import IGNORED, Encoded, encode_chat, encode_document
from hmf.data.files import say_once
from hmf.data.filters import repetition
from hmf.data.formats import Conversation
from hmf.data.progress import Progress
from hmf.data.sources import Record, Source, content, digest
from hmf.data.tokenizer import load_tokenizer, special_tokens
from hmf.errors import HmfError

FORMAT = 5  # version of the file format and of the encoding; shards of other versions are not used
HASH_BYTES = 32
SHARD_BYTES = 8 << 20  # a shard ends at this size of its records, or at the recipe's shard_documents
_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.bool_()),
        "where": pa.string(),
    }
)


@dataclass
class Counts:
    """Counts of records and documents. `filtered` is by reason. A conversation can give several documents."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    special_tokens: int = 0  # records whose texts contain special tokens
    after_answers: int = 0  # messages after the last supervised turn, which are not used
    filtered: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)  # records by the name of a field that is not read

    def leave_out(self, reason: str, count: int = 1) -> None:
        self.filtered[reason] = self.filtered.get(reason, 0) + count

    def add(self, other: Counts) -> None:
        for name in ("records", "documents", "tokens", "supervised", "special_tokens", "after_answers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.filtered.items():
            self.leave_out(reason, count)
        for name, count in other.unread.items():
            self.unread[name] = self.unread.get(name, 0) + count


@dataclass(frozen=True)
class Encoder:
    """Encodes the records of one source into documents of tokens."""

    source: SourceSettings
    filters: FilterSettings
    thinking: Any
    turns: Any

    @classmethod
    def of(cls, source: SourceSettings, recipe: DataRecipe) -> Encoder:
        return cls(source, source.filters or recipe.filters, recipe.thinking, recipe.turns)

    def encode(self, record: Record, tokenizer: PreTrainedTokenizerBase, counts: Counts) -> list[Encoded]:
        """The documents of a record that pass the filters. HmfError for a bad record, with its place."""
        counts.records += 1
        try:
            item, split = content(record, self.source), self.source.split_special_tokens
            if isinstance(item, Conversation):
                counts.add(Counts(unread=dict.fromkeys(item.unread, 1)))
                # Those of messages are left out already, and a weight may be that of the shape.
                messages, tools = normalise(item.messages, item.tools, {*self.source.ignore_keys} - {"weight"})
                item = replace(item, messages=messages, tools=tools)
            if self.filters.repetition and (reason := repetition(_supervised_text(item), self.filters.repetition)):
                counts.leave_out(reason)
                return []
            if isinstance(item, Conversation):
                variables = item.chat_template_kwargs
                documents = encode_chat(
                    tokenizer,
                    item.messages,
                    item.tools,
                    self.thinking,
                    self.turns,
                    split_special_tokens=split,
                    chat_template_kwargs=variables,
                )
                counts.after_answers += messages_after(item.messages)
                texts = strings_of([item.messages, item.tools, variables])
            else:
                documents = [encode_document(tokenizer, item, split)] if item.strip() else []
                texts = iter([item])
            counts.special_tokens += any(map(special_tokens(tokenizer).search, texts))
        except HmfError as error:
            raise HmfError(f"{self.source.title}: {record.where}: {error}") from None
        kept = []
        for document in documents:
            if len(document) < self.filters.min_tokens:
                counts.leave_out("min_tokens")
            elif self.filters.max_tokens is not None and len(document) > self.filters.max_tokens:
                counts.leave_out("max_tokens")
            else:
                kept.append(document)
        if not documents:
            counts.leave_out("empty")
        counts.documents += len(kept)
        counts.tokens += sum(map(len, kept))
        counts.supervised += sum(label != IGNORED for document in kept for label in document.labels)
        return kept


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary. Prepared rows fit every tokenizer with the same hash."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that the tokens can depend on."""
    return {name: version(name) for name in ("transformers", "tokenizers", "datasets", "datatrove", "pyarrow")}


def shard_folder(source: Source, encoder: Encoder, tokenizer: PreTrainedTokenizerBase, recipe: DataRecipe) -> str:
    """Name of the folder of a source's shards. It contains a hash of everything that decides their content."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inputs = [
        FORMAT,
        recipe.shard_documents,
        source.fingerprint,
        encoder.source.model_dump(mode="json", exclude={"name", "weight", "filters"}),
        encoder.filters.model_dump(mode="json"),
        encoder.thinking,
        encoder.turns,
        vocabulary(tokenizer),
        backend and hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        versions(),
    ]
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", encoder.source.title)[:64]  # may have any characters
    return f"{name}-{key[:16]}"


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Write a file that gets its name only when it is complete and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def tokenise(
    source: Source,
    encoder: Encoder,
    folder: Path,
    recipe: DataRecipe,
    tokenizer_name: str,
    workers: int,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Write the shards of a source that are not in `folder` yet.

    Returns:
        The number of shards.
    Raises:
        HmfError: the first bad record. The shards before it are kept.
    """
    read_shard.cache_clear()
    done = folder / "shards.json"  # written last
    if (count := _finished(done, encoder.source.title)) is not None:
        return count
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # hmf runs several processes already
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob("*.part"):
        part.unlink()
    progress = Progress(f"tokenise {encoder.source.title}", source.total)
    number = 0

    def jobs() -> Iterator[tuple[Path, list[Record]]]:
        nonlocal number
        for batch in _batches(source.records(), recipe.shard_documents):
            path = shard_path(folder, number)
            number += 1
            if (stored_digest := records_digest(path)) is not None and stored_digest == digest(batch):
                progress.skip(sum(record.size for record in batch))
                continue
            if path.is_file():
                say_once(
                    f"{path}: {'its records have changed' if stored_digest else 'it is damaged'}; it is written again"
                )
            yield path, batch

    try:
        for counts, size in _in_order(jobs(), encoder, tokenizer, tokenizer_name, workers):
            progress.add(size, counts.tokens)
    finally:
        progress.close()
    for path in {*folder.glob("*.arrow")} - {shard_path(folder, n) for n in range(number)}:
        path.unlink()
    write_file(done, lambda file: file.write(json.dumps({"shards": number}).encode()))
    return number


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.arrow"


def records_digest(path: Path) -> str | None:
    """The digest of the records of a shard; None if the shard does not exist or is damaged."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    stream, stored_hash = content[:-HASH_BYTES], content[-HASH_BYTES:]
    if hashlib.sha256(stream).digest() != stored_hash:
        return None
    return pa.ipc.open_stream(stream).schema.metadata[b"records"].decode()


def _finished(done: Path, title: str) -> int | None:
    """The number of shards of a source, if all of them exist and are intact; else None."""
    if not done.is_file():
        return None
    try:
        count = int(parse_json(done.read_text(encoding="utf-8"))["shards"])
    except (ValueError, KeyError, TypeError):
        return None
    paths = [shard_path(done.parent, number) for number in range(count)]
    if {*paths} != {*done.parent.glob("*.arrow")}:
        return None
    progress = Progress(f"check {title}", sum(path.stat().st_size for path in paths))
    try:
        for path in paths:
            if records_digest(path) is None:
                return None
            progress.add(path.stat().st_size, 0)
    finally:
        progress.close()
    return count


def _batches(records: Iterator[Record], documents: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += record.size
        if len(batch) == documents or size >= SHARD_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shard(path: Path, batch: list[Record], encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> Counts:
    counts = Counts()
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for record in batch:
        for document in encoder.encode(record, tokenizer, counts):
            columns["input_ids"].append(np.array(document.ids, dtype=np.int32))
            columns["supervised"].append(np.array(document.labels) != IGNORED)
            columns["where"].append(record.where)
    facts = {"counts": json.dumps(asdict(counts), sort_keys=True), "records": digest(batch)}
    schema = _SCHEMA.with_metadata(facts)
    table = pa.RecordBatch.from_pydict(columns, schema=schema)
    content = pa.BufferOutputStream()
    with pa.ipc.new_stream(content, schema) as stream:
        stream.write_batch(table)
    written = content.getvalue()
    write_file(path, lambda file: file.write(written) and file.write(hashlib.sha256(written).digest()))
    return counts


@functools.lru_cache(maxsize=128)
def read_shard(path: Path) -> pa.RecordBatch:
    """The documents of a shard, as a memory map. HmfError if it is missing or damaged."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).read_next_batch()
    except (pa.ArrowException, StopIteration, OSError):
        raise HmfError(f"{path}: is missing or damaged; remove {path.parent} and run the command again") from None


def shard_counts(path: Path) -> Counts:
    return Counts(**json.loads(read_shard(path).schema.metadata[b"counts"]))


# The tokenizer of this process, if it is a worker of a pool.
_tokenizer: PreTrainedTokenizerBase | None = None


def _start_worker(tokenizer_name: str) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _tokenizer = load_tokenizer(tokenizer_name)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(path: Path, batch: list[Record], encoder: Encoder) -> Counts:
    assert _tokenizer is not None
    return _write_shard(path, batch, encoder, _tokenizer)


def _in_order(
    jobs: Iterator[tuple[Path, list[Record]]],
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_name: str,
    workers: int,
) -> Iterator[tuple[Counts, int]]:
    """Run the jobs, in several processes if there are several jobs and workers, and yield the results in order.

    At most two jobs per process are read ahead.
    """
    first = next(jobs, None)
    second = next(jobs, None) if first and workers > 1 else None
    waiting = [job for job in (first, second) if job]

    def all_jobs() -> Iterator[tuple[Path, list[Record]]]:
        yield from waiting
        yield from jobs

    if second is None:
        for path, batch in all_jobs():
            yield _write_shard(path, batch, encoder, tokenizer), sum(record.size for record in batch)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hmf.data.shards"])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_name,))
    running: deque[tuple[Future[Counts], int]] = deque()
    try:
        for path, batch in all_jobs():
            running.append((pool.submit(_work, path, batch, encoder), sum(record.size for record in batch)))
            if len(running) >= 2 * workers:
                future, size = running.popleft()
                yield future.result(), size
        for future, size in running:
            yield future.result(), size
    except BrokenProcessPool:
        raise HmfError(
            "a worker process was killed, perhaps because of memory; run the command again with fewer --workers to "
            "continue"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _supervised_text(item: str | Conversation) -> str:
    """The text that the model learns to write; of a conversation, the assistant's turns."""
    if isinstance(item, str):
        return item
    answers = [message for message in item.messages if message["role"] == "assistant"]
    return "\n\n".join(
        part for message in answers for part in (thinking_of(message), text_of(message.get("content"))) if part
    )
