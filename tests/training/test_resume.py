# SPDX-License-Identifier: Apache-2.0
"""A run that is killed anywhere and started again ends like one that was not; damaged checkpoints do not count."""

import json
import shutil
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer

from hmf.errors import HmfError
from hmf.folders import claimed
from hmf.model.checkpoint import new_directory
from hmf.training import checkpoints
from hmf.training.checkpoints import MANIFEST, UNPUBLISHED, newest_valid, problem, publish, published, rotate
from hmf.training.distill import distill
from tests.training import cutting


@pytest.fixture(scope="module")
def stage0(tmp_path_factory):
    return cutting.make_tiny_stage0(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def finished(stage0, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished")
    distill(stage0, run, cutting.settings(stage0))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """That run before its result was saved: checkpoints 2 and 3 are there."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


@pytest.mark.slow
def test_resuming_from_every_state_of_the_folder_ends_bit_for_bit_the_same(stage0, finished, tmp_path, capfd):
    states, original = tmp_path / "states", tmp_path / "run"
    recorder = cutting.start(cutting.record_states, stage0, original, states)
    recorder.join()
    assert recorder.exitcode == 0 and cutting.same(original, finished)
    found = sorted(states.iterdir())
    assert len(found) > 40
    first_steps = set()
    for number, state in enumerate(found):
        last = newest_valid(state / "checkpoints", 1)
        step = int(last.name.partition("-")[2]) if last else 0
        if step in (0, 1) and (state / "checkpoints").exists() and number % 3:
            continue  # the first two checkpoints come about like the third
        if not (state / "stage1").exists():
            distill(stage0, state, cutting.settings(stage0))
        first_steps.add(step)
        assert cutting.same(state, finished), state.name
        assert not list(state.glob(".stage1.*")) and not (state / "checkpoints" / UNPUBLISHED).exists()
        shutil.rmtree(state)
    assert first_steps == {0, 1, 2, 3}
    capfd.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("touch", [8, 25, 40])
def test_a_killed_process_can_be_started_again(stage0, finished, tmp_path, touch):
    killed = cutting.start(cutting.train, stage0, tmp_path / "run", touch)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    distill(stage0, tmp_path / "run", cutting.settings(stage0))
    assert cutting.same(tmp_path / "run", finished)


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_the_same(stage0, finished, tmp_path):
    whole = tmp_path / "whole"
    assert cutting.train_on_two(stage0, whole) == [0, 0]
    assert not cutting.same(whole, finished)  # two processes read twice the rows
    for rank, touch in ((0, 12), (0, 34), (1, 2)):
        run = tmp_path / f"run{rank}-{touch}"
        codes = cutting.train_on_two(stage0, run, (rank, touch))
        assert codes[rank] == -signal.SIGKILL and not (run / "stage1").exists()
        assert cutting.train_on_two(stage0, run) == [0, 0]
        assert cutting.same(run, whole)
    shutil.rmtree(whole / "stage1")
    with pytest.raises(HmfError, match="written by 2 processes and this run has 1; start 2 processes, or"):
        distill(stage0, whole, cutting.settings(stage0))


def test_the_log_covers_the_whole_run_after_a_resume(stage0, finished, run, capfd):
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    distill(stage0, run, cutting.settings(stage0))
    assert cutting.same(run, finished)
    log = json.loads((run / "stage1.log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert log[-1]["train_loss"] == pytest.approx(sum(entry["loss"] for entry in log[:-1]) / 3)
    # one step was done in this time, not three
    assert log[-1]["train_steps_per_second"] == pytest.approx(1 / log[-1]["train_runtime"], rel=0.01)
    assert "checkpoint-2: resuming from this checkpoint" in capfd.readouterr().err


def damage_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a byte": damage_byte,
    "the end": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "all of it": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(run, damage):
    folder = run / "checkpoints"
    for file in sorted(path.name for path in (folder / "checkpoint-3").iterdir()):
        original = (folder / "checkpoint-3" / file).read_bytes()
        DAMAGE[damage](folder / "checkpoint-3" / file)
        lines = []
        assert newest_valid(folder, 1, lines.append) == folder / "checkpoint-2"
        assert len(lines) == 1 and "checkpoint-3: " in lines[0] and file in lines[0] and "skipped" in lines[0]
        (folder / "checkpoint-3" / file).write_bytes(original)
    assert newest_valid(folder, 1) == folder / "checkpoint-3"


def test_a_run_goes_on_past_a_damaged_checkpoint_and_replaces_it(stage0, finished, run, capfd):
    damage_byte(run / "checkpoints/checkpoint-3/optimizer.pt")
    distill(stage0, run, cutting.settings(stage0))
    assert cutting.same(run, finished)
    assert problem(run / "checkpoints/checkpoint-3", 1) is None
    assert "checkpoint-3: optimizer.pt is damaged" in capfd.readouterr().err


def test_the_manifest_cannot_be_edited(run):
    manifest = run / "checkpoints/checkpoint-3" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 2'))
    assert problem(manifest.parent, 2) == f"{MANIFEST} is damaged"
    for other in ("", "[]", "{}", '{"files": [], "processes": 1}'):
        manifest.write_text(other)
        assert problem(manifest.parent) == f"{MANIFEST} is damaged"


def test_rotation_keeps_the_newest_and_forgets_skipped_ones(tmp_path):
    for step in (2, 4, 10, 30):
        (tmp_path / "staged").mkdir()
        (tmp_path / "staged" / "weights").write_text(str(step))
        publish(tmp_path / "staged", tmp_path / f"checkpoint-{step}", 1)
    (tmp_path / "checkpoint-x").mkdir()
    rotate(tmp_path, tmp_path / "checkpoint-10", 2)
    assert [path.name for path in published(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    rotate(tmp_path, tmp_path / "checkpoint-10", 1)
    assert newest_valid(tmp_path) == tmp_path / "checkpoint-10" and len(published(tmp_path)) == 1


def test_a_full_disk_is_found_before_a_checkpoint_is_written(stage0, finished, tmp_path, run, monkeypatch):
    def full(path):
        return SimpleNamespace(free=10**5)

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", full)
    with pytest.raises(
        HmfError, match=r"needs about 0\.00\d* GB of disk space, and 0\.0001 GB are free; free some space"
    ):
        distill(stage0, tmp_path / "new", cutting.settings(stage0))  # before the first step
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    with pytest.raises(
        HmfError, match=r"checkpoint-3: not written: .* needs about .* GB of disk space, and 0\.0001 GB are free"
    ):
        distill(stage0, run, cutting.settings(stage0))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    distill(stage0, run, cutting.settings(stage0))
    assert cutting.same(run, finished)


def test_the_size_of_a_checkpoint_is_known_beforehand(stage0, finished):
    from hmf.model.checkpoint import load_model
    from hmf.priming.objectives import train_only_mixers

    model = load_model(stage0, dtype=torch.float32)
    train_only_mixers(model)
    written = sum(path.stat().st_size for path in (finished / "checkpoints/checkpoint-3").iterdir())
    assert 0 <= checkpoints.checkpoint_bytes(model, None) - written < checkpoints.SLACK


def test_a_write_that_fails_halfway_is_one_line_and_leaves_the_checkpoint_before(stage0, finished, run, monkeypatch):
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    real = torch.save

    def fail(content, path, *args, **kwargs):
        real(content, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt"):
            cutting.halve(path if hasattr(path, "stat") else type(run)(path))
            raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer.torch, "save", fail)
        with pytest.raises(HmfError, match="checkpoint-3: not written: .*No space left on device") as caught:
            distill(stage0, run, cutting.settings(stage0))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]
    distill(stage0, run, cutting.settings(stage0))
    assert cutting.same(run, finished)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 640 KiB: two checkpoints fit, a third does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(stage0, finished, small_disk, tmp_path, monkeypatch):
    with pytest.raises(HmfError, match=r"needs about 0\.00\d* GB of disk space, and 0\.000655 GB are free"):
        distill(stage0, small_disk, cutting.settings(stage0))
    monkeypatch.setattr(checkpoints, "require_room", lambda *args: None)  # as if it had been free a moment ago
    with pytest.raises(HmfError, match="checkpoint-3: not written: ") as caught:
        distill(stage0, small_disk, cutting.settings(stage0))
    assert "\n" not in str(caught.value)
    assert [path.name for path in published(small_disk / "checkpoints")] == ["checkpoint-1", "checkpoint-2"]
    shutil.copytree(small_disk, tmp_path / "larger")
    distill(stage0, tmp_path / "larger", cutting.settings(stage0))
    assert cutting.same(tmp_path / "larger", finished)


def test_a_killed_process_leaves_nothing_in_the_way_of_the_next(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "recipe.yaml.part").write_text("base: tea")  # killed while it claimed the folder
    (output / ".running").write_text("process 7 on another machine\n")
    with claimed(output, "base: teacher"):
        assert (output / "recipe.yaml").read_text() == "base: teacher"
        (output / "stage1.log.json").touch()
    assert sorted(path.name for path in output.iterdir()) == ["recipe.yaml", "stage1.log.json"]
    for name in (".stage0.ab12cd_9", ".stage0.x.ab12cd_9"):
        (output / name).mkdir()
    with new_directory(output / "stage0") as folder:
        (folder / "weights").touch()
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == [".stage0.x.ab12cd_9", "stage0"]


def test_a_run_goes_on_with_the_data_that_it_began_with_alone(stage0, finished, run):
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    corpus = run / "corpus"
    shutil.copytree(stage0.parent / "corpus", corpus)
    settings = cutting.settings(stage0)
    moved = settings.model_copy(update={"data": settings.data.model_copy(update={"text": str(corpus)})})
    (corpus / "0.txt").write_text((corpus / "0.txt").read_text().replace("3", "4", 1))
    with pytest.raises(HmfError, match="checkpoints: the data changed since the run began"):
        distill(stage0, run, moved)
    shutil.copy(stage0.parent / "corpus/0.txt", corpus / "0.txt")
    distill(stage0, run, moved)  # the same texts elsewhere are the same data
    assert cutting.same(run, finished)
