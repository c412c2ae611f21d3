# SPDX-License-Identifier: Apache-2.0
"""The Trainer's hooks run in the order that HybridTrainer states."""

import inspect
import re
import shutil

from transformers import Trainer

from hmf.training.distill import distill
from hmf.training.trainer import HybridTrainer
from tests.training import cutting


def test_hooks_run_in_the_written_order(tmp_path, monkeypatch):
    written = re.findall(r"^ *\d+\. `(\w+)`", inspect.getdoc(HybridTrainer), re.MULTILINE)
    overridden = {name for name in vars(HybridTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert set(written) == overridden and len(written) == len(overridden)
    stage0, run = cutting.make_tiny_stage0(tmp_path / "tiny"), tmp_path / "run"
    settings = cutting.settings(stage0, eval_strategy="steps", eval_steps=1, eval_rows=2)
    distill(stage0, run, settings)
    shutil.rmtree(run / "stage1")
    shutil.rmtree(run / "checkpoints/checkpoint-3")
    first_calls = []

    def recorded(name, hook):
        def call(self, *args, **kwargs):
            if name not in first_calls:
                first_calls.append(name)
            return hook(self, *args, **kwargs)

        return call

    for name in overridden:
        monkeypatch.setattr(HybridTrainer, name, recorded(name, vars(HybridTrainer)[name]))
    distill(stage0, run, settings)  # a resumed run reaches all of them
    assert first_calls == written
