# SPDX-License-Identifier: Apache-2.0
"""A run folder with something damaged in it: the same command again does that part anew, or says what to do."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.campaign import call, examples
from tests.faults.damage import damage_file, damage_folder

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def primed(models, tmp_path_factory):
    """A folder with the recipe of `hmf prime`, whose output is the folder beside it, and that output."""
    home = tmp_path_factory.mktemp("primed")
    (home / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "base": str(models / "base"),
                "output": "run",
                "hybrid": {"pattern": "*-GDN"},
                "distill": {
                    "data": {"text": str(models / "corpus"), "sequence_length": 32},
                    "training": {"max_steps": 2, "per_device_train_batch_size": 1, "save_steps": 1},
                },
                "evaluate": {"tasks": [], "length": 96, "text_bytes": 300},
            }
        )
    )
    with contextlib.chdir(home):
        assert call("prime", "recipe.yaml").code == 0
    return home


@pytest.mark.timeout(3600)
def test_damaged(primed, models, campaign):
    @examples(20)
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as folder:
            home = shutil.copytree(primed, Path(folder) / "home")
            run = home / "run"
            gone = ["model", "stage1", "scores.primed.json", "checkpoints/checkpoint-2"]  # from where it is to go on
            for name in gone[: data.draw(st.integers(0, len(gone)))]:
                shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
            files = sorted(item for item in run.rglob("*") if item.is_file())
            act = data.draw(st.sampled_from([damage_file, damage_file, damage_folder]))
            place = data.draw(st.sampled_from(files if act is damage_file else sorted({file.parent for file in files})))
            done = f"{place.relative_to(run).parent}: {act(data.draw, place)}"
            with contextlib.chdir(home):
                campaign.run("prime", "recipe.yaml", inputs=models, damage=done)

    attempt()
