# SPDX-License-Identifier: Apache-2.0
"""The package outside its clone: the wheel's files and recipes, and the names of its extras."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The unpacked wheel of a copy of the sources, which building would write to."""
    pytest.importorskip("setuptools", minversion="77")
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "recipes"):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
        )
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(target / "unpacked")
    return target / "unpacked"


def files(folder, *patterns):
    found = {str(path.relative_to(folder)) for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    return {name for name in found if "__pycache__" not in name and not name.startswith("assets/recipes")}


def test_the_wheel_has_all_sources_the_teacher_and_the_recipes(wheel):
    assert files(wheel / "hmf", "*") == files(ROOT / "src/hmf", "*")
    brought = wheel / "hmf/assets/recipes"
    assert files(brought, "*.yaml", "config.json") == files(ROOT / "recipes", "*.yaml", "config.json") != set()
    assert {path.name for path in wheel.iterdir()} == {"hmf", f"hybrid_model_factory-{version()}.dist-info"}
    points = next(wheel.glob("*.dist-info/entry_points.txt")).read_text()
    assert "hmf = hmf.cli:main" in points and "[vllm.general_plugins]" in points


def version():
    return re.search('__version__ = "(.*)"', (ROOT / "src/hmf/__init__.py").read_text())[1]


def test_recipes_have_names_outside_the_clone(wheel, tmp_path):
    code = "from hmf.folders import find_recipe, resolve_base; import hmf; print(hmf.__file__); "
    code += "print(*map(find_recipe, ('quickstart', 'quickstart/sft', 'qwen3-8b')), resolve_base('teacher'), sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    recipes = wheel / "hmf/assets/recipes"
    assert run.stdout.split() == [
        str(path)
        for path in (
            wheel / "hmf/__init__.py",
            recipes / "quickstart/recipe.yaml",
            recipes / "quickstart/sft.yaml",
            recipes / "qwen3-8b",
            wheel / "hmf/assets/teacher",
        )
    ]


def test_extras_that_messages_and_docs_name_exist():
    texts = [*(ROOT / "src/hmf").rglob("*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "tools/install.py"]
    named = {
        name
        for path in texts
        for group in re.findall(r"""(?:hybrid-model-factory|install_package\(")\[([\w,]+)\]""", path.read_text())
        for name in group.split(",")
    }
    assert {"train", "vllm", "onpolicy"} <= named <= PROJECT["optional-dependencies"].keys()


def test_the_images_run_steps_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for names in targets for name in names.split()}
    for file in sorted((ROOT / "docker").iterdir()):
        steps = re.findall(r"^RUN make (\S+)$", file.read_text(), re.MULTILINE)
        assert steps and {*steps} <= targets
