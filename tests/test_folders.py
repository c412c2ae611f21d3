# SPDX-License-Identifier: Apache-2.0
"""Whose an output folder is: one recipe's at a time, and one process's."""

import os
import signal
import subprocess
import sys

import pytest

from hmf.errors import HmfError
from hmf.folders import claimed, locked, require_unused


def test_a_second_process_is_refused_by_the_first_ones_name_until_it_is_killed(tmp_path):
    output = tmp_path / "run"
    code = f"import time\nfrom hmf.folders import *\nwith claimed(Path({str(output)!r}), 'a'): print(1, flush=True)"
    code += "; time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    for recipe in ("a", "another"):
        with (
            pytest.raises(HmfError, match=rf"run: process {holder.pid} on \S+ is using this folder"),
            claimed(output, recipe),
        ):
            pass
    holder.kill()
    holder.communicate()
    with claimed(output, "a"):
        assert f"process {os.getpid()} " in (output / ".running").read_text()
    assert (output / "recipe.yaml").read_text() == "a" and not (output / ".running").exists()


def test_processes_of_a_killed_process_do_not_hold_its_folder(tmp_path):
    """Such as those that load data, which notice seconds later that they have lost their parent."""
    with locked(tmp_path / "run"):
        child = os.fork()
        if not child:
            signal.pause()
            os._exit(0)
    try:
        with locked(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def fail_in(output, recipe):
    with claimed(output, recipe):
        (output / "checkpoints").mkdir(exist_ok=True)  # as the Trainer does
        raise ZeroDivisionError


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_in(tmp_path / "run", "wrong")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_has_not_trained_can_be_corrected(tmp_path):
    output = tmp_path / "run"
    with claimed(output, "wrong"):
        (output / "stage0").mkdir()
        (output / "stage0/weights").touch()
    (output / ".stage0.ab12cd_9").mkdir()
    with pytest.raises(ZeroDivisionError):
        fail_in(output, "wrong")
    with claimed(output, "right"):
        assert not (output / "stage0").exists()
        (output / "stage1.log.json").touch()
    with pytest.raises(HmfError, match="was started with another recipe"), claimed(output, "third"):
        pass
    with claimed(output, "right"):
        pass
    assert sorted(path.name for path in output.iterdir()) == [
        ".stage0.ab12cd_9",
        "checkpoints",
        "recipe.yaml",
        "stage1.log.json",
    ]


def test_other_things_in_the_way(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    for name, what in (("file", "is a file"), ("mine", "holds other files")):
        with pytest.raises(HmfError, match=f"{name}: {what}; choose another"), claimed(tmp_path / name, "a"):
            pass
        with pytest.raises(HmfError, match=f"{name}: {what}; choose another"):
            require_unused(tmp_path / name)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(HmfError, match="cannot be created.*file/run"), locked(tmp_path / "file/run"):
        pass


def test_a_recipe_that_is_no_text_is_another_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("base: teacher".encode("utf-16"))
    (tmp_path / "stage1.log.json").touch()
    with pytest.raises(HmfError, match="another recipe"), claimed(tmp_path, "base: teacher"):
        pass
