# SPDX-License-Identifier: Apache-2.0
"""Finding and reading files of records and texts, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from glob import glob, has_magic
from itertools import takewhile
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from hmf.config.strict import scan_json
from hmf.errors import HmfError, listed, one_line
from hmf.folders import require_downloaded

TEXT_SUFFIXES = (".py", ".txt", ".md")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
} | dict.fromkeys(TEXT_SUFFIXES, "text")
LIMIT = 256 << 20  # largest size in bytes of a line, object or text; a small compressed file can expand to any size
CHUNK = 1 << 20
SHOWN = 3  # number of skipped files that a message names
_SPACE = re.compile(r"[ \t\r\n]*")


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), CHUNK)


_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd, ".zstd": _zstd}


@dataclass(frozen=True)
class FileSet:
    """Files of one `kind`, sorted by their paths relative to `root`."""

    root: Path
    kind: str
    files: list[Path]


def find(place: str, path: Path, kind: str | None = None) -> FileSet:
    """The files at a path: a file, a folder (searched recursively) or a pattern. Skipped files are named on stderr.

    Args:
        place: key of the path in its recipe, for errors.
        kind: kind of files to read; None if all files are of one kind. In a folder, it selects the files whose suffix
            means that kind. If there are none, it selects the files whose suffix is not known.
    Raises:
        HmfError: there is nothing to read, or there are files of several kinds, a broken link, or a folder that cannot
            be read.
    """
    skipped: list[str] = []
    root, candidates = _candidates(place, path, skipped)
    assumed_kind = kind  # of files whose suffix is not known
    if root == path and any(kind_of(file) == kind for file in candidates):
        assumed_kind = None
    kinds: dict[str, list[Path]] = {}
    for file in sorted(candidates, key=lambda file: file.relative_to(root).as_posix()):
        file_kind = kind_of(file)
        if assumed_kind is not None and (root != path or file_kind is None):
            file_kind = assumed_kind
        if file_kind is None or (kind is not None and file_kind != kind):
            skipped.append(str(file.relative_to(root)))
        elif file.is_file():
            kinds.setdefault(file_kind, []).append(file)
        else:
            raise HmfError(
                f"{place}: {file}: is not a regular file, or is a broken link; remove it or restore the file"
            )
    shown = listed(sorted(skipped), SHOWN)
    known = ", ".join(suffix for suffix in SUFFIXES if kind in (None, SUFFIXES[suffix]))
    if not kinds:
        names = f" ({shown})" if skipped else ""
        raise HmfError(
            f"{place}: {path}: nothing to read{names}; use files that end with "
            f"{known}{', or set format' * (kind is None)}"
        )
    if len(kinds) > 1:
        raise HmfError(f"{place}: {path}: holds {' and '.join(sorted(kinds))} files; set format to the one to read")
    if skipped:
        say_once(f"{place}: {path}: not read: {shown}")
    [(name, files)] = kinds.items()
    return FileSet(root, name, downloaded(files))


def downloaded(files: list[Path]) -> list[Path]:
    """The files. HmfError if Git LFS has not downloaded one of them."""
    for file in files:
        with _readable(file):
            require_downloaded(file)
    return files


def _candidates(place: str, path: Path, skipped: list[str]) -> tuple[Path, list[Path]]:
    """The folder that names are relative to (`path` itself if it is one), and the files at a path.

    Folders that are not searched are added to `skipped`.
    """
    if has_magic(str(path)) and not path.exists():  # names of files and folders may have brackets too
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        found = [Path(name) for name in glob(str(path), recursive=True)]
        if "**" not in path.parts:
            skipped += [f"{folder.relative_to(root)}/" for folder in found if folder.is_dir()]
        return root, [file for file in found if not file.is_dir()]
    if path.is_dir():
        return path, _files_below(path, skipped)
    if path.is_file():
        return path.parent, [path]
    raise HmfError(
        f"{place}: {path}: {'is neither a file nor a folder' if path.exists() else 'no such file or folder'}"
    )


def kind_of(path: Path) -> str | None:
    """The kind of a file by its suffix, in any capitalisation, compressed or not. None for an unknown suffix."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _OPEN
    kind = SUFFIXES.get("".join(suffixes[:-1][-1:] if packed else suffixes[-1:]))
    return None if packed and kind == "parquet" else kind


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _OPEN


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    with _opened(path) as file, _readable(path, lambda: number + 1):
        for number, line in enumerate(iter(partial(file.readline, LIMIT + 1), b""), 1):
            if len(line) > LIMIT:
                raise HmfError(f"{path}:{number}: the line has more than {LIMIT >> 20} MiB; split it or remove it")
            if line.strip() not in (b"", codecs.BOM_UTF8):
                yield number, line


def objects(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The objects of a JSON file, which holds an array of objects, or objects one after the other.

    Yields:
        (number of the line where the object starts, its length in characters, the object)
    """
    line, array, allowed, text, at = 1, False, "[{", "", 0
    with _opened(path) as file, _readable(path, lambda: line):
        stream = io.TextIOWrapper(file, encoding="utf-8-sig")
        while True:
            start = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            line += text.count("\n", at, start)
            at = start
            if at == len(text):
                if text := stream.read(CHUNK):
                    at = 0
                    continue
                break
            mark = text[at]
            if mark not in allowed:
                raise HmfError(
                    f"{path}:{line}: {mark!r} is not valid here, where {' or '.join(allowed) or 'the end'} is "
                    "expected: write an array of objects, or objects one after the other"
                )
            if mark != "{":
                array, allowed, at = True, {"[": "{]", ",": "{", "]": ""}[mark], at + 1
                continue
            try:
                value, end = scan_json(text, at)
            except JSONDecodeError as error:
                # If the object continues after this part of the file, it looks invalid at the end of the part.
                if error.msg.startswith("Unterminated string") or error.pos > len(text) - 16:
                    if len(text) - at > LIMIT:
                        raise HmfError(
                            f"{path}:{line}: the object has more than {LIMIT >> 20} MiB; remove it"
                        ) from None
                    if more := stream.read(max(CHUNK, len(text) - at)):
                        text, at = text[at:] + more, 0
                        continue
                line += text.count("\n", at, error.pos)
                raise HmfError(f"{path}:{line}: not valid JSON ({error.msg})") from None
            except ValueError as error:
                raise HmfError(f"{path}:{line}: not valid JSON ({error})") from None
            yield line, end - at, value
            line += text.count("\n", at, end)
            at, allowed = end, ",]" if array else "{"
    if array and allowed:
        raise HmfError(f"{path}:{line}: the array does not end, so the file is incomplete; copy it again")


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file, whose first line names the columns; of a TSV file, with tabs between the cells.

    All values are texts, as they are in the file.

    Yields:
        (number of the row's first line, the row)
    """
    csv.field_size_limit(LIMIT)
    tabs, line = ".tsv" in [suffix.lower() for suffix in path.suffixes], 1
    with _opened(path) as file, _readable(path, lambda: line):
        stream = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.DictReader(stream, delimiter="\t" if tabs else ",", strict=True)
        try:
            names = reader.fieldnames or []
            if twice := [name for name in names if names.count(name) > 1]:
                raise HmfError(f"{path}:1: two columns have the name {twice[0]!r}; rename one")
            for row in reader:
                line = reader.line_num - sum(cell.count("\n") for cell in row.values() if isinstance(cell, str))
                if None in row or None in row.values():
                    raise HmfError(
                        f"{path}:{line}: the row does not have {len(names)} cells, as the first line has; quote cells "
                        "with commas or line breaks"
                    )
                yield line, row
        except csv.Error as error:
            raise HmfError(f"{path}:{reader.reader.line_num}: not valid CSV ({error})") from None


def read_text(path: Path) -> str:
    """The content of a text file, with line ends as \\n."""
    with _opened(path) as file, _readable(path):
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise HmfError(f"{path}: has more than {LIMIT >> 20} MiB; split it")
    try:
        return decoded(content).replace("\r\n", "\n").replace("\r", "\n")
    except HmfError as error:
        raise HmfError(f"{path}: {error}") from None


def decoded(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark. HmfError for any other encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise HmfError("encoded in UTF-16; convert the file to UTF-8")
    if content.startswith(b"\x1f\x8b"):
        raise HmfError("compressed with gzip; add .gz to the file's name")
    if (place := content.find(b"\0")) >= 0:
        raise HmfError(f"not UTF-8 text (byte {place + 1} is 0); convert the file to UTF-8 or remove it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HmfError(f"not UTF-8 ({error.reason} at byte {error.start + 1}); convert the file to UTF-8") from None


@lru_cache
def say_once(line: str) -> None:
    """Print a notice on stderr. Each one is printed once per process, and by one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"hmf: {one_line(line)}", file=sys.stderr, flush=True)


def _files_below(folder: Path, skipped: list[str]) -> list[Path]:
    """The files in a folder and its subfolders. Hidden ones and links to folders are added to `skipped` instead."""
    files = []

    def fail(error: OSError) -> None:
        raise HmfError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=fail):
        inside = Path(parent)
        excluded = [name for name in folders if name.startswith(".") or (inside / name).is_symlink()]
        skipped += [f"{(inside / name).relative_to(folder)}/" for name in excluded]
        folders[:] = [name for name in folders if name not in excluded]
        skipped += [str((inside / name).relative_to(folder)) for name in names if name.startswith(".")]
        files += [inside / name for name in names if not name.startswith(".")]
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if is_compressed(path) and path.stat().st_size == 0:  # libraries take it for the end of an empty file
        raise HmfError(f"{path}: has 0 bytes, so it is not complete; copy it again or remove it")
    with _readable(path), _OPEN.get(path.suffix.lower(), partial(open, mode="rb"))(path) as file:
        yield file


@contextmanager
def _readable(path: Path, line: Any = None) -> Iterator[None]:
    """Turn the errors of libraries for an unreadable file into an HmfError that names the file and the line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise HmfError(f"{path}{f':{line()}' if line else ''}: cannot be read ({why})") from None
