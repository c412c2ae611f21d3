# SPDX-License-Identifier: Apache-2.0
"""A Hybrid's files and training in the hands of transformers and peft, as its base's; see `test_as_base`."""

import copy
import json
import pickle

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hmf.data.tokenizer import train_tokenizer
from hmf.errors import HmfError
from hmf.model.convert import drop_teacher
from tests.hybrids import random_ids
from tests.twins import IDS, MASK, PADDED, SETTINGS, close, fused_model, generate, greedy

# Ways to load a folder; each gives the saved model.
LOADS = {
    "keyword": lambda f, m: type(m).from_pretrained(pretrained_model_name_or_path=str(f)),
    "auto by keyword": lambda f, m: AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=f),
    "subfolder": lambda f, m: type(m).from_pretrained(f.parent / "run", subfolder=f.name),
    "auto, subfolder": lambda f, m: AutoModelForCausalLM.from_pretrained(str(f.parent / "run"), subfolder=f.name),
    "state_dict": lambda f, m: type(m).from_pretrained(None, config=m.config, state_dict=m.state_dict()),
    "config": lambda f, m: type(m).from_pretrained(f, config=AutoConfig.from_pretrained(f)),
    "config by path": lambda f, m: type(m).from_pretrained(f, config=str(f)),
    "device_map": lambda f, m: AutoModelForCausalLM.from_pretrained(f, device_map="cpu"),
    "device_map of all": lambda f, m: AutoModelForCausalLM.from_pretrained(f, device_map={"": "cpu"}),
    "dtype by part": lambda f, m: AutoModelForCausalLM.from_pretrained(f, dtype={"": "float32"}),
    "accelerate": lambda f, m: dispatched(f),
    "auto dtype": lambda f, m: AutoModelForCausalLM.from_pretrained(f, dtype="auto"),
    "wider": lambda f, m: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64).float(),
    "torch_dtype": lambda f, m: AutoModelForCausalLM.from_pretrained(f, torch_dtype="float32"),
    "loading info": lambda f, m: AutoModelForCausalLM.from_pretrained(f, output_loading_info=True)[0],
    "safetensors": lambda f, m: AutoModelForCausalLM.from_pretrained(f, use_safetensors=True, local_files_only=True),
    "hub": lambda f, m: AutoModelForCausalLM.from_pretrained(f"some/{f.name}", cache_dir=as_cached(f)),
    "shards": lambda f, m: AutoModelForCausalLM.from_pretrained(saved(m, f.parent / f"{f.name}-parts", "20KB")),
    "pickle": lambda f, m: pickle.loads(pickle.dumps(type(m).from_pretrained(f))),
    "deepcopy": lambda f, m: copy.deepcopy(m),
    "from_config": lambda f, m: with_weights(AutoModelForCausalLM.from_config(m.config), m),
}


def dispatched(folder):
    """Built without memory for the weights, which accelerate loads."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return load_checkpoint_and_dispatch(model, str(folder), device_map={"": "cpu"})


def described(config):
    return {key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "dtype")}


def saved(model, folder, size):
    model.save_pretrained(folder, max_shard_size=size)
    assert len(list(folder.glob("model-*.safetensors"))) > 10
    return folder


def as_cached(folder):
    """A folder as huggingface_hub keeps what it downloaded, below a cache directory that is returned."""
    repository = folder.parent / "hub" / f"models--some--{folder.name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(folder)
    return repository.parent


def with_weights(model, source):
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@torch.no_grad()
def test_loading(load, model, folders, request):
    name = request.node.callspec.params["model"]
    loaded = load(folders / name, model).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert described(loaded.config) == described(model.config)


@pytest.mark.parametrize(("symbol", "tensor"), [("GDN", "q_conv1d"), ("M2", "conv1d"), ("BMF", "A_log"), ("SWA", None)])
@torch.no_grad()
def test_offloaded_by_accelerate_itself(symbol, tensor, trio):
    """A mixer that reads tensors without calling their modules says so; torch would compute anything with them."""
    model = drop_teacher(fused_model(trio["base"], f"*-{symbol}-*-*"))
    expected = model(IDS).logits
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    if tensor is None:
        close(offloaded(IDS).logits, expected)
    else:
        with pytest.raises(HmfError, match=f"{tensor}: is offloaded, and this layer reads it without a call"):
            offloaded(IDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_narrow_loads_and_casts_agree(dtype, model, folders, request):
    """A cast gives what loading in that dtype gives: recurrences' decays and their step sizes stay float32."""
    name = request.node.callspec.params["model"]
    loaded, kept = AutoModelForCausalLM.from_pretrained(folders / name, dtype=dtype), set()
    for cast in (loaded, copy.deepcopy(model).to(dtype), model.half() if dtype == torch.float16 else model.bfloat16()):
        kept |= {full.rpartition(".")[2] for full, x in cast.named_parameters() if x.dtype == torch.float32}
        assert {x.dtype for x in cast.parameters()} <= {dtype, torch.float32}
        assert all(torch.equal(x, loaded.get_parameter(name)) for name, x in cast.named_parameters())
    assert kept == ({"A_log", "dt_bias"} if name == "gdn" else set())


def test_auto_classes_and_configs(model, folders, request, tmp_path):
    config = AutoConfig.from_pretrained(folders / request.node.callspec.params["model"])
    decoder = AutoModel.from_pretrained(folders / request.node.callspec.params["model"])
    assert type(config) is type(model.config)
    assert type(decoder) is type(model.model)
    assert torch.equal(decoder.eval()(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    model.config.to_json_file(tmp_path / "config.json")
    for other in (
        copy.deepcopy(model.config),
        pickle.loads(pickle.dumps(model.config)),
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_dict(model.config.to_dict()),
        type(config)(**json.loads(model.config.to_json_string(False))),
    ):
        assert described(other) == described(model.config)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("hybrid_override_pattern", "*-*-*-GDN", r"hybrid_override_pattern \*-\*-\*-GDN and layer_types .* differ"),
        ("layer_types", ["full_attention"] * 4, "hybrid_override_pattern .* and layer_types .* differ, as one was set"),
        ("is_causal", False, "is_causal: false: mixers are causal"),
    ],
)
def test_a_field_set_on_a_finished_config_is_refused_where_others_follow_from_it(field, value, problem, trio):
    config = copy.deepcopy(trio["gdn"].config)
    setattr(config, field, value)
    with pytest.raises(HmfError, match=problem):
        AutoModelForCausalLM.from_config(config)
    if field == "hybrid_override_pattern":
        anew = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict())).eval()
        assert generate(anew).tolist() == greedy(anew, IDS).tolist()


def test_push_to_hub_uploads_the_whole_checkpoint(model, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl

    uploads = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **given: RepoUrl("https://huggingface.co/some/model"))

    def create_commit(api, *, repo_id, operations, **given):
        assert repo_id == "some/model"
        uploads.update({each.path_in_repo: each for each in operations})

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    model.push_to_hub("some/model")
    assert uploads.keys() == {"README.md", "config.json", "generation_config.json", "model.safetensors"}


@torch.no_grad()
def test_embeddings_are_replaced_and_resized(model, tmp_path):
    before = model(IDS).logits
    assert model.get_decoder() is model.base_model is model.model
    model.resize_token_embeddings(310)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (310, 32)
    after = model(IDS).logits
    close(after[..., :300], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, after)
    model.set_input_embeddings(torch.nn.Embedding(310, 32))
    assert not torch.equal(model(IDS).logits, after)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, reentrant):
    expected = gradients(model.train())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    close(found, expected)
    assert found.keys() == dict(model.named_parameters()).keys()


@torch.no_grad()
def test_torch_compile(trio):
    model = copy.deepcopy(trio["gdn"])
    compiled = torch.compile(model, backend="eager")
    close(compiled(PADDED, attention_mask=MASK).logits, model(PADDED, attention_mask=MASK).logits)
    assert compiled.generate(IDS, **SETTINGS).tolist() == greedy(model, IDS).tolist()
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    close(program.module()(IDS, use_cache=False).logits, model(IDS).logits)


def gradients(model, **given):
    model.zero_grad()
    with torch.enable_grad():
        model(IDS, labels=IDS, **given).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def trained(model, folder, rows, batch_size, **given):
    """Loss of two steps of eight rows under transformers' own Trainer, and of the model afterwards."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **given,
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows))
    return trainer.train().training_loss, trainer.evaluate()["eval_loss"]


def test_transformers_trainer(trio, tmp_path):
    """Takes input_ids and labels, leaves out other columns, and counts a step's tokens once however it is cut."""
    rows = []
    for row in random_ids(8, 12).tolist():
        supervised = [-100] * len(rows) + row[len(rows) :]  # as many labels less in every row
        rows.append({"input_ids": row, "labels": supervised, "attention_mask": [1] * 12, "text": "other"})
    losses = {}
    for name, model in trio.items():
        whole, pieces = (trained(copy.deepcopy(model), tmp_path, rows, batch_size) for batch_size in (8, 2))
        checkpointed = trained(copy.deepcopy(model), tmp_path, rows, 4, gradient_checkpointing=True)
        assert pieces == pytest.approx(whole, rel=1e-4)
        assert checkpointed == pytest.approx(whole, rel=1e-4)
        losses[name] = whole + trained(copy.deepcopy(model), tmp_path, rows, 8, label_smoothing_factor=0.1)
    assert losses["twin"] == pytest.approx(losses["base"], rel=1e-4)
    assert losses["gdn"][1] < losses["gdn"][0]


def test_the_trainer_resumes(model, tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in random_ids(8, 12).tolist()])
    losses = []
    for last in (None, tmp_path / "checkpoint-2"):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=last and str(last))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the state of a layer", "a layer of states"], 290, None, 64)


def test_pipeline(trio, tokenizer):
    from transformers import pipeline

    def answers(name, **given):
        model = copy.deepcopy(trio[name])
        write = pipeline("text-generation", model=model, tokenizer=tokenizer, **given)
        return write(["the state", "a layer of the state"], max_new_tokens=4, do_sample=False)

    assert answers("twin", batch_size=2) == answers("base")
    assert answers("gdn", batch_size=2) == answers("gdn")


def test_peft_adapters(model):
    from peft import LoraConfig, get_peft_model

    before = model(IDS).logits
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2))
    close(wrapped(IDS).logits, before)
    assert generate(wrapped, input_ids=IDS, ids=None).tolist() == generate(model).tolist()
    wrapped(IDS, labels=IDS).loss.backward()
    trained_layers = {name.split(".")[4] for name, x in wrapped.named_parameters() if x.grad is not None}
    assert trained_layers == {"0", "1", "2", "3"}


def test_peft_tunes_norms_of_heads_and_refuses_short_convolutions(trio):
    """A short convolution runs without a call of its module, where peft's tensors would have no effect."""
    from peft import LNTuningConfig, LoHaConfig, LoraConfig, get_peft_model

    model = copy.deepcopy(trio["gdn"])
    tuned = get_peft_model(model, LNTuningConfig(task_type="CAUSAL_LM", target_modules=["o_norm"]))
    close(tuned(IDS).logits, trio["gdn"](IDS).logits)
    tuned(IDS, labels=IDS).loss.backward()
    assert all(x.grad.any() for x in tuned.parameters() if x.requires_grad)
    for adapter in (
        LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "k_conv1d"], r=2),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=["k_conv1d.weight"], r=2),
    ):
        with pytest.raises(HmfError, match="k_conv1d: an adapter has no effect on a short convolution; leave it out"):
            get_peft_model(copy.deepcopy(trio["gdn"]), adapter)(IDS)
    saved = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["k_conv1d"], r=2)
    wrapped = get_peft_model(copy.deepcopy(trio["gdn"]), saved)
    wrapped(IDS, labels=IDS).loss.backward()
    assert all(x.grad is not None for x in wrapped.parameters() if x.requires_grad)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]], ids=["all", "named"]
)
def test_peft_adapts_stacked_experts_as_in_the_base(targets, families):
    from peft import LoraConfig, get_peft_model

    adapted = {}
    for name, model in families["qwen3_moe"].items():
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=2)
        parameters = get_peft_model(copy.deepcopy(model), lora).named_parameters()
        adapted[name] = {name: x.shape for name, x in parameters if x.requires_grad and "mlp.experts" in name}
    assert adapted["gdn"] == adapted["twin"] == adapted["base"] != {}
