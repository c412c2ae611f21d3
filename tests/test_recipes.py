# SPDX-License-Identifier: Apache-2.0
"""The quickstart's recipes one after the other, shrunk: Stage 0, 1 and 2, and a model that answers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hmf.cli import app
from tests.conftest import ROOT

RECIPES = ROOT / "recipes" / "quickstart"
SMALL = ("steps=2", "rows_per_step=1", "save_steps=2", "warmup_steps=0")


def run(command, recipe, *values):
    chosen = [part for value in values for part in ("--set", value)]
    result = CliRunner().invoke(app, [command, str(RECIPES / f"{recipe}.yaml"), *chosen], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_the_quickstart_through_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipes' folders are relative, and one continues another
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / "corpus" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 40)
    evaluate = ("evaluate.samples=1", "evaluate.length=128", "evaluate.text_bytes=2000", "evaluate.max_new_tokens=4")
    data = ("distill.data.text=corpus", "distill.data.sequence_length=128", "distill.objective.layerwise_steps=1")
    run("prime", "recipe", *(f"distill.training.{value}" for value in SMALL), *data, *evaluate)
    training = [f"training.{value}" for value in SMALL]
    run("finetune", "cpt", *training, "data.text=corpus", "data.sequence_length=128")
    said = run("finetune", "sft", *training, "data.text=corpus", "data.sequence_length=128")
    assert "saved runs/quickstart-sft/model" in said
    model = AutoModelForCausalLM.from_pretrained("runs/quickstart-sft/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/quickstart-sft/model")
    assert model.config.rope_parameters["rope_theta"] == 2e6  # of the first part, kept by the second
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12 + 30?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
