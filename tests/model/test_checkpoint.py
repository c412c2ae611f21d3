# SPDX-License-Identifier: Apache-2.0
"""Loading says in one line what is wrong with a checkpoint; saving is whole or not there."""

import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hmf.errors import HmfError
from hmf.model.checkpoint import load_config, load_model, save_checkpoint
from hmf.model.families import family_of
from hmf.model.files import copy_companions, new_directory
from hmf.model.modeling import hybrid_classes
from hmf.model.values import changed
from tests.parity import full_case

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests" / "data" / "qwen3_gdn"
A_LOG, Q_PROJ = "model.layers.1.gdn.A_log", "model.layers.1.gdn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of a small Hybrid, to be damaged."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(STORED / name, tmp_path)
    return tmp_path


def refused(load, checkpoint: Path, said: str) -> None:
    """`load(checkpoint)` raises HmfError: one line that matches `said` and names the checkpoint."""
    with pytest.raises(HmfError, match=said) as error:
        load(checkpoint)
    assert "\n" not in str(error.value)
    assert str(checkpoint) in str(error.value)


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_tensors(folder: Path, **tensors) -> None:
    """Replace tensors, drop those that are None."""
    found = load_file(folder / "model.safetensors") | tensors
    save_file({key: x for key, x in found.items() if x is not None}, folder / "model.safetensors", {"format": "pt"})


# --- tensors ---

either_way = pytest.mark.parametrize(
    "load", [load_model, AutoModelForCausalLM.from_pretrained], ids=["load_model", "from_pretrained"]
)


@either_way
@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A_LOG: None}, f"missing.*{A_LOG}"),
        ({"model.norm.weight": None}, "missing.*model.norm.weight"),
        ({Q_PROJ: None, Q_PROJ + "s": torch.zeros(64, 64)}, f"{Q_PROJ}.*{Q_PROJ}s"),
        ({"model.layers.1.gdn.extra": torch.zeros(2)}, "model.layers.1.gdn.extra"),
        ({"model.layers.0.gdn.A_log": torch.zeros(4)}, "model.layers.0.gdn.A_log"),
        ({"model.layers.1.self_attn.q_proj.weight": torch.zeros(64, 64)}, "model.layers.1.self_attn.q_proj.weight"),
        ({A_LOG: torch.zeros(5)}, rf"{A_LOG}.*\[5\].*\[4\]"),
        ({"lm_head.weight": torch.zeros(100, 64)}, r"lm_head.weight.*\[100, 64\].*\[128, 64\]"),
    ],
    ids=["missing", "missing-of-base", "renamed", "extra", "wrong-layer", "not-fused", "shape", "shape-of-base"],
)
def test_every_tensor_is_accounted_for(checkpoint, load, tensors, said):
    edit_tensors(checkpoint, **tensors)
    refused(load, checkpoint, said)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({A_LOG: None}, "missing: .*layers.1.gdn.A_log; copy"),
        ({"model.layers.1.gdn.extra": torch.zeros(2)}, "not of this model: .*layers.1.gdn.extra"),
        ({"score.weight": torch.zeros(2, 64)}, "not of this model: score.weight"),
    ],
    ids=["missing", "extra", "other head"],
)
def test_the_decoder_alone_is_as_strict(checkpoint, tensors, said):
    whole = AutoModelForCausalLM.from_pretrained(checkpoint).model.state_dict()
    alone = AutoModel.from_pretrained(checkpoint).state_dict()  # lm_head is not of it, and no fault
    assert whole.keys() == alone.keys() and all(torch.equal(whole[name], x) for name, x in alone.items())
    edit_tensors(checkpoint, **tensors)
    refused(AutoModel.from_pretrained, checkpoint, said)


@either_way
@pytest.mark.parametrize("size", [0, 20, 300_000])
def test_truncated_weights(checkpoint, load, size):
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[:size])
    refused(load, checkpoint, "damaged.*copy the file again")


@pytest.mark.parametrize(
    "change",
    [
        {"hybrid_override_pattern": "*-FOO"},
        {"gdn_config": {"foo": 1}},
        {"gdn_overrides": [1]},
        {"gka_overrides": {"num_iter": 3}},  # the pattern has no such layer
        {"state_dtype": "float8"},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"num_key_value_heads": 3},
        {"per_layer_config": {"0": {}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_errors_of_a_config_name_its_file(checkpoint, change):
    """However it is read."""
    edit_config(checkpoint, **change)
    own = hybrid_classes(family_of(json.loads((checkpoint / "config.json").read_text())["model_type"]))
    loaders = (AutoConfig, own.config, AutoModelForCausalLM, own.causal_lm)
    for load in (*(cls.from_pretrained for cls in loaders), load_config, load_model):
        refused(load, checkpoint, f"^{checkpoint}/config.json: {next(iter(change))}")


def test_errors_of_values_that_are_in_no_file_name_none(checkpoint):
    config = load_config(checkpoint)
    with pytest.raises(HmfError, match="^--hf-overrides: gdn_config: unknown key"):
        changed(config, {"gdn_config": {"foo": 1}}, "--hf-overrides")
    with pytest.raises(HmfError, match="^config.json: gdn_config: unknown key"):
        type(config)(**config.to_dict() | {"gdn_config": {"foo": 1}})


@either_way
def test_tensor_of_integers(checkpoint, load):
    edit_tensors(checkpoint, **{A_LOG: torch.zeros(4, dtype=torch.int64)})
    refused(load, checkpoint, rf"model.safetensors: tensor {A_LOG} has dtype I64")


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    refused(load_model, checkpoint, "no weights")


def test_heads_of_a_base_without_its_number_of_key_value_heads(tmp_path):
    """Qwen3's config class then takes that of its largest model."""
    fields = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(partial(load_config, weights=False), tmp_path, "config.json: num_key_value_heads: 32 does not divide .* 4")


def test_shards_without_their_index(checkpoint):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(checkpoint / "model.safetensors", checkpoint / name)
    (checkpoint / "model.safetensors").unlink()
    refused(load_model, checkpoint, "model-00001-of-00002.safetensors, .*not listed by .*index.json, which is missing")


@pytest.mark.parametrize("name", ["Model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"])
def test_weights_under_another_name(checkpoint, name):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    refused(load_model, checkpoint, f"no weights .*; {name} cannot be read")


def test_no_directory(tmp_path):
    refused(load_model, tmp_path / "absent", "no such directory")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "not valid JSON"),
        ('{"metadata": {}}', "weight_map"),
        ('{"weight_map": {"lm_head.weight": "model-1.safetensors"}}', "model-1.safetensors: missing"),
    ],
)
def test_damaged_index_of_shards(checkpoint, index, said):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    refused(load_model, checkpoint, said)


def test_whole_shards_load(checkpoint, tmp_path):
    model = load_model(checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    loaded = load_model(tmp_path / "shards")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(model.named_parameters()), atol=0, rtol=0)


# --- config.json ---


def test_no_config(checkpoint):
    (checkpoint / "config.json").unlink()
    refused(load_model, checkpoint, "no config.json")


@pytest.mark.parametrize("content", [b'{"model_type": "hybrid_qwen3",', b"[1]", b"\xff\xfe", b""])
def test_config_that_is_no_json_object(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)
    refused(load_model, checkpoint, "config.json: .*JSON")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hybrid_override_pattern": "*-GDN-*"}, "hybrid_override_pattern: has 3 layers, but the model has 4"),
        ({"num_hidden_layers": 5}, "hybrid_override_pattern: has 4 layers, but the model has 5"),
        ({"hybrid_override_pattern": "*-GDM-*-GDN"}, "hybrid_override_pattern: layer 1: .*'GDM'.*'GDN'"),
        ({"hybrid_override_pattern": ["*", "GDN", "*", "GDN"]}, "hybrid_override_pattern: .*is not a string"),
        ({"layer_types": ["*", "GDN", "GDN", "*"]}, "layer_types .*disagree"),
        ({"hybrid_override_pattern": "*DA-GDN*-*DA-GDN*", "layer_types": ["*DA", "GDN*", "GDN*", "*DA"]}, "disagree"),
        ({"gdn_config": {"use_gatee": False}}, "gdn_config: unknown key 'use_gatee'; did you mean 'use_gate'"),
        ({"gdn_config": {"conv_size": "four"}}, "gdn_config: conv_size: .*integer"),
        ({"gdn_config": {"conv_size": 0}}, "gdn_config: conv_size: .*greater than or equal to 1"),
        ({"gdn_config": {"kv_proj_rank": -1}}, "gdn_config: kv_proj_rank: "),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps: -1e-06 is not a number from 0 to 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a number"),
        ({"attention_dropout": 1.5}, "attention_dropout: 1.5 is not a number from 0 to 1"),
        ({"initializer_range": float("inf")}, "initializer_range: inf is not a number"),
        ({"gdn_config": {"norm_eps": float("inf")}}, "gdn_config: norm_eps: .*finite"),
        ({"gdn_config": [1]}, r"gdn_config: \[1\] is not an object of options"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"state_dtype": "float31"}, "state_dtype 'float31'"),
        ({"model_type": "hybrid_qwen9"}, "'hybrid_qwen9' is not among the supported families .*docs.families.md"),
        ({"model_type": "absent"}, "model_type"),
        ({"hidden_size": "abc"}, "hidden_size: 'abc' is not a whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_config_names_file_and_key(checkpoint, fields, said):
    edit_config(checkpoint, **fields)
    for load in (load_config, load_model):
        refused(load, checkpoint, f"^{re.escape(str(checkpoint / 'config.json'))}: .*{said}")


@pytest.mark.parametrize("fields", [{"layer_types": "absent"}, {"hybrid_override_pattern": "absent"}])
def test_pattern_may_stand_in_either_key(checkpoint, fields):
    edit_config(checkpoint, **fields)
    assert str(load_model(checkpoint).config.pattern) == "*-GDN-*-GDN"


@pytest.mark.parametrize("field", ["head_dim", "num_q_heads", "num_k_heads", "num_v_heads", "hidden_size"])
def test_derived_fields_follow_from_the_base(checkpoint, field, capfd):
    """As the format defines. A notice names what is not read."""
    stored = json.loads((checkpoint / "config.json").read_text())["gdn_config"]
    edit_config(checkpoint, gdn_config=stored | {field: stored[field] * 2})
    assert load_model(checkpoint).config.gdn_config == stored
    assert f"gdn_config: {field}: {stored[field] * 2} is not read; {stored[field]} follows" in capfd.readouterr().err
    for absent in (stored | {field: None}, "absent"):  # all options are the defaults
        edit_config(checkpoint, gdn_config=absent)
        assert load_config(checkpoint).gdn_config == stored


@pytest.mark.parametrize("pattern", ["*-GDN-*-GDN", "absent"])
def test_layer_types_in_other_words_agree_with_the_pattern(checkpoint, pattern):
    kinds = ["full_attention", "linear_attention"] * 2
    edit_config(checkpoint, layer_types=kinds)
    assert str(load_model(checkpoint).config.pattern) == "*-GDN-*-GDN"
    edit_config(checkpoint, layer_types=kinds[::-1], hybrid_override_pattern=pattern)
    for load in (load_config, load_model):
        refused(load, checkpoint, r"config.json: layer_types \['linear.* differs from .*delete layer_types")


# --- saving ---


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing_behind(tmp_path, error):
    def fail_half_way():
        with new_directory(tmp_path / "a" / "b" / "out") as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert listing(tmp_path) == []


def test_directory_appears_whole(tmp_path):
    (tmp_path / "out").mkdir()  # empty: not in use
    with new_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("written")
        assert not (tmp_path / "out" / "file").exists()
    assert listing(tmp_path) == ["out", "out/file"]
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize("place", ["current folder", "link", "link to nothing"])
def test_directory_that_cannot_be_replaced(tmp_path, monkeypatch, place):
    """An empty folder as `--out`: a rename onto it would fail after the whole computation, or leave the user's shell in
    a folder that is gone."""
    folder, given = tmp_path / "folder", tmp_path / "out"
    if place == "link to nothing":
        given.symlink_to(folder)
    else:
        folder.mkdir()
        given.symlink_to(folder)
        (folder / ".folder.abcd1234").mkdir()  # left there by a killed process
    if place == "current folder":
        monkeypatch.chdir(folder)
        given = Path()
    for fails in (True, False):
        with suppress(ValueError), new_directory(given) as work:
            for name in ("config.json", "a", "z/inner"):
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_text("written")
            if fails:
                raise ValueError
        assert listing(folder) == ([] if fails else ["a", "config.json", "z", "z/inner"])
    assert listing(Path(os.path.realpath(given))) == listing(folder)


@pytest.mark.parametrize("used", ["out/file", "out"], ids=["directory", "file"])
def test_directory_in_use_is_left_alone(tmp_path, used):
    (tmp_path / used).parent.mkdir(exist_ok=True)
    (tmp_path / used).write_text("mine")
    with pytest.raises(HmfError, match="out: (holds other files|is a file);"), new_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / used).read_text() == "mine"
    assert len(listing(tmp_path)) == len(Path(used).parts)


def test_directory_under_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HmfError, match="cannot be created"), new_directory(tmp_path / "file" / "out"):
        pytest.fail("the block must not run")


def test_companions_are_byte_identical(checkpoint, tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    travels = (
        "tokenizer.json",
        "vocab.json",
        "tekken.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "preprocessor_config.json",
        "a name of tomorrow.xyz",
        "chat_templates/rag.jinja",
        "additional_chat_templates/tools/deep.jinja",
    )
    stays = (
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.gguf",
        "optimizer.pt",
        "consolidated.safetensors",
        "params.json",
        "hf_quant_config.json",
        "README.md",
        "modeling_own.py",
        "original/params.json",
        ".gitattributes",
    )
    for number, name in enumerate((*travels, *stays)):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_bytes(b'{ "a":\t%d }\r\n' % number)  # not as any writer of ours would print it
    for name in ("model.safetensors", "model.safetensors-00001-of-00001.safetensors"):
        (source / name).write_bytes(b"written anew")
    save_checkpoint(load_model(checkpoint), target, companions=source)
    for name in travels:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert there == {*travels, "config.json", "model.safetensors"}
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and all(name.split("/")[0] in line for name in sorted(stays)[:8])
    saved = load_file(target / "model.safetensors")
    assert saved.keys() == load_file(STORED / "model.safetensors").keys()


def test_a_result_inside_the_source_is_no_companion(tmp_path, capsys):
    with new_directory(tmp_path / "out") as work:
        copy_companions(tmp_path, work)
        assert listing(work) == []
    assert capsys.readouterr().err == ""


def test_absent_companions_are_no_error(tmp_path):
    copy_companions(tmp_path, tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("case", [full_case("fused_gdn")])
def test_stored_tokenizer_survives(case, tmp_path):
    base = case / "base"
    save_checkpoint(load_model(case / "unfused_f32"), tmp_path / "out", companions=base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


# --- registration ---


FIRST_IMPORTS = (
    "import hmf.model.hybrid_zoo.models.model_register",  # as the published model cards do it
    "import hmf, importlib.util; importlib.util.find_spec('transformers')",  # looked for, as accelerate does
    "import transformers.models.auto.modeling_auto, hmf",
    "import hmf.model.modeling",
)


def test_the_auto_classes_know_hybrids():
    """Whichever of hmf and transformers a process imports first; what both need is imported once, before it forks."""
    code = f"""if True:
        import contextlib, os, sys, torch._dynamo, torch.distributed.tensor
        with contextlib.suppress(ImportError):
            import sklearn.metrics  # transformers imports it where it is installed
        assert not {{"hmf", "transformers"}} & set(sys.modules)
        for first in {FIRST_IMPORTS!r}:
            if os.fork():
                os.wait()
                continue
            exec(first)
            from transformers import AutoModelForCausalLM
            print(first, type(AutoModelForCausalLM.from_pretrained({str(STORED)!r})).__name__, sep=": ")
            break
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [f"{first}: HybridQwen3ForCausalLM" for first in FIRST_IMPORTS], done.stderr


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, hmf.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})


def test_a_wrong_recipe_is_found_without_torch(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("colour: blue\n")
    code = f"""if True:
        import sys, hmf.cli
        for command in ("distill", "finetune", "prime"):
            sys.argv = ["hmf", command, {str(recipe)!r}]
            try:
                hmf.cli.main()
            except SystemExit as end:
                print(command, end.code, "torch" in sys.modules)
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["distill 2 False", "finetune 2 False", "prime 2 False"]
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(f"{recipe}: " in line and "unknown key 'colour'" in line for line in lines)


def test_classes_can_be_imported_by_name_and_models_pickled(tiny_qwen3):
    from hmf.model.configuration import HybridQwen3Config
    from hmf.model.modeling import HybridQwen3ForCausalLM

    config = HybridQwen3Config(**{**tiny_qwen3.config.to_dict(), "hybrid_override_pattern": "*-GDN-*-*"})
    model = HybridQwen3ForCausalLM(config).eval()
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is HybridQwen3ForCausalLM
    assert again.config.to_dict() == config.to_dict()
    ids = torch.arange(5)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ImportError):
        exec("from hmf.model.modeling import HybridNothingModel")


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("num_attention_heads", 0, "num_attention_heads: 0 is not a whole number from 1 to"),
        ("num_hidden_layers", 10**9, "num_hidden_layers: 1000000000 is not a whole number from 1 to 10,000"),
        ("hidden_size", -64, "hidden_size: -64 is not"),
        ("vocab_size", "many", "vocab_size: 'many' is not"),
        ("num_key_value_heads", 3, ""),
        ("hidden_act", "nonsense", "nonsense"),
        ("dtype", "float12", "float12"),
        ("layer_types", "full", ""),
        ("rms_norm_eps", "small", ""),
        ("head_dim", 7.5, "head_dim: 7.5 is not"),
    ],
)
def test_configs_that_make_no_model_are_one_line(tiny_qwen3_dir, tmp_path, key, value, line):
    """Whatever part of transformers fails on it, and before memory is asked for."""
    shutil.copytree(tiny_qwen3_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(HmfError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert str(file) in message or str(tmp_path) in message
    assert line in message and "\n" not in message
