# SPDX-License-Identifier: Apache-2.0
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hmf.config.pattern import Pattern
from hmf.config.recipes import load_recipe
from hmf.errors import HmfError
from hmf.priming.stage0 import make_stage0
from hmf.training.pretrain import PretrainRecipe, main

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "teacher"


@pytest.fixture
def recipe(tmp_path):
    """The teacher's recipe, shrunk, on a folder of text; with its output in the folder of the test."""
    content = yaml.safe_load((RECIPES / "recipe.yaml").read_text())
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(40):
        (corpus / f"{index}.txt").write_text(f"def f{index}(x):\n    return x + {index}\n" * 20)
    content["output"] = str(tmp_path / "run")
    content["data"] |= {"text": str(corpus), "sequence_length": 128, "tasks": {"arithmetic": 1}}
    content["tokenizer"] |= {"vocab_size": 320, "task_samples": 2}
    content["tokenizer"]["chat_template"] = str(RECIPES / "chat_template.jinja")
    content["model"] |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    content["model"] |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    content["training"] |= {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "save_steps": 1,
        "workers": 0,
    }
    return content


def write(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("isolate", [True, False])
def test_a_run_makes_a_model_that_loads_and_a_second_one_goes_on_from_it(tmp_path, recipe, isolate):
    recipe["training"]["isolate_documents"] = isolate
    main(str(write(tmp_path, recipe)))
    output = Path(recipe["output"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert (model.dtype, model.config.vocab_size, len(tokenizer)) == (torch.bfloat16, 320, 320)
    assert model.config.use_cache
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("<|im_start|>")

    following = {name: part for name, part in recipe.items() if name not in ("tokenizer", "model")}
    following |= {"output": str(tmp_path / "next"), "start_from": str(output)}
    assert (
        main(str(write(tmp_path, following | {"output": "elsewhere"})), [f"output={tmp_path / 'next'}"])
        == tmp_path / "next"
    )
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "next")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "next" / name).read_bytes() == (output / name).read_bytes()
    moved = [(a - b).abs().max().item() for a, b in zip(after.parameters(), model.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1


def test_a_run_extends_the_context_of_another_ones_model(tmp_path, recipe):
    main(str(write(tmp_path, recipe)))
    following = {name: part for name, part in recipe.items() if name not in ("tokenizer", "model")}
    following |= {"output": str(tmp_path / "next"), "start_from": recipe["output"]}
    main(str(write(tmp_path, following | {"rope": {"theta": 5e6, "max_position_embeddings": 8192}})))
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).config for path in (recipe["output"], tmp_path / "next")
    )
    assert before.rope_parameters["rope_theta"] == recipe["model"]["rope_theta"] == 1e6
    assert (after.rope_parameters["rope_theta"], after.max_position_embeddings) == (5e6, 8192)


@pytest.mark.parametrize("name", ["recipe", "continue"])
def test_the_recipes_are_valid(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", PretrainRecipe)
    assert (recipe.start_from is None) == (name == "recipe")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"start_from": "runs/other"}, "either start_from, or both"),
        ({"model": None}, "either start_from, or both"),
        ({"sede": 1}, "seed"),
        ({"seed": 2**40}, "seed: Input should be less than 4294967296"),
        ({"rope": {"theta": 5e6}}, "rope: changes the positions of start_from"),
        ({"compile": True, "torch_compile": True}, "compile compiles the whole model"),
        ({"start_from": "nowhere", "model": None, "tokenizer": None}, "nowhere"),
        ({"tokenizer": {"vocab_size": 320, "chat_template": "no.jinja", "task_samples": 1}}, "no.jinja"),
        (
            {"data": {"text": "stdlib", "text_share": 0.5, "tasks": {"recal": 1}}},
            "recipe.yaml: data.tasks: unknown task 'recal'; did you mean 'recall'",
        ),
        (
            {"data": {"text": "stdlib", "text_share": 0.5, "tasks": {"recall": 1}, "sequence_length": 64}},
            "recipe.yaml: data.sequence_length: 64 tokens are too short",
        ),
        ({"data": {"text": "nowhere"}}, "recipe.yaml: data.text: nowhere: no such file or folder"),
    ],
)
def test_bad_recipes(tmp_path, recipe, change, named):
    if "compile" in change:
        change = {"training": recipe["training"] | change}
    with pytest.raises(HmfError, match=named):
        main(str(write(tmp_path, recipe | change)))
    assert not Path(recipe["output"]).exists()


@pytest.mark.parametrize(
    ("size", "value", "named"),
    [
        ("hidden_size", 0, "recipe.yaml: model: hidden_size: 0 is not a whole number from 1"),
        ("num_attention_heads", 3, "num_attention_heads must be a multiple of num_key_value_heads"),
        ("rope_theta", 0.0, "rope_theta"),
        ("initializer_range", 0.0, "model.initializer_range: Input should be greater than 0"),
        ("max_position_embeddings", 64, "rows of 128 tokens are longer than the model's 64 positions"),
    ],
)
def test_sizes_of_no_model(tmp_path, recipe, size, value, named):
    recipe["model"] |= {"num_key_value_heads": 2, size: value}
    with pytest.raises(HmfError, match=named):
        main(str(write(tmp_path, recipe)))
    assert not Path(recipe["output"]).exists()


def test_a_vocabulary_that_the_text_does_not_fill_is_refused(tmp_path, recipe):
    recipe["tokenizer"]["vocab_size"] = 5000
    with pytest.raises(HmfError, match=r"recipe.yaml: tokenizer.vocab_size: the text gives [34]\d\d tokens, not 5,000"):
        main(str(write(tmp_path, recipe)))
    assert not Path(recipe["output"]).exists()


def test_a_start_without_all_its_tensors_and_a_hybrid_are_refused(tmp_path, recipe):
    main(str(write(tmp_path, recipe)))
    output, start = Path(recipe["output"]), tmp_path / "start"
    following = {name: part for name, part in recipe.items() if name not in ("tokenizer", "model")}
    following |= {"output": str(tmp_path / "next"), "start_from": str(start)}
    shutil.copytree(output, start, ignore=shutil.ignore_patterns("checkpoints"))
    tensors = load_file(output / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(HmfError, match=r"start: .*mlp.up_proj.weight"):
        main(str(write(tmp_path, following)))
    shutil.rmtree(start)
    make_stage0(output, Pattern.parse("GDN"), start)
    with pytest.raises(HmfError, match="recipe.yaml: start_from: .*start is a Hybrid; train it with `hmf finetune`"):
        main(str(write(tmp_path, following)))
    assert not (tmp_path / "next").exists()


def test_the_folder_belongs_to_its_recipe(tmp_path, recipe):
    main(str(write(tmp_path, recipe)))
    files = {
        name: (Path(recipe["output"]) / name).stat().st_mtime_ns for name in ("model.safetensors", "training.json")
    }
    main(str(write(tmp_path, recipe)))  # a finished run is not repeated
    assert all((Path(recipe["output"]) / name).stat().st_mtime_ns == time for name, time in files.items())
    weights = (Path(recipe["output"]) / "model.safetensors").read_bytes()
    recipe["training"]["max_steps"] = 3
    with pytest.raises(HmfError, match="was started with another recipe"):
        main(str(write(tmp_path, recipe)))
    assert (Path(recipe["output"]) / "model.safetensors").read_bytes() == weights
