# SPDX-License-Identifier: Apache-2.0
"""Where documents come from: JSON lines, Parquet, text files, sets of the `datasets` library. Read as streams.

A reader gives records in an order that depends on the source alone. What a record holds is looked at later, by
`content`, in whatever process encodes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from hmf.config.data import SourceSettings
from hmf.data import text
from hmf.errors import HmfError, unknown_name

_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet"} | dict.fromkeys(text.SUFFIXES, "text")
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}


@dataclass(frozen=True)
class Record:
    """A line of JSON (bytes), a text or a row (dict), where it stands, and about how many bytes it takes there."""

    where: str
    value: bytes | str | dict[str, Any]
    size: int


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[Any] | None


class Source:
    """A source's files, found and checked; `records()` reads them.

    Attributes:
        total: bytes of all records, None where that is not known beforehand.
        fingerprint: changes with the content; for files their names, sizes and times.
    """

    def __init__(self, settings: SourceSettings):
        self.settings = settings
        self.total: int | None = None
        self.format, self.files, self.root = "datasets", list[Path](), Path()
        if settings.dataset is not None:
            self.fingerprint: list[Any] = [settings.dataset, settings.subset, settings.split, settings.revision]
            return
        assert settings.path is not None  # the settings' validator saw to it
        if settings.path == text.STDLIB:
            self.format = text.STDLIB
            self.documents = text.stdlib_documents(self._part("train") or "train")
            digest = hashlib.sha256("\0".join(document.text for document in self.documents).encode())
            self.fingerprint = [self.format, digest.hexdigest()]
            self.total = sum(len(document.text) for document in self.documents)
            return
        self._find(Path(settings.path))
        stats = [path.stat() for path in self.files]
        self.fingerprint = [
            [self.name(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(self.files, stats, strict=True)
        ]
        if not any(path.suffix in _COMPRESSED for path in self.files):
            self.total = sum(stat.st_size for stat in stats)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def records(self) -> Iterator[Record]:
        if self.format == text.STDLIB:
            return (Record(document.path, document.text, len(document.text)) for document in self.documents)
        if self.format in ("datasets", "saved"):
            return self._rows()
        read = {"jsonl": self._lines, "parquet": self._parquet, "text": self._texts}[self.format]
        return (record for path in self.files for record in read(path))

    def _part(self, default: text.Split | None) -> text.Split | None:
        """`split` of a source of text files."""
        match self.settings.split:
            case None:
                return default
            case "train" | "heldout" as part:
                return part
        raise HmfError(f"sources.{self.settings.title}.split: is train or heldout for text, not {self.settings.split}")

    def _find(self, path: Path) -> None:
        place = f"sources.{self.settings.title}.path: {path}"
        if has_magic(str(path)):
            found = [Path(name) for name in glob(str(path), recursive=True)]
            self.root = Path(*itertools.takewhile(lambda part: not has_magic(part), path.parts))
        elif path.is_dir():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                self.format, self.root = "saved", path
                self.files = sorted(path.rglob("*.arrow"))
                return
            found, self.root = list(path.rglob("*")), path
        elif path.is_file():
            found, self.root = [path], path.parent
        else:
            raise HmfError(f"{place}: no such file or folder")
        kinds: dict[str, list[Path]] = {}
        for file in found:
            if file.is_file() and (kind := self.settings.format or _kind(file)):
                kinds.setdefault(kind, []).append(file)
        if not kinds:
            raise HmfError(f"{place}: nothing to read; files end with {', '.join(_FORMATS)}, or set format")
        if len(kinds) > 1:
            raise HmfError(f"{place}: holds {' and '.join(sorted(kinds))} files; set format to the one that is meant")
        [(self.format, files)] = kinds.items()
        self.files = sorted(files, key=self.name)
        if self.format == "text":
            part = self._part(None)
            self.files = [file for file in self.files if part is None or text.split_of(self.name(file)) == part]
        elif self.settings.split is not None:
            raise HmfError(f"sources.{self.settings.title}.split: {self.format} files have no splits; leave it out")

    def _lines(self, path: Path) -> Iterator[Record]:
        import fsspec

        name, number = self.name(path), 0
        try:
            with fsspec.open(str(path), "rb", compression=_COMPRESSED.get(path.suffix)) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield Record(f"{name}:{number}", line, len(line))
        except (OSError, EOFError) as error:
            raise HmfError(f"{path}:{number + 1}: cannot be read ({error})") from None

    def _texts(self, path: Path) -> Iterator[Record]:
        try:
            content = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise HmfError(f"{path}: cannot be read as UTF-8 text ({error}); convert it or take it away") from None
        if content.strip():
            yield Record(self.name(path), content, len(content))

    def _parquet(self, path: Path) -> Iterator[Record]:
        from pyarrow import ArrowException, parquet

        name, number = self.name(path), 0
        try:
            with parquet.ParquetFile(path) as file:
                size = path.stat().st_size // max(1, file.metadata.num_rows)
                names, fields = file.schema_arrow.names, {self.settings.field, self.settings.tools_field}
                # Only what is needed; all, to name them, where that is not there.
                columns = [name for name in names if name in fields] if self.settings.field in names else None
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    for row in batch.to_pylist():
                        yield Record(f"{name} row {number}", _without_none(row), size)
                        number += 1
        except (ArrowException, OSError) as error:
            raise HmfError(f"{path}: row {number}: not readable Parquet ({str(error).splitlines()[0]})") from None

    def _rows(self) -> Iterator[Record]:
        import datasets

        datasets.disable_progress_bars()
        settings = self.settings
        place = settings.dataset or settings.path
        try:
            if self.format == "saved":
                rows: Any = datasets.load_from_disk(str(self.root))
            else:
                rows = datasets.load_dataset(
                    str(settings.dataset), settings.subset, revision=settings.revision, streaming=True
                )
            if isinstance(rows, dict):
                split = settings.split or "train"
                if split not in rows:
                    raise HmfError(f"sources.{settings.title}.split: {unknown_name('split', split, rows)}")
                rows = rows[split]
            elif settings.split is not None:
                raise HmfError(f"sources.{settings.title}.split: {place} has no splits; leave it out")
            for number, row in enumerate(rows):
                yield Record(f"{place} row {number}", _without_none(row), 0)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise HmfError(f"{place}: cannot be read by datasets ({' '.join(str(error).split())})") from None


def content(record: Record, settings: SourceSettings) -> str | Conversation:
    """The text or conversation of a record.

    Raises:
        HmfError: not a JSON object; a missing field; a conversation that is none.
    """
    if isinstance(record.value, str):
        return record.value
    row = record.value
    if isinstance(row, bytes):
        try:
            row = json.loads(row.rstrip(b"\r\n"))
        except json.JSONDecodeError as error:
            place = f"{error.msg} at character {error.pos + 1} of {len(error.doc)}"
            raise HmfError(f"not valid JSON ({place}); one object a line is expected") from None
        except UnicodeDecodeError as error:
            raise HmfError(f"not UTF-8 ({error.reason} at byte {error.start + 1}); convert the file") from None
        if not isinstance(row, dict):
            raise HmfError(f"a JSON object is expected, not {type(row).__name__}")
    chat = settings.messages_field is not None
    field = settings.field
    if field not in row:
        raise HmfError(f"no field {field!r}; it has {', '.join(map(repr, row))}: set text_field or messages_field")
    value = row[field]
    if not chat:
        if not isinstance(value, str):
            hint = "; conversations are read by messages_field" if isinstance(value, list) else ""
            raise HmfError(f"field {field!r} holds {_kind_of(value)} and not text{hint}")
        return value
    messages = _decoded(value, field)
    if not isinstance(messages, list) or not messages:
        raise HmfError(f"field {field!r} holds {_kind_of(value)} and not a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            has = f"it has {', '.join(map(repr, message))}" if isinstance(message, dict) else f"it is {message!r:.40}"
            raise HmfError(f"{field}[{number}] has no role; {has}: write role and content")
    tools = _decoded(row.get(settings.tools_field), settings.tools_field) or None
    if tools is not None and not isinstance(tools, list):
        raise HmfError(f"field {settings.tools_field!r} holds {_kind_of(tools)} and not a list of tools")
    return Conversation(messages, tools)


def _decoded(value: Any, field: str) -> Any:
    """Tables often hold lists of free form as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise HmfError(f"field {field!r} is text but not valid JSON ({error})") from None


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _kind_of(value: Any) -> str:
    return "nothing" if value is None else "an empty list" if value == [] else type(value).__name__


def _without_none(value: Any) -> Any:
    """A row as it was before a table gave it every field of every other row."""
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
