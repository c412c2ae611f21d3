# SPDX-License-Identifier: Apache-2.0
"""A MkDocs hook that adds pages outside docs/ to the site and rewrites the repository's relative links.

The README becomes the first page. Recipes and other files that a page links to are copied, so that every link works.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
PLACES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def place(path: str) -> str:
    """The path in the site of a file of the repository; both paths are relative, with slashes."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PLACES.get(path) or re.sub(r"(^|/)README\.md$", r"\1index.md", path)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    others = [
        *PLACES,
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "recipes").rglob("*")) if path.is_file()),
    ]
    others.append("src/hmf/assets/teacher/README.md")
    for path in others:
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = os.path.relpath(str(page.file.abs_src_path), ROOT)

    def moved(link: re.Match[str]) -> str:
        target = link[2]
        if re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        here = posixpath.dirname(page.file.src_uri)
        return f"{link[1]}{posixpath.relpath(place(path), here or '.')}{link[3] or ''}{link[4]}"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(parts))
