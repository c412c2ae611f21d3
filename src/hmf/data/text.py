# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has: the sources of Python's standard library; or a folder of the user's own.

Whether a file is for training or held out depends on its relative path alone, so the split is the same on every
machine and on every Python version.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hmf.errors import HmfError

Split = Literal["train", "heldout"]
STDLIB = "stdlib"
HELDOUT_PERCENT = 8
SUFFIXES = (".py", ".txt", ".md")
# Not everywhere (tests, tools of some distributions), not the library's own, or tables of characters rather than text.
_SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "lib2to3"}


@dataclass(frozen=True)
class Document:
    """A file's text and its path relative to the corpus."""

    path: str
    text: str


def stdlib_documents(split: Split, max_bytes: int | None = None) -> list[Document]:
    """Source files of the running Python's standard library; see `folder_documents` for order and errors."""
    return _limited(_stdlib(sysconfig.get_paths()["stdlib"])[split], max_bytes)


def documents(source: str | Path, split: Split | None = None, max_bytes: int | None = None) -> list[Document]:
    """Documents of `"stdlib"`, of a folder or of a file. A single file is not split: it is all that there is."""
    if source == STDLIB:
        if split is None:
            return [*stdlib_documents("train", max_bytes), *stdlib_documents("heldout", max_bytes)]
        return stdlib_documents(split, max_bytes)
    path = Path(source)
    if path.is_file():
        return _limited(_read([path], path.parent, path), max_bytes)
    return folder_documents(path, split, max_bytes)


def folder_documents(folder: str | Path, split: Split | None = None, max_bytes: int | None = None) -> list[Document]:
    """Every .py, .txt and .md file below `folder` that is UTF-8 and not empty.

    The order is by a hash of the path, so that a prefix of it is a fair sample.

    Args:
        split: "train", "heldout", or None for all.
        max_bytes: stop after this many UTF-8 bytes; the last document is cut there.
    Raises:
        HmfError: the folder is missing, or nothing in it can be used; names the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HmfError(f"{folder}: no such folder or file; give a folder of {'/'.join(SUFFIXES)} files")
    found = _read([path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()], folder, folder)
    if split is not None:
        found = [document for document in found if split_of(document.path) == split]
        if not found:
            raise HmfError(f"{folder}: too few files for a {split} part; add files, or give one file for each part")
    return _limited(found, max_bytes)


def split_of(path: str) -> Split:
    """Part of the corpus that a relative path belongs to. A module keeps its part when it becomes a package."""
    module = path.replace("\\", "/").removesuffix("/__init__.py").removesuffix(".py")
    return "heldout" if _hash(module) % 100 < HELDOUT_PERCENT else "train"


@lru_cache(maxsize=1)
def _stdlib(root: str) -> dict[str, list[Document]]:
    folder = Path(root)
    files = [
        path
        for path in folder.rglob("*.py")
        if not _SKIPPED_PARTS.intersection(path.relative_to(folder).parts) and not path.name.startswith("_sysconfig")
    ]
    parts: dict[str, list[Document]] = {"train": [], "heldout": []}
    for document in _read(files, folder, folder):
        parts[split_of(document.path)].append(document)
    return parts


def _read(files: list[Path], folder: Path, source: Path) -> list[Document]:
    read = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few library files declare another encoding
            continue
        if text.strip():
            read.append(Document(path.relative_to(folder).as_posix(), text))
    if not read:
        raise HmfError(f"{source}: no text found; give a folder or file with {'/'.join(SUFFIXES)} text in UTF-8")
    return sorted(read, key=lambda document: (_hash(document.path), document.path))


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
