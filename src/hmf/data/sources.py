# SPDX-License-Identifier: Apache-2.0
"""Sources of documents and pairs: JSON, Parquet, CSV, text files, data sets of the `datasets` library. Read as streams.

The order of the records depends only on the source. A record is parsed later, by `content` or `pair_of`, in the process
that encodes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hmf import hub
from hmf.config.data import SourceSettings
from hmf.config.places import PairSettings, PlaceSettings
from hmf.config.strict import parse_json, require_text
from hmf.data import files, formats, text
from hmf.data.fields import unread_fields
from hmf.data.formats import Conversation, Pair
from hmf.errors import HmfError, unknown_name

# Words in the names of files that stand for splits: those of the datasets library, and others.
_TRAIN = {"train", "training"}
_HELD_OUT = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev", "held", "heldout", "holdout"}


@dataclass(frozen=True)
class Record:
    """A line of JSON (bytes), a text or a row (dict), with its place for errors and its approximate size in bytes."""

    where: str
    value: bytes | str | dict[str, Any]
    size: int


class Source:
    """A source whose files exist and were checked. `records()` reads them.

    Attributes:
        total: bytes of all records; None if not known before reading.
        fingerprint: changes if the content changes; for files, their names, sizes and times.

    Raises:
        HmfError: there is nothing to read, or nothing of the required kind.
    """

    def __init__(self, settings: PlaceSettings):
        self.settings = settings
        self.total: int | None = None
        self.format, self.files, self.root = "datasets", list[Path](), Path()
        if settings.dataset is not None:
            self.fingerprint: list[Any] = [settings.dataset, settings.subset, settings.split, settings.revision]
            if (folder := Path(settings.dataset)).is_dir():
                self.root = folder
                self.files = files.downloaded(sorted(path for path in folder.rglob("*") if path.is_file()))
                self.fingerprint += self._facts()
            elif folder.is_file():
                raise HmfError(f"{settings.key}.dataset: {folder}: is a file; write path in place of dataset")
            return
        assert settings.path is not None  # checked by the settings' validator
        if settings.path == text.STDLIB and settings.reads_text:
            self.format = text.STDLIB
            self.documents = text.stdlib_documents(self._part("train") or "train")
            digest = hashlib.sha256("\0".join(document.text for document in self.documents).encode())
            self.fingerprint = [self.format, digest.hexdigest()]
            self.total = sum(len(document.text) for document in self.documents)
            return
        key = f"{settings.key}.path"
        self._find(hub.data_path(key, settings.path) if hub.is_data(settings.path) else Path(settings.path))
        self.fingerprint = self._facts()
        if not any(files.is_compressed(path) for path in self.files):
            self.total = sum(path.stat().st_size for path in self.files)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def records(self) -> Iterator[Record]:
        if self.format == text.STDLIB:
            return (Record(document.path, document.text, len(document.text)) for document in self.documents)
        if self.format in ("datasets", "saved"):
            return self._rows()
        read = {"jsonl": self._json, "parquet": self._parquet, "csv": self._csv, "text": self._texts}[self.format]
        return (record for path in self.files for record in read(path))

    def _facts(self) -> list[Any]:
        stats = [(path, path.stat()) for path in self.files]
        return [[self.name(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def _part(self, default: text.Split | None) -> text.Split | None:
        """The setting `split` of a source of text files."""
        match self.settings.split:
            case None:
                return default
            case "train" | "heldout" as part:
                return part
        raise HmfError(f"{self.settings.key}.split: must be train or heldout for text, not {self.settings.split}")

    def _find(self, path: Path) -> None:
        settings, key = self.settings, self.settings.key
        is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        if settings.format == "saved" or (settings.format is None and is_saved):
            if not is_saved:
                raise HmfError(
                    f"{key}.path: {path}: is not a folder written by datasets.save_to_disk; correct path or format"
                )
            self.format, self.root = "saved", path
            self.files = files.downloaded(sorted(path.rglob("*.arrow")))
            return
        file_set = files.find(f"{key}.path", path, settings.format)
        self.format, self.files, self.root = file_set.kind, file_set.files, file_set.root
        if self.format == "text":
            if not settings.reads_text:
                raise HmfError(
                    f"{key}.path: {path}: holds text files, but rows with fields are needed; give JSON, Parquet or CSV "
                    "files"
                )
            if getattr(settings, "text_field", None) is not None:
                raise HmfError(f"{key}.text_field: text files have no fields; leave it out")
            part = self._part(None)
            self.files = [file for file in self.files if part is None or text.split_of(self.name(file)) == part]
        elif settings.split is not None:
            raise HmfError(f"{key}.split: {self.format} files have no splits; leave it out")
        elif path.is_dir():
            self._require_one_split()

    def _require_one_split(self) -> None:
        """HmfError for a folder with files of a training split and of a held-out one, by the words in their names."""
        words = {name: _words(name) for name in map(self.name, self.files)}
        held = next((name for name in words if words[name] & _HELD_OUT), None)
        train = next((name for name in words if words[name] & _TRAIN and not words[name] & _HELD_OUT), None)
        if train and held:
            place = str(self.settings.path).rstrip("/")
            *folders, file = Path(train).parts
            split = [number for number, part in enumerate(folders, 1) if _TRAIN & _words(part)]
            word = "".join(re.findall("train", file, re.IGNORECASE)[:1])
            pattern = "/".join(folders[: split[0]]) if split else f"**/*{word}*{Path(file).suffix}"
            suffixes = {path.suffix for path in self.files}
            every = f"{place}/**/*{''.join(suffixes) if len(suffixes) == 1 else ''}"
            raise HmfError(
                f"{self.settings.key}.path: {place}: holds a training split ({train}) and a held-out one ({held}); "
                f"name the files to read, for example {place}/{pattern}, or {every} for all of them"
            )

    def _json(self, path: Path) -> Iterator[Record]:
        name = self.name(path)
        if ".json" in [suffix.lower() for suffix in path.suffixes]:
            for number, (line, size, row) in enumerate(files.objects(path), 1):
                yield Record(f"{name}:{line} object {number}", row, size)
        else:
            for number, content in files.lines(path):
                yield Record(f"{name}:{number}", content, len(content))

    def _csv(self, path: Path) -> Iterator[Record]:
        for line, row in files.table_rows(path):
            yield Record(f"{self.name(path)}:{line}", row, sum(map(len, row.values())))

    def _texts(self, path: Path) -> Iterator[Record]:
        if (content := files.read_text(path)).strip():
            yield Record(self.name(path), content, len(content))

    def _parquet(self, path: Path) -> Iterator[Record]:
        from pyarrow import parquet

        name, number = self.name(path), 0
        try:
            with parquet.ParquetFile(path) as file:
                size = path.stat().st_size // max(1, file.metadata.num_rows)
                names = file.schema_arrow.names
                if len({*names}) < len(names):
                    raise HmfError(f"{path}: two columns have the same name; rename one")
                for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
                    for at in range(batch.num_rows if batch.nbytes > files.LIMIT else 0):
                        if batch.slice(at, 1).nbytes > files.LIMIT:
                            raise HmfError(
                                f"{path}: row {number + at}: has more than {files.LIMIT >> 20} MiB; split it, or take "
                                "it out"
                            )
                    kind = pa.struct(batch.schema)
                    for row in batch.to_pylist():
                        yield Record(f"{name} row {number}", _plain(row, kind, parse_json), size)
                        number += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise HmfError(f"{path}: row {number}: not readable Parquet ({why:.200})") from None

    def _rows(self) -> Iterator[Record]:
        import datasets

        datasets.disable_progress_bars()
        settings = self.settings
        place = settings.dataset or settings.path
        with _reading(str(place)):
            builder = None
            if self.format == "saved":
                rows: Any = datasets.load_from_disk(str(self.root))
            else:
                if self.files:
                    builder = datasets.load_dataset_builder(str(settings.dataset), settings.subset)
                rows = datasets.load_dataset(
                    str(settings.dataset), settings.subset, revision=settings.revision, streaming=True
                )
            if isinstance(rows, dict):
                split = settings.split or "train"
                if split not in rows:
                    raise HmfError(f"{settings.key}.split: {unknown_name('split', split, rows)}")
                rows = rows[split]
            elif settings.split is not None:
                raise HmfError(f"{settings.key}.split: {place} has no splits; leave it out")
        # The library gives all values of a field one type: it writes texts in quotes if a later file has lists, too.
        if builder is not None and builder.name in ("json", "csv"):
            paths = [Path(file) for file in builder.config.data_files[split]]
            if all(map(files.kind_of, paths)) and not _options(builder.config, paths):  # no archives
                read = self._json if builder.name == "json" else self._csv
                for path in paths:
                    yield from read(self.root / os.path.relpath(path, os.path.abspath(self.root)))
                return
        with _reading(str(place)):
            kind = pa.struct(rows.features.arrow_schema) if rows.features else None
            for number, row in enumerate(rows):
                yield Record(f"{place} row {number}", _plain(row, kind), 0)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn the errors of the datasets library, which lets through those of decoders and archives, into an HmfError."""
    try:
        yield
    except HmfError:
        raise
    except Exception as error:
        raise HmfError(f"{place}: the datasets library cannot read it ({' '.join(str(error).split())})") from None


def _options(config: Any, paths: list[Path]) -> set[str]:
    """The options of reading, such as another separator, that a data set's README gives to the datasets library."""
    tabs = all(".tsv" in path.suffixes for path in paths)
    default = vars(type(config)(**({"sep": "\t"} if tabs else {})))
    changed = {name for name, value in vars(config).items() if value != default.get(name)}
    return changed - {"name", "version", "description", "data_dir", "data_files"}


def _words(name: str) -> set[str]:
    """The words of a file's name in lower case, without an ending as in trainset, testData and tests."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    return {re.sub("(?:set|data|split|s)$", "", word.lower()) for word in words}


def _batch_size(facts: Any) -> int:
    """Number of rows of a Parquet file to read at once, such that they fit into memory even if one row holds it all."""
    groups = (facts.row_group(number) for number in range(facts.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    largest = max((column.total_uncompressed_size for column in columns), default=1)
    return max(1, min(256, 4 * files.LIMIT // max(1, largest)))


def content(record: Record, settings: SourceSettings) -> str | Conversation:
    """The text or conversation of a record.

    Raises:
        HmfError: it is not a JSON object; a field is missing, or belongs to the conversation and would be ignored; or
            the conversation is not valid.
    """
    if isinstance(record.value, str):
        return record.value
    row = _row(record.value)
    if settings.chat:
        return formats.conversation(row, settings)
    field = settings.field
    if field not in row:
        raise formats.missing(row, field, "set text_field, messages_field or shape")
    value = row[field]
    if not isinstance(value, str):
        fix = "; set messages_field or shape to read conversations" if isinstance(value, list) else ""
        raise HmfError(f"field {field!r} holds {formats.kind_of(value)} instead of text{fix}")
    require_text(value, field)
    unread_fields({name: x for name, x in row.items() if name not in settings.ignore_fields}, {field}, settings)
    return value


def pair_of(record: Record, settings: PairSettings) -> Pair:
    """The pair of a record. Errors are those of `content`."""
    assert not isinstance(record.value, str)  # pairs are never read from text
    return formats.pair(_row(record.value), settings)


def digest(records: Iterable[Record]) -> str:
    """A hash of the records' contents and places."""
    sha = hashlib.sha256()
    for record in records:
        value = record.value
        sha.update(repr((record.where, value if isinstance(value, bytes) else None)).encode())
        if not isinstance(value, bytes):
            sha.update(json.dumps(value, default=repr).encode())
    return sha.hexdigest()


def _row(value: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        row = parse_json(files.decoded(value.rstrip(b"\r\n")))
    except json.JSONDecodeError as error:
        place = f"at character {error.pos + 1}" if error.pos < len(error.doc) else "at the end of the line"
        several = error.doc.lstrip().startswith("[") or error.doc.strip() == "{"
        fix = "rename the file to .json, since it holds an array or objects of several lines"
        raise HmfError(
            f"not valid JSON ({error.msg} {place}); {fix if several else 'each line must be a JSON object'}"
        ) from None
    except ValueError as error:
        raise HmfError(f"not valid JSON ({error})") from None
    if not isinstance(row, dict):
        fix = "; rename the file to .json, since it holds an array" if isinstance(row, list) else ""
        raise HmfError(f"a JSON object is expected, not {formats.kind_of(row)}{fix}")
    return row


def _plain(value: Any, kind: pa.DataType | None, parse: Callable[[str], Any] = lambda value: value) -> Any:
    """A value of a table without null fields, which tables add for fields that only other rows have.

    kind: its type in Arrow, if known. A value of the type JSON keeps its nulls.
    parse: reads a value of the type JSON.
    """
    if value is None:
        return None
    if getattr(kind, "extension_name", None) == "arrow.json":
        return parse(value)
    if isinstance(value, dict):
        fields = {field.name: field.type for field in kind} if isinstance(kind, pa.StructType) else {}
        return {name: _plain(item, fields.get(name), parse) for name, item in value.items() if item is not None}
    item_kind = getattr(kind, "value_type", None)
    return [_plain(item, item_kind, parse) for item in value] if isinstance(value, list) else value
