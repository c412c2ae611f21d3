# SPDX-License-Identifier: Apache-2.0
"""The licence of a run's base, as its card or a licence file states it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from .evidence import Evidence

CARD, NOT_STATED = "README.md", "not stated"
LICENCE_FILE = re.compile(r"(licen[cs]e|copying)([-_.].*)?", re.IGNORECASE)


def metadata_of(file: Path) -> dict[str, Any]:
    """The metadata of a card; empty if it has none, or if it cannot be read."""
    try:
        return metadata_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def licence(evidence: Evidence) -> tuple[dict[str, str], str]:
    """The licence as metadata and as a sentence, from the base's card, or else from a licence file."""
    folder = evidence.base_folder
    stated = metadata_of(folder / CARD) if folder else {}
    files = [file.name for file in sorted(evidence.model.iterdir()) if LICENCE_FILE.fullmatch(file.name)]
    where = f" The text is in [{files[0]}]({files[0]})." if files else ""
    keys = {key: str(stated[key]) for key in ("license", "license_name", "license_link") if stated.get(key)}
    if "license" in keys:
        name = keys.get("license_name", keys["license"])
        return keys, f"The base ({evidence.base_name}) states the licence {name}.{where}"
    if files:
        keys = {"license": "other", "license_name": "see-license-file", "license_link": files[0]}
        return keys, f"The licence of the base.{where}"
    return {}, f"The base's licence is {NOT_STATED}: neither its card nor a licence file states one."
