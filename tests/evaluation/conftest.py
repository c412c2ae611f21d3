# SPDX-License-Identifier: Apache-2.0
"""A run folder with a tiny Hybrid that reads the embedded teacher's tokens, and its base."""

import json
import os
import sys

import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from hmf.cli import main
from hmf.config.pattern import Pattern
from hmf.data.tokenizer import load_tokenizer
from hmf.folders import ASSETS
from hmf.priming.export import export
from hmf.priming.stage0 import make_stage0


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(ASSETS / "teacher")


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    """A folder with `base`, a Transformer of two layers, and `hybrid`, in which the second is GDN."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    make_stage0(folder / "base", Pattern.parse("*-GDN"), folder / "stage0")
    export(folder / "stage0", folder / "hybrid")
    return folder


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder of `hmf prime`, as far as an evaluation looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    os.symlink(tiny / "hybrid", folder / "model")
    recipe = {
        "base": str(tiny / "base"),
        "output": str(folder),
        "hybrid": {"pattern": "*-GDN"},
        "distill": {"training": {"max_steps": 7, "per_device_train_batch_size": 3}, "data": {"sequence_length": 96}},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def hmf(monkeypatch, capsys):
    """Runs the command line: code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hmf", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def evaluated(hmf):
    """`hmf evaluate --json` of a small suite: what it printed."""

    def call(*arguments):
        options = ("--suite", "retention", "--samples", 3, "--max-new-tokens", 8, "--json")
        code, out, err = hmf("evaluate", *options, *arguments)
        assert code == 0, err
        return json.loads(out)

    return call
