# SPDX-License-Identifier: Apache-2.0
"""The language model of a multimodal checkpoint: in text it computes the same, bit for bit."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.pattern import Pattern
from hmf.config.recipes import read_recipe
from hmf.config.runs import PrimeRecipe
from hmf.data.tokenizer import train_tokenizer
from hmf.errors import HmfError
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_config, load_model, published_tensors
from hmf.model.text_only import language_config, take_text
from hmf.pipeline import prime
from hmf.planning.training import plans
from hmf.priming.stage0 import base_config, make_stage0, text_of
from tests.hybrids import random_ids, randomise
from tests.model.test_families import (
    BASES,
    GEMMA,
    OWN,
    SHARED_EXPERT,
    SIZES,
    TWO_TABLES,
    YARN,
    stock_model,
    teacher_logits,
)
from tests.test_cli import run as call

VISION = {
    "pixtral": {"num_attention_heads": 2, "image_size": 32},
    "siglip_vision_model": {"num_attention_heads": 2, "image_size": 32},
    "qwen2_vl": {"depth": 1, "num_heads": 2, "embed_dim": 16, "hidden_size": 32},
    "qwen2_5_vl": {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
    "qwen3_5_vision": {"depth": 1, "num_heads": 2, "out_hidden_size": 32},
    "qwen3_5_moe_vision": {"depth": 1, "num_heads": 2, "out_hidden_size": 32},
    "qwen3_vl": {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
}
COMMON = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 16}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
INTERLEAVED = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_theta": 1e4}
# class -> vision tower, fields of the text config, fields of the whole config, family of the language model
WHOLE = {
    "mistral3-ministral3": (
        "Mistral3",
        "pixtral",
        {"model_type": "ministral3", "head_dim": 12, "rope_parameters": YARN, "sliding_window": 5},
        {"tie_word_embeddings": False},
        "ministral3",
    ),
    "mistral3-mistral": (
        "Mistral3",
        "pixtral",
        {"model_type": "mistral", "head_dim": 12, "sliding_window": None},
        {"tie_word_embeddings": True},
        "mistral",
    ),
    "gemma3": (
        "Gemma3",
        "siglip_vision_model",
        GEMMA | {"rope_parameters": TWO_TABLES, "sliding_window_pattern": 2},
        {"mm_tokens_per_image": 4},
        "gemma3_text",
    ),
    "qwen2_vl": ("Qwen2VL", "qwen2_vl", {"rope_parameters": MROPE}, {"tie_word_embeddings": False}, "qwen2"),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        "qwen2_5_vl",
        {"rope_parameters": MROPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        {"tie_word_embeddings": False},
        "qwen2",
    ),
    "qwen2_5_vl-tied": ("Qwen2_5_VL", "qwen2_5_vl", {"rope_parameters": MROPE}, {"tie_word_embeddings": True}, "qwen2"),
    "qwen3_5": (
        "Qwen3_5",
        "qwen3_5_vision",
        OWN | {"layer_types": ["linear_attention", "full_attention"] * 2},
        {"tie_word_embeddings": False},
        "qwen3_5_text",
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        "qwen3_5_moe_vision",
        OWN | SHARED_EXPERT | {"layer_types": ["linear_attention", "full_attention"] * 2},
        {"tie_word_embeddings": False},
        "qwen3_5_moe_text",
    ),
    "qwen3_vl": (
        "Qwen3VL",
        "qwen3_vl",
        {"rope_scaling": INTERLEAVED, "head_dim": 8, "attention_bias": True},
        {"tie_word_embeddings": False},
        "qwen3",
    ),
}
PATTERN = Pattern.parse("*-GDN-*-GDN")
SMOLVLM = "SmolVLMForConditionalGeneration"


def whole_model(name, path):
    """A random multimodal model, saved at `path` in more than one file, with a tokenizer."""
    prefix, vision, text, fields, _ = WHOLE[name]
    config = getattr(transformers, f"{prefix}Config")(
        text_config=SIZES | {"vocab_size": 300} | text,
        vision_config={"model_type": vision} | COMMON | VISION[vision],
        **fields,
    )
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    randomise(model)
    model.eval().save_pretrained(path, max_shard_size="16KB")
    tokenizer = train_tokenizer(["It's the year 2024, isn't it?\n"] * 4, 280, "", 64)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text("{}")
    return model


@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_the_language_model_computes_the_same(name, tmp_path):
    model, family = whole_model(name, tmp_path / "whole"), WHOLE[name][-1]
    report = take_text(tmp_path / "whole", tmp_path / "text")
    text, ids = load_model(tmp_path / "text"), random_ids(2, 17).clamp_min(11)
    assert text.config.model_type == report.family == family
    assert torch.equal(text(ids).logits, model(ids).logits)
    assert report.tensors == len(published_tensors(text)) - text.config.tie_word_embeddings
    assert report.left and set(report.left) <= {"vision_tower", "multi_modal_projector", "visual"}
    before, after = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("whole", "text"))
    assert before("It's 2024")["input_ids"] == after("It's 2024")["input_ids"]
    assert not (tmp_path / "text/preprocessor_config.json").exists()
    make_stage0(tmp_path / "text", PATTERN, tmp_path / "fused")
    assert torch.equal(teacher_logits(load_model(tmp_path / "fused"), ids), model(ids).logits)


@pytest.mark.parametrize("merged", ["experts.", "gate_up_proj"])
@torch.no_grad()
def test_experts_that_are_stored_merged(merged, tmp_path):
    """As in the published Qwen3.5-MoE; every one of these tensors is accounted for."""
    model, ids = whole_model("qwen3_5_moe", tmp_path / "whole"), random_ids(2, 9).clamp_min(11)
    for file in (tmp_path / "whole").glob("model*"):
        file.unlink()
    tensors = published_tensors(model, {name for name in model.state_dict() if merged in name})
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    save_file(tensors, tmp_path / "whole/model.safetensors", {"format": "pt"})
    make_stage0_of_text(tmp_path / "whole", tmp_path / "fused")
    assert torch.equal(teacher_logits(load_model(tmp_path / "fused"), ids), model(ids).logits)
    del tensors["model.language_model.layers.1.mlp.experts.gate_up_proj"]
    save_file(tensors, tmp_path / "whole/model.safetensors", {"format": "pt"})
    with pytest.raises(HmfError, match="tensors missing: model.layers.1.mlp.experts.0.gate_proj.weight"):
        make_stage0_of_text(tmp_path / "whole", tmp_path / "again")


SPEECH = {
    "encoder_config": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dim_head": 8, "context_size": 8},
    "projector_config": COMMON | {"model_type": "blip_2_qformer", "num_attention_heads": 2, "encoder_hidden_size": 16},
}


@torch.no_grad()
def test_granite_speech(tmp_path, monkeypatch, capsys):
    """Its encoder counts batches in integers, its adapter is for sound only, and its class does not scale logits."""
    text = SIZES | {"model_type": "granite", "vocab_size": 300, "embedding_multiplier": 2.0, "logits_scaling": 1.0}
    config = transformers.GraniteSpeechConfig(text_config=text, has_lora_adapter=False, audio_token_index=299, **SPEECH)
    model, whole, ids = transformers.GraniteSpeechForConditionalGeneration(config), tmp_path / "whole", random_ids(2, 9)
    randomise(model)
    model.eval().save_pretrained(whole)
    train_tokenizer(["It's the year 2024, isn't it?\n"] * 4, 280, "", 64).save_pretrained(whole)
    arguments = ("init", whole, "--ratio", "0.5", "--out", tmp_path / "stage0")
    assert "'granite_speech' is a multimodal model; use its language model" in call(monkeypatch, capsys, *arguments)[2]
    assert call(monkeypatch, capsys, *arguments, "--text-only")[0] == 0
    assert torch.equal(teacher_logits(load_model(tmp_path / "stage0"), ids), model(ids).logits)
    content = json.loads((whole / "config.json").read_text())
    arguments = (*arguments[:-1], tmp_path / "other")
    (whole / "adapter_config.json").write_text("{}")
    (whole / "config.json").write_text(json.dumps(content | {"has_lora_adapter": True}))
    for option in ((), ("--text-only",)):
        err = call(monkeypatch, capsys, *arguments, *option)[2]
        assert "whole/adapter_config.json: granite_speech uses this adapter for sound only" in err
        assert "copy the checkpoint without adapter_config.json and give --text-only" in err
    (whole / "adapter_config.json").unlink()
    content["text_config"]["logits_scaling"] = 3.0
    (whole / "config.json").write_text(json.dumps(content))
    err = call(monkeypatch, capsys, *arguments, "--text-only")[2]
    assert "whole/config.json: text_config.logits_scaling: GraniteSpeechForConditionalGeneration of tran" in err
    assert "does not divide logits and its language model would; set the key to 1 to keep" in err


def test_integers_in_the_place_of_the_language_models_weights_are_refused(tmp_path):
    whole_model("mistral3-mistral", tmp_path / "whole")
    file = next(iter((tmp_path / "whole").glob("*.safetensors")))
    tensors = load_file(file)
    name = next(name for name in tensors if "language_model" in name)
    save_file(tensors | {name: tensors[name].long()}, file, {"format": "pt"})
    with pytest.raises(HmfError, match=f"tensor {re.escape(name)} has dtype I64, not one of F64"):
        take_text(tmp_path / "whole", tmp_path / "text")


def test_token_ids_that_are_defaults_of_the_whole_configs_class_are_not_the_language_models(tmp_path):
    """Idefics 3 and SmolVLM, whose class has a padding token beyond the vocabulary of most of its models."""
    text = SIZES | {"model_type": "llama", "vocab_size": 300}
    vision = COMMON | {"num_attention_heads": 2, "image_size": 32}
    config = transformers.SmolVLMConfig(text_config=text, vision_config=vision, architectures=[SMOLVLM])
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"eos_token_id": 7}))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("pad_token_id") > 300
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = language_config(load_config(tmp_path, weights=False), tmp_path)
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 1, 7)
    nested = {"text_config": content["text_config"] | {"pad_token_id": 128002}}
    for place, change in (("", {"pad_token_id": 128002}), ("text_config.", nested)):
        (tmp_path / "config.json").write_text(json.dumps(content | change))
        said = f"config.json: {place}pad_token_id: 128002 is not a token id below .* 300; set it"
        with pytest.raises(HmfError, match=said):
            language_config(load_config(tmp_path, weights=False), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "text", "said"),
    [
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, r"rope_scaling\.type: 'linear' is not read by"),
        ("mistral3", {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta: 1000000.0 is not read"),
        ("mistral3", {"hidden_act": "gelu_tan"}, "unknown hidden_act 'gelu_tan'"),
    ],
)
def test_keys_of_the_language_model_are_checked_as_its_own_config_s_are(model_type, text, said, tmp_path):
    """transformers reads them without a word, or stops without a name."""
    text = {"model_type": {"gemma3": "gemma3_text", "mistral3": "mistral"}[model_type]} | text
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": text}))
    with pytest.raises(HmfError, match=f"config.json: text_config: {said}"):
        load_config(tmp_path, weights=False)


@pytest.mark.parametrize(
    ("model_type", "rope", "said"),
    [
        ("qwen2_vl", {"type": "longrop", "mrope_section": [1, 1, 2]}, "rope_type: 'longrop' is not one of"),
        ("qwen3_vl", {"rope_type": "linear", "factor": 0.5, "mrope_section": [1, 1, 2]}, "factor: .*0.5"),
    ],
)
def test_positions_with_image_axes_are_checked_as_others_are(model_type, rope, said, tmp_path):
    content = {"model_type": model_type, "text_config": {"rope_scaling": rope}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(HmfError, match=rf"config.json: text_config: rope_parameters\.{said}"):
        language_config(load_config(tmp_path, weights=False), tmp_path)


@torch.no_grad()
def test_the_command(tmp_path):
    model, run = whole_model("mistral3-ministral3", tmp_path / "whole"), CliRunner().invoke
    settings = tmp_path / "whole/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    (tmp_path / "whole/chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "whole/chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    out = tmp_path / "runs/stage0"
    arguments = ["init", str(tmp_path / "whole"), "--pattern", "*-GDN-*-GDN", "--out", str(out)]
    with pytest.raises(
        HmfError, match=r"'mistral3' is a multimodal model; .*\(ministral3\): hmf init with --text-only"
    ):
        run(app, arguments, catch_exceptions=False)
    result = run(app, [*arguments, "--text-only"], catch_exceptions=False)
    left = r"ministral3 with \d+ tensors; left out: multi_modal_projector \(\d+ tensors\), vision_tower \(\d+ tensors\)"
    assert re.search(left, result.output)
    ids = random_ids(2, 9).clamp_min(11)
    assert torch.equal(teacher_logits(load_model(out), ids), model(ids).logits)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert [item.name for item in out.parent.iterdir()] == ["stage0"]


def test_notices_name_the_users_folder(tmp_path, monkeypatch, capsys):
    """And not the temporary copy of the language model, which they are about."""
    whole_model("mistral3-mistral", tmp_path / "whole")
    index = tmp_path / "whole/model.safetensors.index.json"
    content = json.loads(index.read_text())
    (name,) = (name for name in content["weight_map"] if name.endswith("embed_tokens.weight"))
    file = tmp_path / "whole" / content["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": -tensors[name]}, file, {"format": "pt"})
    content["weight_map"]["lm_head.weight"] = file.name
    index.write_text(json.dumps(content))
    arguments = ("init", tmp_path / "whole", "--text-only", "--ratio", "0.5", "--out", tmp_path / "stage0")
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 0 and f"{tmp_path / 'whole'}/config.json: tie_word_embeddings is true, but lm_head.weight dif" in err
    assert ".stage0-text" not in err


def test_a_plan_is_that_of_the_language_model(tmp_path, monkeypatch, capsys):
    """hmf plan needs no --text-only and no weights. hmf serve and hmf bench refuse, as hmf init does."""
    whole_model("qwen3_5_moe", tmp_path / "whole")
    take_text(tmp_path / "whole", tmp_path / "text")
    for name in ("whole", "text"):
        plan = ("plan", tmp_path / name, "--gpu", "h100", "--mixer", "gka", "--ratio", "0.5", "--json")
        code, rows, err = call(monkeypatch, capsys, *plan)
        assert code == 0 and ("without its modules for images" in err) == (name == "whole")
        (tmp_path / name / "plan").write_text(rows)
    assert (tmp_path / "whole/plan").read_text() == (tmp_path / "text/plan").read_text()
    quantised = json.loads((tmp_path / "whole/config.json").read_text()) | {"quantization_config": {"bits": 8}}
    (tmp_path / "whole/config.json").write_text(json.dumps(quantised))
    _, _, err = call(monkeypatch, capsys, "plan", tmp_path / "whole", "--gpu", "h100")
    assert "whole/config.json: quantization_config: plans need unquantised weights" in err
    for command in (["serve", "--dry-run"], ["bench", "distill"]):
        code, _, err = call(monkeypatch, capsys, *command, tmp_path / "whole")
        assert code == 2
        assert "whole/config.json: 'qwen3_5_moe' is a multimodal model; use its language model (qwen3_5_" in err


def test_what_is_no_multimodal_model_is_refused(tmp_path):
    whole_model("mistral3-mistral", tmp_path / "whole")
    take_text(tmp_path / "whole", tmp_path / "text")
    with pytest.raises(HmfError, match="text/config.json: 'mistral' reads only text; leave --text-only"):
        take_text(tmp_path / "text", tmp_path / "again")
    content = json.loads((tmp_path / "whole/config.json").read_text())
    for name in ("MistralForCausalLM", "LlavaLlamaForCausalLM"):
        (tmp_path / "whole/config.json").write_text(json.dumps(content | {"architectures": [name]}))
        with pytest.raises(HmfError, match=f"architectures: '{name}' is not a class of transformers for 'mistral3'"):
            take_text(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
def test_a_language_model_with_the_names_of_a_multimodal_one_is_refused(family, tmp_path):
    """transformers renames them at load, where a head beside tied embeddings would be lost."""
    model = stock_model(family, next(iter(BASES[family])), tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    tensors = {name.replace("model.", "model.language_model.", 1): x for name, x in published_tensors(model).items()}
    save_file(tensors | {"lm_head.weight": torch.randn(61, 32)}, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(
        HmfError, match=r"model.safetensors: tensor model.language_model.\S+ is named as .* --text-only"
    ):
        base_config(tmp_path / "base")


def make_stage0_of_text(source, out):
    with text_of(source, out, print) as text:
        make_stage0(text, PATTERN, out)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_every_tensor_of_the_language_model_is_accounted_for(change, tmp_path):
    whole_model("mistral3-mistral", tmp_path / "whole")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        tensors = load_file(file)
        name = next((name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight")), None)
        if name is not None:
            break
    if change == "missing":
        del tensors[name]
        said = f"{tmp_path / 'whole'}: tensors missing: model.layers.1.mlp.up_proj.weight"
    else:
        tensors[name.replace("up_proj", "side_proj")] = tensors[name].clone()
        said = f"tensor {name.replace('up_proj', 'side_proj')} is not in the language model that text_config describes"
    save_file(tensors, file, {"format": "pt"})
    index = tmp_path / "whole/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: at for key, at in content["weight_map"].items() if at != file.name}
    content["weight_map"] |= dict.fromkeys(tensors, file.name)
    index.write_text(json.dumps(content))
    with pytest.raises(HmfError, match=re.escape(said)):
        make_stage0_of_text(tmp_path / "whole", tmp_path / "fused")


def test_a_recipe_of_prime(tmp_path):
    """`text_only: true` puts the language model into the run folder, where it is the teacher; plans know the shapes."""
    whole_model("qwen2_5_vl-tied", tmp_path / "whole")
    recipe, prose = tmp_path / "recipe.yaml", tmp_path / "prose.txt"
    prose.write_text("It's the year 2024, isn't it?\n" * 50)
    data = f"{{text: {prose}, sequence_length: 32, text_share: 1.0, tasks: {{}}}}"
    recipe.write_text(
        f"base: {tmp_path / 'whole'}\ntext_only: true\noutput: {tmp_path / 'run'}\n"
        f"hybrid: {{mixer: gdn, ratio: 0.5}}\ndistill:\n  data: {data}\n"
        "  training: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 0.001}\n"
        "evaluate: {tasks: [], text_bytes: 0}\n"
    )
    (plan,) = plans([recipe], resolve_base, "h200x1")
    assert plan.ranks == 1
    prime(*read_recipe(recipe, PrimeRecipe))
    assert load_config(tmp_path / "run/base").model_type == "qwen2"
    assert load_config(tmp_path / "run/model").model_type == "hybrid_qwen2"
