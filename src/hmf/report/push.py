# SPDX-License-Identifier: Apache-2.0
"""The files that `hmf push` uploads to the Hub."""

from __future__ import annotations

from pathlib import Path

from hmf.errors import notice

from .card import RESULTS, Card, is_foreign
from .evidence import Evidence
from .licence import CARD


def push_files(place: Path, repo: str, gpu: str = "h200") -> dict[str, Path | bytes]:
    """The files to upload, by path in the repository: the model folder, its card, and the results behind the card.

    The card is rendered for `repo`. A README.md that hmf did not write is uploaded unchanged, without results.
    """
    evidence = Evidence.of(place)
    files: dict[str, Path | bytes] = {}
    for item in sorted(evidence.model.rglob("*")):
        name = item.relative_to(evidence.model)
        if item.is_file() and not any(part.startswith(".") for part in name.parts) and item.suffix != ".part":
            files[name.as_posix()] = item
    if is_foreign(evidence.model / CARD):
        notice(f"{evidence.model / CARD}: was not written by hmf; it is uploaded unchanged")
        return files
    files[CARD] = str(Card(evidence, gpu, repo).render()).encode()
    return files | {f"{RESULTS}/{file.name}": file for file in evidence.files}
