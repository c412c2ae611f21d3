# SPDX-License-Identifier: Apache-2.0
"""Text for training and evaluation: the source files of Python's standard library, or the user's own files.

The split into training and held-out files depends only on their relative paths, so it is the same on every machine and
with every Python version.
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
# Excluded: parts that some distributions do not have, packages outside the standard library, and character tables.
_SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "lib2to3"}


@dataclass(frozen=True)
class Document:
    """The text of a file, and its path relative to the corpus."""

    path: str
    text: str


def stdlib_documents(split: Split, max_bytes: int | None = None) -> list[Document]:
    """Source files of the running Python's standard library; see `documents` for order and limit."""
    return _limited(_stdlib(sysconfig.get_paths()["stdlib"])[split], max_bytes)


def documents(source: str | Path, split: Split | None = None, max_bytes: int | None = None) -> list[Document]:
    """Documents of `"stdlib"`, or of the UTF-8 text files at a path: a folder, a pattern or a file.

    Empty files are left out. The order is by a hash of the path, so that the first documents are a representative
    sample. A single file is not split. Files that are not text are skipped and named on stderr.

    Args:
        split: "train", "heldout", or None for all.
        max_bytes: stop after this many UTF-8 bytes; the last document is truncated.
    Raises:
        HmfError: there is nothing to read, or a file is not UTF-8.
    """
    if source == STDLIB:
        if split is None:
            return [*stdlib_documents("train", max_bytes), *stdlib_documents("heldout", max_bytes)]
        return stdlib_documents(split, max_bytes)
    path = Path(source)
    file_set = files.find("text", path, None if path.is_file() and files.kind_of(path) else "text")
    if file_set.kind != "text":
        raise HmfError(f"text: {path}: holds {file_set.kind} files; prepare them with `hmf data prepare`")
    contents = [(file.relative_to(file_set.root).as_posix(), files.read_text(file)) for file in file_set.files]
    texts = _ordered(Document(name, content) for name, content in contents if content.strip())
    if split is not None and not path.is_file():
        part = [document for document in texts if split_of(document.path) == split]
        if texts and not part:
            raise HmfError(
                f"{path}: too few files to split off a {split} part; add files, or give a single file, which is not "
                "split"
            )
        texts = part
    if not texts:
        raise HmfError(
            f"{path}: no text found; give a folder or file with {'/'.join(files.TEXT_SUFFIXES)} text in UTF-8"
        )
    return _limited(texts, max_bytes)


def split_of(path: str) -> Split:
    """The split that a relative path belongs to. A module and a package of the same name belong to the same split."""
    module = path.replace("\\", "/").removesuffix("/__init__.py").removesuffix(".py")
    return "heldout" if _hash(module) % 100 < HELDOUT_PERCENT else "train"


@lru_cache(maxsize=1)
def _stdlib(root: str) -> dict[str, list[Document]]:
    folder = Path(root)
    parts: dict[str, list[Document]] = {"train": [], "heldout": []}
    library = []
    for path in folder.rglob("*.py"):
        if _SKIPPED_PARTS.intersection(path.relative_to(folder).parts) or path.name.startswith("_sysconfig"):
            continue
        try:
            content = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few library files declare another encoding
            continue
        if content.strip():
            library.append(Document(path.relative_to(folder).as_posix(), content))
    for document in _ordered(library):
        parts[split_of(document.path)].append(document)
    return parts


def _ordered(texts: Iterable[Document]) -> list[Document]:
    return sorted(texts, key=lambda document: (_hash(document.path), document.path))


def _limited(texts: list[Document], max_bytes: int | None) -> list[Document]:
    if max_bytes is None:
        return texts
    kept = []
    for document in texts:
        data = document.text.encode()
        if max_bytes <= 0:
            break
        text = document.text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore")
        kept.append(Document(document.path, text))
        max_bytes -= len(data)
    return kept


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
