# SPDX-License-Identifier: Apache-2.0
"""The tiny models of the campaign, and its figures at the end."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.campaign import SIZE, Campaign
from tests.training import cutting


@pytest.fixture
def campaign(record_property) -> Campaign:
    """Counts for the summary, in whatever process the test is."""
    campaign = Campaign()
    record_property("faults", campaign.figures)
    return campaign


@pytest.fixture(autouse=True)
def _blank_pictures(blank_pictures):
    """Of the runs in this process."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """base, sharded (the same in two files), stage0, hybrid: tiny, with a tokenizer each; corpus: text files."""
    home = tmp_path_factory.mktemp("models") / "tiny"
    cutting.make_tiny_hybrid(home)
    shutil.copytree(home / "base", home / "sharded")
    weights = home / "sharded/model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    homes = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in names}, home / "sharded" / name, {"format": "pt"})
        homes |= dict.fromkeys(names, name)
    (home / "sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return home


def pytest_terminal_summary(terminalreporter):
    figures = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                figures.update(dict(getattr(report, "user_properties", ())).get("faults", {}))
    if figures:
        terminalreporter.section(f"faults, size {SIZE}")
        for what, count in sorted(figures.items()):
            terminalreporter.write_line(f"{what}: {count:,}")
        terminalreporter.write_line(f"in all: {sum(figures.values()):,}")
