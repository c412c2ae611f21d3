# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments: the same command again ends as if nothing had been, or says in one line what to do."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.faults.campaign import SIZE, Outcome, digest, require_promised

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

KILLS = SIZE  # of each command, at least
MOST = min(SIZE + 2, 4)  # of one run, before it may end
LONG = {"max_steps": 9, "per_device_train_batch_size": 2, "save_steps": 3}


def begin(folder: Path, arguments: tuple[str, ...]) -> None:
    """`hmf ARGUMENTS` as a process of its own has it, its output in files."""
    from hmf.cli import main

    os.setsid()
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder.parent / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["hmf", *arguments]
    main()


def run(folder: Path, *arguments: str, kill_after: float | None = None) -> Outcome:
    """The command in `folder`, killed after some seconds; None: to its end. A killed process has a negative code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hmf.cli", "hmf.training.finetune", "hmf.pipeline", "hmf.data.prepare"])
    process = context.Process(target=begin, args=(folder, arguments))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        started = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive, f"left behind: {alive}"
    texts = [(folder.parent / name).read_text() if (folder.parent / name).exists() else "" for name in ("out", "err")]
    return Outcome(process.exitcode, *texts)


def inputs(folder: Path, models: Path) -> None:
    """Recipes of every command that is killed."""
    text = {"text": str(models / "corpus"), "sequence_length": 32}
    recipes = {
        "prime": {
            "base": str(models / "base"),
            "output": "run",
            "hybrid": {"pattern": "*-GDN"},
            "distill": {"data": text, "training": LONG, "objective": {"layerwise_steps": 4, "kl": 0.5}},
            "evaluate": {"tasks": [], "length": 96, "text_bytes": 1000},
        },
        "finetune": {
            "method": "cpt",
            "model": str(models / "hybrid"),
            "output": "run",
            "data": text,
            "training": LONG,
            "trainable": {"all": 1e-3},
        },
        "data": {
            "output": "run",
            "tokenizer": str(models / "base"),
            "sequence_length": 32,
            "shard_documents": 20,
            "sources": [{"path": "texts.jsonl"}],
        },
    }
    folder.mkdir(parents=True)
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    lines = [json.dumps({"text": f"one {number} two " * 30}) + "\n" for number in range(600)]
    (folder / "texts.jsonl").write_text("".join(lines))


COMMANDS = {
    "prime": ("prime", "prime.yaml"),
    "finetune": ("finetune", "finetune.yaml"),
    "data prepare": ("data", "prepare", "data.yaml", "--workers", str(min(2, SIZE))),
    "init": ("init", "$BASE", "--pattern", "*-GDN", "--out", "run"),
    "export": ("export", "$STAGE0", "--out", "run"),
}
GOES_ON = ("prime", "finetune", "data prepare")


def result(folder: Path, command: str) -> dict[str, str]:
    """Hashes of what the command is for: weights and rows, not logs that hold times."""
    wanted = ("rows/", "index.json") if command == "data prepare" else ("model.safetensors", "config.json")
    found = {name.removeprefix(f"{folder / 'run'}/"): value for name, value in digest(folder / "run").items()}
    return {
        name: value
        for name, value in found.items()
        if any(part in name for part in wanted) and not name.startswith("checkpoints")
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_killed(command, models, campaign, tmp_path):
    places = {"$BASE": str(models / "base"), "$STAGE0": str(models / "stage0")}
    arguments = tuple(places.get(part, part) for part in COMMANDS[command])
    rng = random.Random(command if SIZE == 1 else None)
    whole = tmp_path / "whole/folder"
    inputs(whole, models)
    run(whole, "--version")  # the fork server imports
    start = time.monotonic()
    ended = run(whole, *arguments)
    took = time.monotonic() - start
    assert ended.code == 0, ended.err
    wanted = result(whole, command)
    assert wanted
    kills = 0
    while kills < KILLS:
        folder = tmp_path / f"{kills}/folder"
        inputs(folder, models)
        before = digest(models, *folder.iterdir())
        for attempt in range(MOST):
            ended = run(folder, *arguments, kill_after=rng.uniform(0, took) if attempt + 1 < MOST else None)
            if ended.code >= 0:
                break
            kills += 1
            campaign.count(f"{command}: kills")
        require_promised(ended, trains=True)
        if command in GOES_ON or ended.code == 0:
            assert ended.code == 0, ended.err
            assert result(folder, command) == wanted
            campaign.count(f"{command}: ends after kills with the same bits")
        else:  # it was killed after its folder had got its name
            assert "holds other files; choose another output or remove it first" in ended.err
            assert result(folder, command) == wanted
            campaign.count(f"{command}: found complete after a kill")
        left = {item.name for item in folder.iterdir()} - {item.name for item in whole.iterdir()}
        assert not left, left
        now = digest(models, *folder.iterdir())
        assert {name: now[name] for name in before} == before
        shutil.rmtree(folder)
