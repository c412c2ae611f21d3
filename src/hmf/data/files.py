# SPDX-License-Identifier: Apache-2.0
"""Files of records and texts: which of a place are read, and what they hold, compressed or not."""

from __future__ import annotations

import bz2
import codecs
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
from hmf.errors import HmfError, one_line

TEXT_SUFFIXES = (".py", ".txt", ".md")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"} | dict.fromkeys(
    TEXT_SUFFIXES, "text"
)
LIMIT = 256 << 20  # bytes of a line, an object or a text: a small compressed file can hold any number of them
CHUNK = 1 << 20
SHOWN = 3  # names of files that are not read
_SPACE = re.compile(r"[ \t\r\n]*")


def _zstd(path: Path) -> Any:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), CHUNK)


_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd, ".zstd": _zstd}


@dataclass(frozen=True)
class Found:
    """Files of one `kind`, in the order of their names below `root`."""

    root: Path
    kind: str
    files: list[Path]


def find(place: str, path: Path, kind: str | None = None) -> Found:
    """The files of a file, a folder (with the folders in it) or a pattern; those that are not read are named on stderr.

    Args:
        place: of the path in its recipe, for errors.
        kind: what is read; None: what there is, if it is of one kind. Of a folder it selects the files whose suffix
            says so, or, where there are none, those whose suffix says nothing.
    Raises:
        HmfError: nothing to read, files of several kinds, a broken link, a folder that cannot be entered.
    """
    passed: list[str] = []
    chosen = kind
    if has_magic(str(path)):
        root = Path(*takewhile(lambda part: not has_magic(part), path.parts))
        found = [Path(name) for name in glob(str(path), recursive=True)]
        if "**" not in path.parts:
            passed += [f"{folder.relative_to(root)}/" for folder in found if folder.is_dir()]
        found = [file for file in found if not file.is_dir()]
    elif path.is_dir():
        root, found = path, _below(path, passed)
        if any(kind_of(file) == kind for file in found):
            chosen = None
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        raise HmfError(
            f"{place}: {path}: {'is neither a file nor a folder' if path.exists() else 'no such file or folder'}"
        )
    kinds: dict[str, list[Path]] = {}
    for file in sorted(found, key=lambda file: file.relative_to(root).as_posix()):
        own = kind_of(file)
        if chosen is not None and (root != path or own is None):
            own = chosen
        if own is None or (kind is not None and own != kind):
            passed.append(str(file.relative_to(root)))
        elif file.is_file():
            kinds.setdefault(own, []).append(file)
        else:
            raise HmfError(f"{place}: {file}: is no file, or a link to none; take it away or put the file there")
    listed = f"{', '.join(sorted(passed)[:SHOWN])}{f' and {len(passed) - SHOWN:,} more' if passed[SHOWN:] else ''}"
    known = ", ".join(suffix for suffix in SUFFIXES if kind in (None, SUFFIXES[suffix]))
    if not kinds:
        there = f" ({listed})" if passed else ""
        raise HmfError(
            f"{place}: {path}: nothing to read{there}; files end with {known}{', or set format' * (kind is None)}"
        )
    if len(kinds) > 1:
        raise HmfError(
            f"{place}: {path}: holds {' and '.join(sorted(kinds))} files; set format to the one that is meant"
        )
    if passed:
        say_once(f"{place}: {path}: {len(passed):,} not read: {listed}")
    [(name, files)] = kinds.items()
    return Found(root, name, files)


def kind_of(path: Path) -> str | None:
    """What a file holds by its suffix, in any capitalisation, compressed or not; None: nothing that is known."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _OPEN
    kind = SUFFIXES.get("".join(suffixes[:-1][-1:] if packed else suffixes[-1:]))
    return None if packed and kind == "parquet" else kind


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _OPEN


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers, of at most LIMIT bytes each."""
    number = 0
    with _opened(path) as file, _readable(path, lambda: number + 1):
        for number, line in enumerate(iter(partial(file.readline, LIMIT + 1), b""), 1):
            if len(line) > LIMIT:
                raise HmfError(f"{path}:{number}: the line has more than {LIMIT >> 20} MiB; split it, or take it out")
            if line.strip() not in (b"", codecs.BOM_UTF8):
                yield number, line


def objects(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The objects of a JSON file, which is an array of them, or has one after the other: line, characters, object."""
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
                    f"{path}:{line}: {mark!r} where {' or '.join(allowed) or 'nothing'} is expected: a .json file "
                    "holds an array of objects, or objects one after the other"
                )
            if mark != "{":
                array, allowed, at = True, {"[": "{]", ",": "{", "]": ""}[mark], at + 1
                continue
            try:
                value, end = scan_json(text, at)
            except JSONDecodeError as error:
                # An object that ends after this part of the file looks like one that is wrong at the part's end.
                if error.msg.startswith("Unterminated string") or error.pos > len(text) - 16:
                    if len(text) - at > LIMIT:
                        raise HmfError(
                            f"{path}:{line}: the object has more than {LIMIT >> 20} MiB; take it out"
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
        raise HmfError(f"{path}:{line}: the array does not end; the file was cut off")


def read_text(path: Path) -> str:
    """All of a text file."""
    with _opened(path) as file, _readable(path):
        content = file.read(LIMIT + 1)
    if len(content) > LIMIT:
        raise HmfError(f"{path}: has more than {LIMIT >> 20} MiB; split it")
    try:
        return decoded(content).replace("\r\n", "\n").replace("\r", "\n")
    except HmfError as error:
        raise HmfError(f"{path}: {error}") from None


def decoded(content: bytes) -> str:
    """UTF-8, with or without a byte order mark; HmfError for anything else."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise HmfError("not UTF-8 but UTF-16; convert the file")
    if (place := content.find(b"\0")) >= 0:
        raise HmfError(f"not UTF-8 text (byte {place + 1} is 0); convert the file, or take it away")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HmfError(f"not UTF-8 ({error.reason} at byte {error.start + 1}); convert the file") from None


@lru_cache
def say_once(line: str) -> None:
    """A line on stderr, once however often it is asked for, and from one process of a machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(one_line(line), file=sys.stderr, flush=True)


def _below(folder: Path, passed: list[str]) -> list[Path]:
    """The files in a folder and its folders. What is hidden, and links to folders, go to `passed`."""
    found = []

    def fail(error: OSError) -> None:
        raise HmfError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=fail):
        inside = Path(parent)
        out = [name for name in folders if name.startswith(".") or (inside / name).is_symlink()]
        passed += [f"{(inside / name).relative_to(folder)}/" for name in out]
        folders[:] = [name for name in folders if name not in out]
        passed += [str((inside / name).relative_to(folder)) for name in names if name.startswith(".")]
        found += [inside / name for name in names if not name.startswith(".")]
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _readable(path), _OPEN.get(path.suffix.lower(), partial(open, mode="rb"))(path) as file:
        yield file


@contextmanager
def _readable(path: Path, line: Any = None) -> Iterator[None]:
    """Turn what libraries raise for a file that cannot be read into one line, with the `line` that was being read."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise HmfError(f"{path}{f':{line()}' if line else ''}: cannot be read ({why})") from None
