# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has: the sources of Python's standard library; or a folder of the user's own.

Whether a file is for training or held out depends on its relative path alone, so the split is the same on every
machine and on every Python version.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hmf.data import files
from hmf.errors import HmfError

Split = Literal["train", "heldout"]
STDLIB = "stdlib"
HELDOUT_PERCENT = 8
# Not everywhere (tests, tools of some distributions), not the library's own, or tables of characters rather than text.
_SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "lib2to3"}


@dataclass(frozen=True)
class Document:
    """A file's text and its path relative to the corpus."""

    path: str
    text: str


def stdlib_documents(split: Split, max_bytes: int | None = None) -> list[Document]:
    """Source files of the running Python's standard library; see `documents` for order and limit."""
    return _limited(_stdlib(sysconfig.get_paths()["stdlib"])[split], max_bytes)


def documents(source: str | Path, split: Split | None = None, max_bytes: int | None = None) -> list[Document]:
    """Documents of `"stdlib"`, or of the text files of a folder, a pattern or a file, in UTF-8 and not empty.

    The order is by a hash of the path, so that a prefix of it is a fair sample. A single file is not split: it is all
    that there is. Files that are not text are named on stderr.

    Args:
        split: "train", "heldout", or None for all.
        max_bytes: stop after this many UTF-8 bytes; the last document is cut there.
    Raises:
        HmfError: nothing to read, or a text file that is not UTF-8; names the file.
    """
    if source == STDLIB:
        if split is None:
            return [*stdlib_documents("train", max_bytes), *stdlib_documents("heldout", max_bytes)]
        return stdlib_documents(split, max_bytes)
    path = Path(source)
    found = files.find("text", path, None if path.is_file() and files.kind_of(path) else "text")
    if found.kind != "text":
        raise HmfError(f"text: {path}: holds {found.kind} files; make rows of them with `hmf data prepare`")
    read = [(file.relative_to(found.root).as_posix(), files.read_text(file)) for file in found.files]
    there = _ordered(Document(name, content) for name, content in read if content.strip())
    if split is not None and not path.is_file():
        parts = [document for document in there if split_of(document.path) == split]
        if there and not parts:
            raise HmfError(f"{path}: too few files for a {split} part; add files, or give one file for each part")
        there = parts
    if not there:
        raise HmfError(
            f"{path}: no text found; give a folder or file with {'/'.join(files.TEXT_SUFFIXES)} text in UTF-8"
        )
    return _limited(there, max_bytes)


def split_of(path: str) -> Split:
    """Part of the corpus that a relative path belongs to. A module keeps its part when it becomes a package."""
    module = path.replace("\\", "/").removesuffix("/__init__.py").removesuffix(".py")
    return "heldout" if _hash(module) % 100 < HELDOUT_PERCENT else "train"


@lru_cache(maxsize=1)
def _stdlib(root: str) -> dict[str, list[Document]]:
    folder = Path(root)
    parts: dict[str, list[Document]] = {"train": [], "heldout": []}
    found = []
    for path in folder.rglob("*.py"):
        if _SKIPPED_PARTS.intersection(path.relative_to(folder).parts) or path.name.startswith("_sysconfig"):
            continue
        try:
            content = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few library files declare another encoding
            continue
        if content.strip():
            found.append(Document(path.relative_to(folder).as_posix(), content))
    for document in _ordered(found):
        parts[split_of(document.path)].append(document)
    return parts


def _ordered(found: Iterable[Document]) -> list[Document]:
    return sorted(found, key=lambda document: (_hash(document.path), document.path))


def _limited(found: list[Document], max_bytes: int | None) -> list[Document]:
    if max_bytes is None:
        return found
    kept = []
    for document in found:
        data = document.text.encode()
        if max_bytes <= 0:
            break
        text = document.text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore")
        kept.append(Document(document.path, text))
        max_bytes -= len(data)
    return kept


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
