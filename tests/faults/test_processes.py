# SPDX-License-Identifier: Apache-2.0
"""Some of the worst inputs in a process of its own, with limits of the operating system: all that it prints counts."""

import json
import resource
import shutil
import subprocess
import sys

import pytest

from tests.faults.campaign import SIZE, Outcome, require_promised

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
MEMORY, SECONDS = 8 * 2**30, 40  # of address space; of the processor, start included
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def deep(folder):
    (folder / "config.json").write_text('{"a": ' * 10**5)


def huge_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:])


def template(folder, text):
    (folder / "chat_template.jinja").write_text(text)


WORST = {
    "layers": ("plan", lambda folder: edit_config(folder, num_hidden_layers=10**9)),
    "header": ("evaluate", huge_header),
    "depth": ("plan", deep),
    "width": ("evaluate", lambda folder: edit_config(folder, vocab_size=10**12)),
    "loop": ("chat", lambda folder: template(folder, LOOP)),
    "power": ("chat", lambda folder: template(folder, "{{ 10 ** (10 ** 10) }}")),
    "letters": ("chat", lambda folder: template(folder, "{{ 'x' * 10 ** 11 }}")),
    "strftime": ("chat", lambda folder: template(folder, "{{ strftime_now(1) }}")),
}
OPTIONS = {"plan": ("--gpu", "h100")}
FEW = ("layers", "header")


@pytest.mark.parametrize(
    "name",
    FEW if SIZE == 1 else WORST,
)
def test_worst(name, models, campaign, tmp_path):
    command, change = WORST[name]
    folder = shutil.copytree(models / "hybrid", tmp_path / "hybrid")
    change(folder)
    done = subprocess.run(
        [sys.executable, "-m", "hmf.cli", command, str(folder), *OPTIONS.get(command, ())],
        capture_output=True,
        text=True,
        input="one\n\n",
        preexec_fn=limit,
    )
    require_promised(Outcome(done.returncode, done.stdout, done.stderr))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    campaign.count("processes with limits: refusals")
