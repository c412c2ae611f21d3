# SPDX-License-Identifier: Apache-2.0
"""The documents: links and anchors lead somewhere, and what is generated is up to date."""

import importlib
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from hmf.cli import app
from tests.conftest import ROOT
from tools import architecture, recipe_keys

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md")])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere in this repository."""
    found = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (name and not path.is_relative_to(ROOT)):
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(path):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors(page):
    assert not broken(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](#one-thing) [b](#another) [c](none.md)\n```\n[d](in-code.md)\n```\n")
    assert broken(page) == ["#another: no such heading", "none.md: no such file"]


def commands(page: Path) -> list[list[str]]:
    """The commands of hmf in the shell blocks of a page, as arguments, without vLLM's own after `--`."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [
        re.search(r"(?:^|\s)(?:(?:\.venv/bin/)?hmf|-m hmf\.cli) ((?:data |bench )?[a-z].*)", line) for line in lines
    ]
    split = [shlex.split(match[1], comments=True) for match in found if match]
    return [words[: words.index("--")] if "--" in words else words for words in split]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_with_their_options_and_recipes(page):
    for name, *words in commands(page):
        command = typer.main.get_command(app).commands[name]
        if hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
        missing = [word for word in words if word.startswith("recipes/") and not any(ROOT.glob(word))]
        assert not unknown + missing, f"hmf {name} {' '.join(words)}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_as_make_notebook_stores_it(path):
    """Run from its first cell to its last, pieces of a stream joined, without times and paths of the machine."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        streams = [output.get("name") for output in cell["outputs"]]
        text = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert all(one is None or one != next_ for one, next_ in pairwise(streams))
        assert "execution" not in cell["metadata"]
        assert not re.search(r"(^|[\s'\"(])/(root|home|tmp|Users|usr|opt)/", text, re.MULTILINE), text


def test_the_python_api_names_what_exists():
    names = re.findall(
        r"^::: ([\w.]+)\.(\w+)$", (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert names
    assert not [f"{module}.{name}" for module, name in names if not hasattr(importlib.import_module(module), name)]


def test_every_page_of_docs_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in ROOT.glob("docs/*.md") if f" {page.name}\n" not in navigation]


def test_the_page_of_recipe_keys_is_up_to_date():
    assert recipe_keys.PAGE.read_text(encoding="utf-8") == recipe_keys.page(), "run python tools/recipe_keys.py"


def test_the_picture_of_the_packages_is_up_to_date():
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.picture(), (
        "run python tools/architecture.py"
    )


def test_the_architecture_names_every_package():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Packages") :]
    assert not [name for names in architecture.packages().values() for name in names if f"`{name}`" not in table]
