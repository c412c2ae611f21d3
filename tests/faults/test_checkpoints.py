# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with something wrong in them: every command uses them as they are, or refuses them in one line."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.campaign import examples
from tests.faults.damage import damage_file, damage_folder

pytestmark = pytest.mark.faults


def recipe(home: Path, **content) -> Path:
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    return home / "recipe.yaml"


TRAINING = {"max_steps": 1, "per_device_train_batch_size": 1}
# checkpoint -> commands on it: (arguments by home of the inputs, output).
COMMANDS = {
    "base": {
        "init": lambda home, out: ("init", home / "base", "--pattern", "*-GDN", "--out", out),
        "init GKA": lambda home, out: ("init", home / "base", "--ratio", "0.5", "--mixer", "gka", "--out", out),
        "evaluate": lambda home, out: ("evaluate", home / "base", *EVALUATE),
        "plan": lambda home, out: ("plan", home / "base", "--gpu", "h100"),
        "data prepare": lambda home, out: ("data", "prepare", data_recipe(home, out), "--workers", "1"),
    },
    "stage0": {
        "export": lambda home, out: ("export", home / "stage0", "--out", out),
        "export as bfloat16": lambda home, out: ("export", home / "stage0", "--out", out, "--dtype", "bfloat16"),
        "evaluate": lambda home, out: ("evaluate", home / "stage0", *EVALUATE),
        "distill": lambda home, out: (
            "distill",
            recipe(home, model=str(home / "stage0"), output=str(out), training=TRAINING, data=text(home)),
        ),
    },
    "hybrid": {
        "evaluate": lambda home, out: ("evaluate", home / "hybrid", *EVALUATE),
        "plan": lambda home, out: ("plan", home / "hybrid", "--gpu", "h100"),
        "serve": lambda home, out: ("serve", home / "hybrid", "--dry-run"),
        "chat": lambda home, out: ("chat", home / "hybrid", "--max-new-tokens", "4"),
        "finetune": lambda home, out: (
            "finetune",
            recipe(
                home,
                method="cpt",
                model=str(home / "hybrid"),
                output=str(out),
                trainable={"all": 1e-3},
                training=TRAINING,
                data=text(home),
            ),
        ),
    },
}
COMMANDS["sharded"] = COMMANDS["base"]
EVALUATE = ("--tasks", "", "--text-bytes", "300", "--length", "96")


def text(home: Path) -> dict:
    (home / "texts").mkdir()
    (home / "texts/0.txt").write_text("one 1 two 2 three 3 " * 9)
    return {"text": str(home / "texts"), "sequence_length": 32}


def data_recipe(home: Path, out: Path) -> Path:
    text(home)
    return recipe(
        home, output=str(out), tokenizer=str(home / "base"), sequence_length=32, sources=[{"path": str(home / "texts")}]
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("damage", [damage_file, damage_folder])
@pytest.mark.parametrize("kind", sorted(COMMANDS))
def test_damaged(kind, damage, models, campaign):
    @examples(30 if damage is damage_file else 10)
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as folder:
            home, outputs = Path(folder) / "in", Path(folder) / "out"
            outputs.mkdir()
            name = "base" if kind == "sharded" else kind
            shutil.copytree(models / kind, home / name)
            command = data.draw(st.sampled_from(sorted(COMMANDS[kind])))
            if damage is damage_file:
                files = sorted(file for file in (home / name).iterdir() if file.is_file())
                config = [home / name / "config.json"] * 3  # most of what can be meant is there
                done = damage_file(data.draw, data.draw(st.sampled_from(config + files)))
            else:
                done = damage_folder(data.draw, home / name)
            arguments = COMMANDS[kind][command](home, outputs / "result")
            campaign.run(*arguments, inputs=home, output=outputs / "result", damage=done)

    attempt()


@pytest.mark.parametrize(
    ("kind", "command", "file", "change"),
    [
        ("hybrid", "finetune", "generation_config.json", {"output_hidden_states": True}),
        ("stage0", "export as bfloat16", "config.json", {"dtype": 1.5e273}),
    ],
)
def test_found(kind, command, file, change, models, campaign, tmp_path):
    home, output = tmp_path / "in", tmp_path / "out/result"
    shutil.copytree(models / kind, home / kind)
    output.parent.mkdir()
    content = json.loads((home / kind / file).read_text())
    (home / kind / file).write_text(json.dumps(content | change))
    campaign.run(*COMMANDS[kind][command](home, output), inputs=home, output=output, damage=str(change))
