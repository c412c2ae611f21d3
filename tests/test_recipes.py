# SPDX-License-Identifier: Apache-2.0
"""All recipes are valid. The quickstart's run one after the other, shrunk, and end in a model that answers."""

import json

import pyarrow
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.data import DataRecipe
from hmf.config.places import PairSettings
from hmf.config.recipes import load_recipe
from hmf.config.runs import DistillRecipe, FinetuneRecipe, PrimeRecipe
from hmf.config.strict import parse_yaml
from hmf.data.sources import Source, pair_of
from hmf.errors import print_once
from hmf.training.pretrain import PretrainRecipe
from tests.conftest import ROOT

RECIPES = ROOT / "recipes" / "quickstart"
BILLION = ROOT / "recipes" / "qwen3-0.6b-1b"
ALL = sorted(ROOT.glob("recipes/**/*.yaml"))
SMALL = ("max_steps=2", "per_device_train_batch_size=1", "save_steps=2", "warmup_steps=0")


def run(command, recipe, *values):
    chosen = [part for value in values for part in ("--set", value)]
    result = CliRunner().invoke(app, [command, str(RECIPES / f"{recipe}.yaml"), *chosen], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def kind_of(content):
    """The class that reads a recipe with these keys."""
    for key, kind in (("base", PrimeRecipe), ("method", FinetuneRecipe), ("sources", DataRecipe), ("model", None)):
        if key in content:
            return kind or (PretrainRecipe if "tokenizer" in content else DistillRecipe)
    return PretrainRecipe


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_is_valid(path):
    kind = kind_of(parse_yaml(path.read_text(encoding="utf-8")))
    assert isinstance(load_recipe(path, kind), kind)


def parquet(path, rows):
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_the_data_of_the_billion_tokens_is_read(tmp_path, monkeypatch):
    """Rows with the columns that the cards of the data sets name."""
    monkeypatch.chdir(tmp_path)
    text = {"text": "A Hybrid has attention and recurrent layers. " * 40, "id": "1", "url": "u", "score": 3.1}
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]
    parquet(tmp_path / "data/fineweb-edu/sample/10BT/000.parquet", [text] * 3)
    parquet(tmp_path / "data/smoltalk/data/all/train-0.parquet", [{"messages": turns, "source": "s"}] * 3)
    other = [turns[0], {"role": "assistant", "content": "A dog."}]
    pair = {
        "prompt": turns[0]["content"],
        "prompt_id": "1",
        "chosen": turns,
        "rejected": other,
        "messages": turns,
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    }
    parquet(tmp_path / "data/ultrafeedback/data/train_prefs-0.parquet", [pair])
    for name, documents in (("data-text", 3), ("data-chat", 3)):
        arguments = ["data", "show", str(BILLION / f"{name}.yaml"), "--set", "tokenizer=teacher", "--samples", "1"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert f" {documents} " in result.output
    settings: PairSettings = load_recipe(BILLION / "3-dpo.yaml", FinetuneRecipe).pairs
    (record,) = Source(settings).records()
    assert pair_of(record, settings).prompt == turns[:1]


@pytest.mark.slow
def test_the_quickstart_through_all_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the recipes' folders are relative, and one continues another
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / "corpus" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 40)
    evaluate = ("evaluate.samples=1", "evaluate.length=128", "evaluate.text_bytes=2000", "evaluate.max_new_tokens=4")
    data = ("distill.data.text=corpus", "distill.data.sequence_length=128", "distill.objective.layerwise_steps=1")
    print_once.cache_clear()  # another test of this process may have had this notice
    said = run("prime", "recipe", *(f"distill.training.{value}" for value in SMALL), *data, *evaluate)
    assert "hmf: teacher: not copied to the result: README.md, training.json\n" in said  # no path of the machine
    assert str(ROOT) not in "".join(file.read_text() for file in (tmp_path / "runs/quickstart").glob("*.json"))
    training = [f"training.{value}" for value in SMALL]
    run("finetune", "cpt", *training, "data.text=corpus", "data.sequence_length=128")
    said = run("finetune", "sft", *training, "data.text=corpus", "data.sequence_length=128")
    assert "saved runs/quickstart-sft/model" in said
    groups = [line.split() for line in said[said.index("group ") :].splitlines()[:6]]
    assert [row[0] for row in groups[1:]] == ["mixers", "norms", "attention", "mlp", "embeddings"]
    assert groups[0] == ["group", "parameters", "learning", "rate"] and groups[1][1:] == ["416,388", "0.001"]
    run("finetune", "lora", *training, "data.text=corpus", "data.sequence_length=128")
    own = ("data.text=corpus", "data.sequence_length=128", "on_policy.max_new_tokens=8")
    assert "saved runs/quickstart-on-policy/stage1" in run("distill", "on-policy", *training, *own)
    pairs = [{"prompt": f"{n} + 1?", "chosen": f"{n + 1}", "rejected": f"{n + 2}"} for n in range(8)]
    (tmp_path / "runs/quickstart-pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert "saved runs/quickstart-dpo/model" in run("finetune", "dpo", *training)
    model = AutoModelForCausalLM.from_pretrained("runs/quickstart-sft/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/quickstart-sft/model")
    assert model.config.rope_parameters["rope_theta"] == 2e6  # of the first part, kept by the second
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "12 + 30?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
