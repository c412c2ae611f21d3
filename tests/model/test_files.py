# SPDX-License-Identifier: Apache-2.0
"""What users' checkpoint folders hold is used, kept through init and export, or refused by name."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hmf
from hmf.config.pattern import Pattern
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.model.checkpoint import load_config, load_model
from hmf.model.files import require_finite, stored_tensors, weight_files
from hmf.pipeline import evaluate_checkpoint
from hmf.priming.export import export
from hmf.priming.stage0 import make_stage0

PATTERN = Pattern.parse("*-GDN-*-GDN")
TEACHER = Path(hmf.__file__).parent / "assets" / "teacher"
WEIGHTS = "model.safetensors"
EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 5\n"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def base(tiny_qwen3_dir, tmp_path) -> Path:
    """A copy of a small Transformer, untied, in float32, to be changed."""
    return shutil.copytree(tiny_qwen3_dir, tmp_path / "base")


def edit_json(file: Path, **fields) -> None:
    content = (json.loads(file.read_text()) if file.exists() else {}) | fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def edit(folder: Path, change) -> dict[str, torch.Tensor]:
    """`change`, a function of the dict of tensors, applied to the file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def shard(folder: Path, second=(HEAD,)) -> None:
    """As two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = {name: SECOND if name in second else FIRST for name in tensors}
    for file in (FIRST, SECOND):
        save_file({name: x for name, x in tensors.items() if homes[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))


def primed(base: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of Stage 0 and of the exported Hybrid."""
    make_stage0(base, PATTERN, base.parent / "stage0")
    export(base.parent / "stage0", base.parent / "hybrid")
    return load_file(base.parent / "stage0/model.safetensors"), load_file(base.parent / "hybrid/model.safetensors")


@pytest.fixture(scope="module")
def primed_once(tiny_qwen3_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("primed")
    primed(shutil.copytree(tiny_qwen3_dir, folder / "base"))
    return folder


@pytest.fixture
def primed_base(primed_once, tmp_path) -> Path:
    """Such a copy beside its own stage0 and hybrid, to be changed too."""
    return shutil.copytree(primed_once, tmp_path, dirs_exist_ok=True) / "base"


def same(kept: torch.Tensor, given: torch.Tensor) -> bool:
    return kept.dtype == given.dtype and torch.equal(kept, given)


def refused(said: str, work, *arguments) -> None:
    with pytest.raises(HmfError, match=said) as error:
        work(*arguments)
    assert "\n" not in str(error.value)


# --- heads ---


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("amount", [0.2, 1e-6])  # in bfloat16 the second one is no difference
def test_a_head_of_its_own_is_kept_though_the_config_ties_it(base, shards, amount, capfd):
    def own_head(tensors):
        tensors[HEAD] = tensors[EMBEDDINGS] * (1 + amount)

    given = edit(base, own_head)
    edit_json(base / "config.json", tie_word_embeddings=True, dtype="bfloat16")
    if shards:
        shard(base)
    fused, hybrid = primed(base)
    assert same(fused[HEAD], given[HEAD]) and same(hybrid[HEAD], given[HEAD])
    assert same(fused[EMBEDDINGS], given[EMBEDDINGS]) and same(hybrid[EMBEDDINGS], given[EMBEDDINGS])
    for name in ("stage0", "hybrid"):
        assert json.loads((base.parent / name / "config.json").read_text())["tie_word_embeddings"] is False
    lines = [line for line in capfd.readouterr().err.splitlines() if "tie_word_embeddings" in line]
    assert len(lines) == 1 and HEAD in lines[0] and str(base) in lines[0]


def test_a_hybrid_with_a_merged_head_computes_with_it(primed_base, tmp_path):
    hybrid = tmp_path / "hybrid"
    edit_json(hybrid / "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(hybrid)
    model.save_pretrained(tmp_path / "again")
    assert not model.config.tie_word_embeddings
    assert same(load_file(tmp_path / "again/model.safetensors")[HEAD], load_file(hybrid / "model.safetensors")[HEAD])


@pytest.mark.parametrize("present", [{EMBEDDINGS}, {HEAD}, {EMBEDDINGS, HEAD}])
def test_a_tied_head_is_stored_under_either_name_or_both(base, present):
    def tie(tensors):
        matrix = tensors.pop(EMBEDDINGS)
        del tensors[HEAD]
        tensors.update({name: matrix.clone() for name in present})

    given = edit(base, tie)
    edit_json(base / "config.json", tie_word_embeddings=True)
    _, hybrid = primed(base)
    model = load_model(base.parent / "hybrid")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert same(hybrid[EMBEDDINGS], given[next(iter(present))])


def test_a_head_that_is_not_there_is_named(base):
    edit(base, lambda tensors: tensors.pop(HEAD))
    refused(f"missing: {HEAD}; .*tie_word_embeddings", make_stage0, base, PATTERN, base.parent / "out")


# --- dtypes ---

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.sampled_from(["float32", "bfloat16", "float16", "absent"]),
    kinds=st.tuples(*[st.sampled_from(DTYPES)] * 4),
)
def test_every_tensor_keeps_its_dtype_and_its_digits(tiny_qwen3_dir, tmp_path_factory, config, kinds):
    """Files that mix dtypes, under a config that names any: float32 norms or routers among bfloat16 weights, say."""
    base = shutil.copytree(tiny_qwen3_dir, tmp_path_factory.mktemp("mixed") / "base")
    parts = ("norm", "mlp", "self_attn", "")

    def mix(tensors):
        for name, x in tensors.items():
            kind = kinds[next(i for i, part in enumerate(parts) if part in name)]
            tensors[name] = (x.double() * (1 + 1e-9)).to(kind)

    given = edit(base, mix)
    edit_json(base / "config.json", dtype=config)
    fused, hybrid = primed(base)
    assert all(same(fused[name], x) for name, x in given.items())
    left = [name for name in given if not re.search(r"layers\.[13]\.self_attn", name)]
    assert all(same(hybrid[name], given[name]) for name in left)
    for name in ("q_proj", "o_proj"):  # copied into the mixer
        assert same(hybrid[f"model.layers.1.gdn.{name}.weight"], given[f"model.layers.1.self_attn.{name}.weight"])
    if config != "absent":
        assert json.loads((base.parent / "hybrid/config.json").read_text())["dtype"] == config
    load_model(base.parent / "hybrid")


def test_experts_and_routers_keep_their_dtypes(tmp_path):
    """Routers in float32 among experts in bfloat16; experts that are merged in memory keep their digits."""
    base = tmp_path / "base"
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 8}
    experts = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).bfloat16().save_pretrained(base)

    def widen(tensors):
        for name in [name for name in tensors if "mlp.gate." in name or "layers.2.mlp.experts.1.up_proj" in name]:
            tensors[name] = tensors[name].float() * 1.0001

    given = edit(base, widen)
    fused, hybrid = primed(base)
    assert fused.keys() > given.keys()
    for name, x in given.items():
        merged = "layers.2.mlp.experts" in name  # in the widest dtype of its experts
        assert same(fused[name], x) or (merged and torch.equal(fused[name], x.float())), name
        assert name not in hybrid or same(hybrid[name], fused[name])


def test_copies_of_wider_norms_keep_their_digits(base):
    given = edit(base, lambda t: t.update({n: x.bfloat16() for n, x in t.items() if "norm" not in n}))
    for name in ("q_norm.weight", "q_proj.weight"):
        given[f"model.layers.1.self_attn.{name}"] += 0.1
    save_file(given, base / "model.safetensors", {"format": "pt"})
    make_stage0(base, Pattern.parse("*-SWA-*-*"), base.parent / "out")
    fused = load_file(base.parent / "out/model.safetensors")
    for name in ("q_norm.weight", "q_proj.weight"):
        assert same(fused[f"model.layers.1.swa.{name}"], given[f"model.layers.1.self_attn.{name}"])


def test_what_is_narrowed_is_named(base, capfd):
    edit_json(base / "config.json", dtype="bfloat16")
    model = load_model(base)
    line = capfd.readouterr().err
    assert model.dtype == torch.bfloat16 and line.count("\n") == 1
    assert (
        f"{base}: 47 of 47 tensors are cast to a narrower dtype" in line
        and "from float32 to bfloat16; to keep precision, set dtype in" in line
    )
    load_model(base, dtype=torch.float32)
    assert capfd.readouterr().err == ""


def test_export_names_what_it_casts(base, capfd):
    make_stage0(base, PATTERN, base.parent / "stage0")
    capfd.readouterr()
    export(base.parent / "stage0", base.parent / "out", torch.bfloat16)
    err = capfd.readouterr().err
    assert re.search(rf"{base.parent / 'stage0'}: \d+ of \d+ tensors are cast to bfloat16: model\.", err)


def test_export_refuses_what_its_dtype_cannot_hold(base):
    edit(base, lambda tensors: tensors.update({NORM: torch.full((64,), 7e4)}))
    make_stage0(base, PATTERN, base.parent / "stage0")
    said = f"--dtype float16: tensor {NORM} has 64 values beyond its range; leave the dtype out"
    refused(said, export, base.parent / "stage0", base.parent / "out", torch.float16)
    assert not (base.parent / "out").exists()
    export(base.parent / "stage0", base.parent / "out", torch.bfloat16)


# --- tensors and files ---


def test_old_checkpoints_carry_rotary_frequencies(base, capfd):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(base, lambda tensors: tensors.update({name: torch.ones(8)}))
    report = make_stage0(base, PATTERN, base.parent / "out")
    assert report.kept == len(load_file(base / "model.safetensors")) - 1
    assert f"1 tensors are computed from config.json, not read: {name}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["lm_head.bias", "module.model.norm.weight", "score.weight", "transformer.h.0.w"])
def test_an_extra_tensor_is_refused(base, name):
    edit(base, lambda tensors: tensors.update({name: torch.ones(8)}))
    refused(f"not of this model: {name}", make_stage0, base, PATTERN, base.parent / "out")


def test_names_with_a_prefix_are_named_beside_a_tied_head(base):
    edit_json(base / "config.json", tie_word_embeddings=True)
    tensors = {f"language_{name}": x for name, x in load_file(base / WEIGHTS).items() if name != HEAD}
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    said = f"has no tensor {EMBEDDINGS}, but has language_{EMBEDDINGS}; check whether it was renamed"
    refused(said, make_stage0, base, PATTERN, base.parent / "out")


def in_two_shards(base: Path) -> None:
    tensors = load_file(base / SECOND) | {NORM: torch.ones(64)}
    save_file(tensors, base / SECOND, {"format": "pt"})


def points_at(name, tensor=HEAD):
    def change(base: Path) -> None:
        index = base / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"][tensor] = name
        index.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (in_two_shards, f"{SECOND}: tensor {NORM} is in {FIRST} too"),
        (lambda base: shutil.copy(base / SECOND, base / "model-00003-of-00003.safetensors"), "00003.*: not used by"),
        (lambda base: shutil.copy(base / SECOND, base / "model.safetensors-1-of-1.safetensors"), "-1.*: not used by"),
        (lambda base: shutil.copy(base / SECOND, base / "model.safetensors"), "both model.safetensors and .*index"),
        (points_at("../x.safetensors"), r"weight_map: lm_head.weight: '../x.safetensors' is not the name of a file"),
        (points_at("/etc/passwd"), "'/etc/passwd' is not the name of a file in this folder"),
        (points_at("sub/x.safetensors"), "'sub/x.safetensors' is not the name"),
        (points_at(".."), "'..' is not the name"),
        (points_at(3), "3 is not the name"),
        (points_at(FIRST, "model.extra"), "index.json: weight_map: model.extra: in none of the weight files; copy"),
        (
            lambda base: save_file({"x": torch.ones(1)}, base / SECOND),
            f"weight_map: {HEAD}: in none of the weight files",
        ),
        (
            lambda base: edit_json(base / "model.safetensors.index.json", metadata="absent"),
            "index.json: metadata: .*add",
        ),
    ],
)
def test_shards_that_are_not_clear(base, change, said):
    shard(base)
    weight_files(base)
    change(base)
    for load in (load_config, load_model, base_stage0):
        refused(said, load, base)


def base_stage0(base: Path) -> None:
    make_stage0(base, PATTERN, base.parent / "out")


def test_a_tensor_that_the_index_does_not_list_is_used(base):
    given = load_file(base / "model.safetensors")
    shard(base)
    edit_json(base / "model.safetensors.index.json", weight_map={NORM: FIRST, HEAD: SECOND})
    fused, _ = primed(base)
    assert all(same(fused[name], x) for name, x in given.items())


def test_shards_of_other_names_are_not_said_to_be_left_out(base, capfd):
    shard(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    for name in (FIRST, SECOND):
        (base / name).rename(base / f"of-{name}")
    (base / "other.safetensors").write_bytes(b"")
    edit_json(base / "model.safetensors.index.json", weight_map={name: f"of-{file}" for name, file in index.items()})
    primed(base)
    assert "not copied to the result: other.safetensors\n" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["Qwen3ForSequenceClassification", "Qwen3ForRewardModel", "Qwen3ForCausalLMEagle3", "LlamaModel"]
)
def test_other_heads_are_refused_by_name(base, name):
    edit_json(base / "config.json", architectures=[name])
    for load in (load_model, load_config):
        with pytest.raises(HmfError, match=f"config.json: architectures: {name} is not a causal language model; give"):
            load(base)
    for named in ("Qwen3ForCausalLM", "Qwen3Model", "AnyForCausalLM"):
        edit_json(base / "config.json", architectures=[named])
        load_config(base)


def test_float64_stays_float64(base, capfd):
    """Also vectors that no cast makes narrower than float32."""
    edit(base, lambda tensors: tensors.update({name: x.double() for name, x in tensors.items()}))
    edit_json(base / "config.json", dtype="float64")
    _, hybrid = primed(base)
    assert {x.dtype for x in hybrid.values()} == {torch.float64}
    loaded = load_model(base.parent / "hybrid").state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in hybrid.items())
    assert "narrower" not in capfd.readouterr().err


def test_two_copies_of_a_parameter(base):
    edit(base, lambda tensors: tensors.update({"norm.weight": torch.ones(64)}))
    refused(f"tensor norm.weight is stored as {NORM} too", base_stage0, base)


def test_a_file_without_tensors(base):
    save_file({}, base / "model.safetensors", {"format": "pt"})
    refused("model.safetensors: has no tensors", base_stage0, base)


def test_the_decoder_s_own_names_are_read(base):
    """As a decoder saved alone writes them."""

    def rename(tensors):
        del tensors[HEAD]
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name).bfloat16()

    given = edit(base, rename)
    edit_json(base / "config.json", tie_word_embeddings=True)
    fused, _ = primed(base)
    assert all(same(fused[f"model.{name}"], x) for name, x in given.items())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_file_that_git_lfs_has_not_downloaded(base, name):
    (base / name).write_bytes(POINTER)
    refused(
        f"{name}: is a pointer of Git LFS, not the file; run `git lfs pull`", partial(load_model, generates=True), base
    )


def test_weights_in_another_format_alone(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    refused(r"no weights .*pytorch_model\.bin cannot be read", load_model, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_not_applied_silently(primed_base, name):
    base = primed_base
    for folder in (base, base.parent / "stage0", base.parent / "hybrid"):
        (folder / name).write_text('{"peft_type": "LORA"}')
    said = f"{name}: adapters are not supported; merge it first"
    refused(said, base_stage0, base)
    refused(said, export, base.parent / "stage0", base.parent / "out")
    for load in (load_config, load_model):
        refused(said, load, base.parent / "hybrid")
    (base.parent / "hybrid" / "config.json").unlink()  # as peft saves an adapter
    refused(said, load_config, base.parent / "hybrid")


def test_from_pretrained_refuses_an_adapter(primed_base):
    hybrid = primed_base.parent / "hybrid"
    (hybrid / "adapter_model.safetensors").write_bytes(b"")
    refused("adapters are not supported; merge it first", AutoModelForCausalLM.from_pretrained, hybrid)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [*((dtype, torch.nan) for dtype in DTYPES), (torch.float32, torch.inf), (torch.bfloat16, -torch.inf)],
)
def test_numbers_that_are_none(primed_base, dtype, value):
    base = primed_base
    for folder in (base, base.parent / "stage0"):
        edit(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
        require_finite(folder)
        edit(folder, lambda tensors: tensors[NORM][2:5].fill_(value))
    said = f"model.safetensors: tensor {NORM}: 3 of 64 values are NaN or infinite"
    refused(f"base/{said}", make_stage0, base, PATTERN, base.parent / "out")
    refused(f"stage0/{said}", export, base.parent / "stage0", base.parent / "out")
    assert not (base.parent / "out").exists()


# --- links and code ---


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt", "chat_templates/a.jinja"])
def test_a_link_out_of_the_folder_is_refused(base, name):
    outside = base.parent / "outside"
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).rename(outside) if (base / name).exists() else outside.write_text("secret")
    (base / name).symlink_to(outside)
    refused(f"{name}: is a symbolic link out of the checkpoint", base_stage0, base)
    refused(f"{name}: is a symbolic link out of the checkpoint", load_tokenizer, base)


def test_a_snapshot_of_the_hub_s_cache_is_a_base(base):
    """It is links to the blobs beside it, and to no others."""
    repository = base.parent / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (base / "tokenizer_notes.txt").write_text("travels")
    for number, file in enumerate(base.iterdir()):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    (base.parent / "mine").symlink_to(snapshot)  # a name of the user's own for it
    for name in (snapshot, base.parent / "mine"):
        out = base.parent / f"out-{name.name}"
        make_stage0(name, PATTERN, out)
        assert (out / "tokenizer_notes.txt").read_text() == "travels" and not (out / "tokenizer_notes.txt").is_symlink()
    (snapshot / "more.txt").symlink_to(base / "config.json")
    refused("more.txt: is a symbolic link out of", load_config, snapshot)
    (snapshot / "more.txt").unlink()
    (snapshot / "more.txt").symlink_to(blobs / "gone")
    refused("more.txt: is a broken symbolic link", load_config, snapshot)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_an_implementation_on_the_hub_is_dropped(primed_base, key, capfd):
    base, hybrid = primed_base, primed_base.parent / "hybrid"
    for folder in (base, hybrid):
        edit_json(folder / "config.json", **{key: "org/kernel"})
        config = load_config(folder, weights=False)
        assert "org/kernel" not in (config._attn_implementation, config._experts_implementation)
        assert f"{key}: 'org/kernel' is ignored" in capfd.readouterr().err
    for model in (load_model(base), AutoModelForCausalLM.from_pretrained(hybrid)):
        assert model.config._attn_implementation == "sdpa"
    chosen = type(model).from_pretrained(hybrid, attn_implementation="eager")
    assert chosen.config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(hybrid)
    assert type(chosen).from_pretrained(hybrid, config=config).config._attn_implementation == "sdpa"
    assert type(chosen).from_pretrained(hybrid).config._attn_implementation == "sdpa"
    fused = base.parent / "again"
    make_stage0(base, PATTERN, fused)
    assert "org/kernel" not in (fused / "config.json").read_text()


def test_a_config_does_not_choose_other_weights(base):
    edit_json(base / "config.json", transformers_weights="other.safetensors")
    refused("transformers_weights: .*delete the key", load_config, base)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "tomorrow", None])
def test_plain_weights_under_a_quantised_config(base, key, method):
    """transformers ignores the key, or quantises the weights or asks for a package, by method and machine."""
    edit_json(base / "config.json", **{key: {"quant_method": method, "bits": 4}})
    for load in (load_config, load_model, base_stage0):
        refused(f"config.json: {key}: none of the weights are quantised; delete the key", load, base)


# --- tokens and generation ---


@pytest.fixture
def worded(base) -> Path:
    """The base with a tokenizer of 2,048 entries and as many embeddings."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TEACHER / name, base)
    edit(base, lambda tensors: tensors.update({name: torch.randn(2048, 64) for name in (EMBEDDINGS, HEAD)}))
    edit_json(base / "config.json", vocab_size=2048)
    return base


def test_a_tokenizer_larger_than_the_model(worded, capfd):
    assert len(load_tokenizer(worded)) == 2048
    tokenizer = load_tokenizer(worded)
    tokenizer.add_tokens(["<cite>", "<|note|>"])
    tokenizer.save_pretrained(worded)
    said = "the tokenizer has 2050 entries, the model 2048 embeddings"
    refused(said, load_tokenizer, worded)
    refused(said, base_stage0, worded)
    (worded / "config.json").unlink()  # a tokenizer alone
    assert len(load_tokenizer(worded)) == 2050


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text('{"a":'), "the tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "the tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json: is not a JSON object"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not valid JSON"),
        (lambda f: (f / "special_tokens_map.json").write_text(""), "special_tokens_map.json: not valid JSON"),
        (lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="Own"), "transformers has no class 'Own'"),
        (
            lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class=3),
            "transformers has no class 3",
        ),
        (lambda f: edit_json(f / "tokenizer_config.json", eos_token=3), "the tokenizer cannot be loaded"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "the tokenizer cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_bytes(POINTER), r"tokenizer\.json: is a pointer of Git LFS"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(worded, damage, said, capfd):
    """It travels through init, which needs none, and is refused by what does."""
    damage(worded)
    refused(said, load_tokenizer, worded)
    base_stage0(worded)
    assert re.search(f"{said}.*need it", capfd.readouterr().err)
    for file in worded.glob("tokenizer*"):
        assert (worded.parent / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (5, "chat_template: must be text, or a list"),
        (["{{ messages }}"], "chat_template: must be text, or a list"),
        ([{"name": "default"}], "chat_template: must be text, or a list"),
        ({"default": None}, "chat_template: must be text, or a list"),
        ([{"name": "default", "template": x} for x in "ab"], "chat_template: two templates have the name 'default'"),
    ],
)
def test_chat_templates_that_are_none_are_refused(worded, template, message):
    edit_json(worded / "tokenizer_config.json", chat_template=template)
    refused(f"tokenizer_config.json: {message}", load_tokenizer, worded)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_chat_template_in_two_files(worded, capfd, as_list):
    """transformers reads the one in the file of its own."""
    file = worded / "chat_template.jinja"
    for text, differs in ((file.read_text(), False), (file.read_text().rstrip("\n"), False), ("{{ messages }}", True)):
        template = [{"name": "default", "template": text}] if as_list else text
        edit_json(worded / "tokenizer_config.json", chat_template=template)
        assert load_tokenizer(worded).chat_template == file.read_text()
        assert ("chat_template of tokenizer_config.json differs and is not read" in capfd.readouterr().err) == differs


def test_text_is_not_trained_on_without_a_tokenizer(base, tmp_path):
    from hmf.config.runs import DistillSettings
    from hmf.training.distill import distill

    make_stage0(base, PATTERN, tmp_path / "stage0")
    recipe = DistillSettings.model_validate(
        {
            "data": {"text": "stdlib", "sequence_length": 32},
            "training": {"max_steps": 1, "per_device_train_batch_size": 1},
        }
    )
    refused("stage0: has no tokenizer", distill, tmp_path / "stage0", tmp_path / "run", recipe)
    assert not (tmp_path / "run/stage1").exists()


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", [2, 128]), ("pad_token_id", 128), ("bos_token_id", -1)])
def test_special_tokens_have_embeddings(base, key, value):
    edit_json(base / "config.json", **{key: value})
    refused(rf"config.json: {key}: (128|-1) is not a token id .* 128;", base_stage0, base)


@pytest.mark.parametrize(
    "content",
    [
        b'{"temperature": 0.6,\t"do_sample": false}\r\n',  # what transformers refuses to save
        b'{"max_new_tokens": 0, "own": {"a": [1, 2]}}',  # and to read
        b'{"eos_token_id": 70000}',
        b'{"half": ',
        b"\xff\xfe",
    ],
)
def test_the_generation_config_travels_whatever_it_holds(worded, content):
    (worded / "generation_config.json").write_bytes(content)
    primed(worded)
    for name in ("stage0", "hybrid"):
        assert (worded.parent / name / "generation_config.json").read_bytes() == content
    if b"do_sample" not in content:  # where it is read, it is an error
        from hmf.config.runs import EvaluateSettings

        options = EvaluateSettings.model_validate({"tasks": ["recall"], "samples": 1, "text_bytes": 0, "length": 96})
        refused("hybrid/generation_config.json: ", evaluate_checkpoint, worded.parent / "hybrid", options)


# --- modes and permissions ---


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_files_have_the_modes_of_new_files(base, umask):
    (base / "special_tokens_map.json").write_text("{}")
    (base / "special_tokens_map.json").chmod(0o400)
    before = os.umask(umask)
    try:
        primed(base)
    finally:
        os.umask(before)
    for folder in (base.parent / "stage0", base.parent / "hybrid"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o666 & ~umask}


def test_no_permission_is_named(tiny_qwen3_dir, tmp_path):
    """In a process without the privilege of passing over modes, which the administrator's have."""
    locked = []
    for number, name in enumerate(("config.json", "model.safetensors", "notes.txt", ".", "../output")):
        base = shutil.copytree(tiny_qwen3_dir, tmp_path / str(number) / "base")
        (base / "notes.txt").write_text("a companion")
        (base.parent / "output").mkdir()
        locked.append((base / name).resolve())
    modes = [path.stat().st_mode for path in locked]
    for path in locked:
        path.chmod(0o000)
    code = f"""if True:
        from hmf.config.pattern import Pattern
        from hmf.errors import HmfError
        from hmf.priming.stage0 import make_stage0
        for number in range({len(locked)}):
            case = {str(tmp_path)!r} + f"/{{number}}"
            try:
                make_stage0(f"{{case}}/base", Pattern.parse("*-GDN-*-GDN"), f"{{case}}/output/out")
                print("made")
            except HmfError as error:
                print(error)
    """
    libc, drop = ctypes.CDLL(None), 24  # prctl's PR_CAPBSET_DROP; of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: (libc.prctl(drop, 1, 0, 0, 0), libc.prctl(drop, 2, 0, 0, 0)),
    )
    for path, mode in zip(locked, modes, strict=True):
        path.chmod(mode)
    lines = done.stdout.splitlines()
    assert len(lines) == len(locked), done.stdout + done.stderr
    for path, line in zip(locked, lines, strict=True):
        assert "no permission" in line and str(path) in line, line


def test_the_table_of_tensors_is_that_of_the_files(base):
    given = load_file(base / "model.safetensors")
    found = stored_tensors(base)
    assert {name: list(x.shape) for name, x in given.items()} == {name: x.shape for name, x in found.items()}
    assert {x.dtype for x in found.values()} == {"F32"}
