# SPDX-License-Identifier: Apache-2.0
"""Conventions of this repository that no linter checks."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hmf

ROOT = Path(__file__).resolve().parent.parent
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".sh", ".jinja", ""}


@pytest.fixture(scope="module")
def tracked() -> dict[str, str]:
    """Path and content of every tracked text file that still exists."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.split("\0") if name]
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in paths
        if path.suffix in TEXT and path.is_file()
    }


def test_sources_name_their_licence(tracked):
    sources = {name: text for name, text in tracked.items() if name.endswith(".py")}
    assert "src/hmf/__init__.py" in sources
    bare = [name for name, text in sources.items() if "SPDX-License-Identifier: Apache-2.0" not in text[:200]]
    assert not bare


def test_no_file_knows_its_machine(tracked):
    # Written so that this file does not match itself.
    machine = re.compile(
        r"(?<![\w.$}-])/(work|root|opt/pypi|home/[a-z]\w*)" + r"/|(py[p]i\.org|pythonhosted[.]org|download[.]pytorch)"
    )
    found = [f"{name}: {hit.group()}" for name, text in tracked.items() for hit in machine.finditer(text)]
    assert not found


def test_installed_version_is_the_sources():
    try:
        installed = importlib.metadata.version("hybrid-model-factory")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is on the path, not installed")
    assert installed == hmf.__version__


def test_plain_import_is_light():
    heavy = ("vllm", "fla", "matplotlib", "typer", "datasets", "trl", "peft")
    code = f"import sys, hmf; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
