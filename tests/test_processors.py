# SPDX-License-Identifier: Apache-2.0
"""Commands share a machine's processors with other programs, and users' own settings stay."""

import json
import os
import subprocess
import sys

import pytest

from hmf.processors import count, whole_processors

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
SHOW = (
    "import json, os, sys; from hmf.cli import main; sys.argv = ['hmf', '--version']\n"
    "try: main()\n"
    "except SystemExit: print(json.dumps(dict(os.environ))); print('torch' in sys.modules)"
)


def environment(**given):
    plain = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", SHOW], env=plain | given, capture_output=True, text=True, check=True)
    found, loaded = done.stdout.splitlines()[-2:]
    assert loaded == "False"  # its OpenMP reads the settings as it is loaded
    return json.loads(found)


def test_threads_sleep_while_they_wait():
    assert WAITING.items() <= environment().items()


@pytest.mark.parametrize("name", WAITING)
def test_what_the_user_sets_stays(name):
    assert environment(**{name: "7"})[name] == "7"


def test_threads_of_a_process_and_of_its_group():
    assert 1 <= count() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "150000 100000\n"}, 1),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 2**31),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2**31),
        ({"cpu.max": "damaged"}, 2**31),
        ({}, 2**31),
    ],
)
def test_limits_of_containers(tmp_path, files, limit):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert whole_processors(tmp_path) == limit
