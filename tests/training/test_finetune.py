# SPDX-License-Identifier: Apache-2.0
"""Stage 2: what is trained and at what rate, adapters, preferences, positions, and a result that is a plain Hybrid."""

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Ministral3Config, Ministral3ForCausalLM

from hmf.config.layers import LAYER_KINDS
from hmf.config.pattern import Pattern
from hmf.config.recipes import load_recipe
from hmf.config.runs import FinetuneRecipe, LoraSettings
from hmf.errors import HmfError
from hmf.model.checkpoint import load_config, load_model
from hmf.priming.export import export
from hmf.priming.stage0 import make_stage0
from hmf.training.finetune import finetune
from hmf.training.groups import add_adapters, choose, optimiser_groups, parts
from tests.hybrids import Case, random_ids, tiny_hybrid
from tests.numerics import assert_golden, assert_near, assert_same, nudged_checkpoint
from tests.parallel import ranks
from tests.training import cutting


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return cutting.make_tiny_hybrid(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def recipe(hybrid, tmp_path):
    """Makes a checked recipe with `changes` to continued pretraining of that Hybrid into the test's own folder."""

    def make(**changes) -> FinetuneRecipe:
        return cutting.finetune_recipe(hybrid, tmp_path / "run", **changes)

    return make


def losses(run):
    return [entry for entry in json.loads((run / "stage2.log.json").read_text()) if "loss" in entry]


def moved(before, after):
    before, after = (load_file(path / "model.safetensors") for path in (before, after))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- groups


@pytest.mark.parametrize("family", ["llama", "ministral3", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("symbol", ["GDN", "BMF"])
def test_every_parameter_is_in_exactly_one_group(family, symbol):
    extra = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    model = tiny_hybrid(Case(symbol, "gqa", base=extra), family=family)
    found = parts(model)
    names = [name for group in found.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    module = LAYER_KINDS[symbol].module_name
    assert found["mixers"].keys() == {name for name in names if f".{module}." in name}
    assert all(len(x.shape) == 1 for x in found["norms"].values()) and len(found["norms"]) == 7


def test_rates_reach_the_optimiser_and_the_rest_is_frozen():
    model = tiny_hybrid(Case("GDN", "gqa"))
    groups = choose(model, {"mixers": 1e-3, "norms": 1e-4})
    rows = optimiser_groups(model, groups, weight_decay=0.1)
    assert {(row["group"], row["lr"], row["weight_decay"]) for row in rows} == {
        ("mixers", 1e-3, 0.1),
        ("mixers", 1e-3, 0.0),
        ("norms", 1e-4, 0.0),
    }
    trained = {id(x) for row in rows for x in row["params"]}
    assert trained == {id(x) for x in model.parameters() if x.requires_grad}
    decaying = {id(x) for row in rows if row["weight_decay"] for x in row["params"]}
    kept = {name.rpartition(".")[2] for name, x in model.named_parameters() if id(x) in trained - decaying}
    assert {"A_log", "dt_bias"} <= kept
    everything = choose(model, {"all": 1e-5, "mlp": 1e-6})
    assert {group.name: group.learning_rate for group in everything} == {
        "mixers": 1e-5,
        "norms": 1e-5,
        "attention": 1e-5,
        "mlp": 1e-6,
        "embeddings": 1e-5,
    }


def test_a_group_without_parameters_is_an_error():
    model = tiny_hybrid(Case("GDN", "gqa"), pattern="X-X")
    with pytest.raises(HmfError, match="trainable: attention: the model has no such parameters"):
        choose(model, {"attention": 1e-4})
    assert [group.name for group in choose(model, {"all": 1e-4})] == ["mixers", "norms", "mlp", "embeddings"]


# ---- runs


def test_continued_pretraining_moves_its_groups_only_and_ends_as_a_plain_hybrid(recipe, hybrid, capfd):
    training = {"max_steps": 30, "per_device_train_batch_size": 4, "save_steps": 30}
    run = recipe(training=training, trainable={"mixers": 2e-2, "norms": 2e-2}, rope={"theta": "5e6"})
    out = finetune(run)
    assert_golden([losses(run.output)[at]["loss"] for at in (0, -1)], (6.429762, 4.227232))
    changed = moved(hybrid, out)
    assert changed and all(".gdn." in name or "norm" in name for name in changed)
    assert "mixers" in (shown := capfd.readouterr().err) and "frozen" in shown
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["HybridQwen3ForCausalLM"]
    assert config["rope_parameters"]["rope_theta"] == 5e6 and config["hybrid_override_pattern"] == "*-GDN"
    assert (out / "tokenizer.json").read_bytes() == (hybrid / "tokenizer.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(random_ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)
    assert finetune(run) == out  # done once
    (run.output / "new").touch()
    modes = {file.stat().st_mode for file in run.output.rglob("*") if file.is_file()}
    assert modes == {(run.output / "new").stat().st_mode}  # checkpoints of the Trainer too


def test_accumulated_batches_are_one_large_batch(hybrid, tmp_path):
    ends = []
    for name, training in (
        ("one", {"per_device_train_batch_size": 4}),
        ("two", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ):
        run = cutting.finetune_recipe(hybrid, tmp_path / name, training={"max_steps": 3, "save_steps": 1, **training})
        finetune(run)
        ends.append([entry["loss"] for entry in losses(run.output)])
    first, second = map(torch.tensor, ends)
    assert_near(second, first, first)
    assert len(set(ends[0])) == 3


def test_rows_that_workers_make_are_those_of_one_process(recipe, tmp_path):
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 2}
    runs = [recipe(output=str(tmp_path / str(n)), training=training | {"workers": n}) for n in (0, 2)]
    alone, shared = (load_file(finetune(run) / "model.safetensors") for run in runs)
    assert_same(shared, alone)


def test_the_result_has_the_dtype_that_was_asked_for(recipe):
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "logging_steps": 1}
    run = recipe(dtype="bfloat16", training=training, trainable={"mixers": 4e-3, "norms": 1e-3})
    out = finetune(run)
    rates = {name: value for name, value in losses(run.output)[-1].items() if name.startswith("learning_rate_")}
    assert rates == {"learning_rate_mixers": 4e-3, "learning_rate_norms": 1e-3}  # each group's, in the picture too
    dtypes = {name: x.dtype for name, x in load_file(out / "model.safetensors").items()}
    assert dtypes.pop("model.layers.1.gdn.A_log") == dtypes.pop("model.layers.1.gdn.dt_bias") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    assert load_config(out).dtype == torch.bfloat16


def test_without_a_dtype_every_tensor_keeps_the_one_of_its_file(hybrid, tmp_path):
    source = shutil.copytree(hybrid, hybrid.parent / "mixed")  # beside its corpus
    given = {
        name: x if "norm" in name or name.endswith(("A_log", "dt_bias")) else x.bfloat16()
        for name, x in load_file(source / "model.safetensors").items()
    }
    save_file(given, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    training = {"max_steps": 1, "per_device_train_batch_size": 1}
    out = finetune(cutting.finetune_recipe(source, tmp_path / "run", trainable={"mixers": 1e-3}, training=training))
    saved = load_file(out / "model.safetensors")
    assert {name: x.dtype for name, x in saved.items()} == {name: x.dtype for name, x in given.items()}
    assert all(torch.equal(x, given[name]) for name, x in saved.items() if ".gdn." not in name)
    assert load_config(out).dtype == torch.bfloat16


# ---- several processes

PAIRS = [{"prompt": f"one {n}", "chosen": f"two {n}", "rejected": f"six {n} {n}"} for n in range(4)]
SHARED = {
    # two processes, one row each, that together are a step of two rows
    "fsdp2": {"per_device_train_batch_size": 1, "strategy": "fsdp2", "precision": "float32"},
    "sequence": {"per_device_train_batch_size": 2, "sequence_parallel": 2},
    "both": {
        "per_device_train_batch_size": 2,
        "sequence_parallel": 2,
        "strategy": "fsdp2",
        "gradient_checkpointing": True,
    },
    "preferences": {"per_device_train_batch_size": 1, "strategy": "fsdp2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("shares", SHARED)
def test_two_processes_end_like_one(hybrid, tmp_path, shares):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    pairs = {"path": str(tmp_path / "pairs.jsonl"), "sequence_length": 96}
    kind = {"method": "dpo", "data": None, "pairs": pairs} if shares == "preferences" else {}

    def given(name, training):
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": 1 if kind else 3}
        given = {"max_steps": 3, "save_steps": 1} | evaluation | training
        changes = {"trainable": {"all": 1e-4}, "training": given, **kind}
        return cutting.finetune_recipe(hybrid, tmp_path / name, **changes)

    one, two = given("one", {"per_device_train_batch_size": 2}), given("two", SHARED[shares])
    nudged = given("nudged", {"per_device_train_batch_size": 2}).model_copy(
        update={"model": Path(nudged_checkpoint(hybrid, tmp_path / "other" / "hybrid"))}
    )
    finetune(one)
    finetune(nudged)
    ranks.run(ranks.train_stage2, 2, 2, ranks.free_port(), two.model_dump(mode="json", exclude_unset=True))
    runs = [cutting.result(run.output, "stage2", "model") for run in (two, one, nudged)]
    names = ("loss", "margin", "accuracy", "grad_norm", "eval_loss", "eval_margin", "eval_accuracy")
    assert_near(*([cutting.figures(entry, names) for entry in log[:6]] for _, log in runs))
    assert sum("eval_loss" in entry for entry in runs[0][1]) == 3
    assert_near(*(weights for weights, _ in runs))
    start = load_file(hybrid / "model.safetensors")
    for name, value in runs[1][0].items():
        assert (value - start[name]).abs().max() > 5e-5  # trained at all


# ---- adapters


def test_merged_adapters_give_the_logits_of_the_adapters(hybrid):
    pytest.importorskip("peft")
    model = load_model(hybrid, dtype=torch.float64)
    names = {name for name, _ in model.named_parameters()}
    settings = LoraSettings(groups=["mixers", "attention", "mlp"], rank=3, learning_rate=1e-3)
    handle, added = add_adapters(model, choose(model, {"norms": 1e-3}, settings), settings)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == added.parameters.keys() | {name for name in trained if "norm" in name and "gdn" not in name}
    assert any(".gdn.q_proj." in name for name in added.parameters)
    for parameter in added.parameters.values():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = random_ids(2, 17)
    before, plain = model(ids).logits, load_model(hybrid, dtype=torch.float64)(ids).logits
    handle.merge_and_unload()
    assert {name for name, _ in model.named_parameters()} == names
    assert (before - plain).abs().max() > 1e-2
    assert_same(model(ids).logits, before)


def test_adapters_are_merged_on_the_cpu(tmp_path, monkeypatch):
    """A GPU that holds the frozen matrices in bfloat16 may not hold them in float32."""
    pytest.importorskip("peft")
    moved_names, real = [], torch.nn.Module.cpu

    def cpu(model):
        moved_names.extend(name for name, x in model.named_parameters() if x.dtype == torch.bfloat16)
        return real(model)

    monkeypatch.setattr(torch.nn.Module, "cpu", cpu)
    hybrid = cutting.make_tiny_hybrid(tmp_path / "tiny", dtype=torch.bfloat16)
    lora = {"groups": ["mlp"], "rank": 2, "learning_rate": 1e-2}
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "precision": "bfloat16"}
    finetune(cutting.finetune_recipe(hybrid, tmp_path / "run", lora=lora, training=training))
    assert any(".up_proj.base_layer." in name for name in moved_names)


@pytest.mark.slow  # alone: the killed process imports everything first
def test_a_killed_run_ends_bit_for_bit_like_one_that_was_not(hybrid, tmp_path):
    """With adapters, if there are any to be had: their state and their dropout must go on too."""
    adapters = {"groups": ["attention", "mlp"], "rank": 2, "learning_rate": 1e-2, "dropout": 0.1}
    changes = {"lora": adapters} if importlib.util.find_spec("peft") else {}
    whole, cut = (cutting.finetune_recipe(hybrid, tmp_path / name, **changes) for name in ("whole", "cut"))
    out = finetune(whole)
    changed = moved(hybrid, out)  # the same names: no adapter is left
    assert any(".gdn." in name for name in changed)
    assert any(".self_attn." in name for name in changed) == bool(changes)
    killed = cutting.start(cutting.train_stage2, cut, 30)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (cut.output / "model").exists()
    assert list((cut.output / "checkpoints").glob("checkpoint-*"))
    assert not moved(out, finetune(cut))
    assert cutting.result(cut.output, "stage2", "model")[1] == cutting.result(whole.output, "stage2", "model")[1]


# ---- bad recipes

ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainable": {"mixer": 1e-4}}, "trainable.mixer.*'mixers', 'norms', .* 'embeddings' or 'all'"),
        ({"trainable": {}}, "no parameters are trained; give trainable"),
        ({"training": ONE_STEP | {"learning_rate": 1e-4}}, "each group has its own"),
        ({"method": "dpo"}, "method dpo needs pairs and no data"),
        ({"method": "rlhf"}, "method: Input should be 'cpt', 'sft' or 'dpo'"),
        ({"lora": {"groups": ["mixers"], "learning_rate": 1e-4}}, "lora.groups: mixers is in trainable too"),
        (
            {"lora": {"groups": ["mlp"], "learning_rate": 1e-4}, "training": ONE_STEP | {"strategy": "fsdp2"}},
            "lora needs training.strategy ddp or deepspeed",
        ),
        ({"training": ONE_STEP | {"sequence_parallel": 3}}, "a multiple of 6, twice training.seq"),
        ({"rope": {"theta": -1}}, "rope.theta: Input should be greater than 0"),
        ({"rope": {"tehta": 1}}, "rope: unknown key 'tehta'; did you mean 'theta'"),
        ({"rope": {"scaling": {"rope_type": "yarn"}}}, "rope.scaling: yarn needs factor"),
        ({"rope": {"scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}}, "linear has no beta_fast"),
        ({"rope": {"scaling": {"rope_type": "dynamic", "factor": 2}}}, "'default', 'linear', 'yarn' or 'llama3'"),
    ],
)
def test_a_bad_recipe_is_one_line(hybrid, tmp_path, change, said):
    content = cutting.finetune_recipe(hybrid, tmp_path / "run").model_dump(mode="json", exclude_unset=True)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content | change))
    with pytest.raises(HmfError, match=said) as caught:
        load_recipe(file, FinetuneRecipe)
    assert "\n" not in str(caught.value)


def test_models_and_data_that_cannot_be_meant(hybrid, recipe, tmp_path):
    short = {"text": str(hybrid.parent / "corpus"), "sequence_length": 256}
    for change, said in (
        ({"model": str(hybrid.parent / "stage0")}, "still has its teacher; run `hmf export`"),
        ({"model": str(hybrid.parent / "base")}, "is not a Hybrid"),
        ({"data": short}, "rows of 256 tokens are longer than the model's 128 positions; set rope.max_position_emb"),
        ({"method": "sft"}, "every token is supervised, also in prompts"),
        ({"rope": {"scaling": {"rope_type": "yarn", "factor": 4}}}, "128 is not above the 128 positions"),
    ):
        with pytest.raises(HmfError, match=said):
            finetune(recipe(**change))
    assert not (tmp_path / "run/checkpoints").exists()


def test_longer_positions_are_written_and_used(recipe):
    rope = {"max_position_embeddings": 512, "scaling": {"rope_type": "yarn", "factor": 4}}
    data = recipe().data.model_copy(update={"sequence_length": 256})
    out = finetune(
        recipe(rope=rope, data=data.model_dump(), training={"max_steps": 1, "per_device_train_batch_size": 1})
    )
    config = load_config(out)
    assert config.max_position_embeddings == 512
    wanted = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    assert config.rope_parameters == wanted
    model = load_model(out)
    assert model.model.rotary_emb.rope_type == "yarn"


def test_a_longer_model_is_made_longer_again(recipe, hybrid, tmp_path):
    """Ministral 3, whose queries grow with their position: every key stays that the recipes do not name."""
    rope = {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
    base = tmp_path / "base"
    shutil.copytree(hybrid.parent / "base", base)
    fields = json.loads((base / "config.json").read_text())
    sizes = {key: fields[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    Ministral3ForCausalLM(Ministral3Config(**sizes, **heads, rope_parameters=dict(rope))).save_pretrained(base)
    make_stage0(base, Pattern.parse("*-SWA"), tmp_path / "stage0")
    export(tmp_path / "stage0", tmp_path / "model")
    model, training = tmp_path / "model", {"max_steps": 1, "per_device_train_batch_size": 1}
    for factor in (4.0, 8.0):
        longer = {"max_position_embeddings": int(64 * factor), "scaling": {"rope_type": "yarn", "factor": factor}}
        changes = {"model": str(model), "output": str(tmp_path / f"{factor:g}"), "rope": longer, "training": training}
        model = finetune(recipe(**changes))
        config = load_config(model)
        assert config.max_position_embeddings == 64 * factor
        assert config.rope_parameters == rope | {"factor": factor}
