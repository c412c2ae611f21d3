# SPDX-License-Identifier: Apache-2.0
"""A Hybrid written as a stock Qwen3.5, served by a vLLM that does not have this package."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from hmf.folders import resolve_base
from hmf.model import native
from hmf.model.checkpoint import load_model
from hmf.model.families import FAMILIES
from hmf.model.modeling import hybrid_classes
from tests.conftest import ROOT
from tests.hybrids import VOCABULARY, Case, random_ids, randomise, tiny_config
from tests.model.test_recurrent_bases import hybrid_of, stock_model
from tests.serving.engines import CUDA, ENVIRONMENT, EXPERTS, FACTOR, POOL
from tests.serving.quantised import quantise
from tests.serving.test_server import start_server, stop
from tests.test_cli import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Read by every Python process that starts: vLLM looks at a model's class in one of its own. That class's module reads
# images too and imports torchvision, which no text needs and which may not be there.
START = """
import importlib.abc, importlib.machinery, importlib.util, sys, types
sys.modules["hmf"] = None
class Empty(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe()
        while frame and frame.f_code.co_name != "_is_package_available":  # transformers does without
            frame = frame.f_back
        if name.split(".")[0] == "torchvision" and frame is None:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Empty(spec.name)
    def exec_module(self, module):
        pass
if importlib.util.find_spec("torchvision") is None:
    sys.meta_path.append(Finder())
"""
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
model, request, out = sys.argv[1:]
request = json.load(open(request))
options = {"max_model_len": 256, "max_num_seqs": 4, "disable_log_stats": False} | request["options"]
llm = LLM(model, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, **options)
sampling = SamplingParams(temperature=0, max_tokens=request["count"], ignore_eos=True, logprobs=1, detokenize=False)
adapters = [path and LoRARequest("adapter", 1, path) for path in request["adapters"]]
prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
results = llm.generate(prompts, sampling, lora_request=adapters if any(adapters) else None)
first = [result.outputs[0] for result in results]
rows = [[o.token_ids, [found[token].logprob for token, found in zip(o.token_ids, o.logprobs)]] for o in first]
accepted = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"]
json.dump([rows, accepted], open(out, "w"))
"""
# What vLLM's CPU kernels take: bfloat16 alone, and heads of at least 64.
BASE = {"hidden_size": 128, "head_dim": 128, "intermediate_size": 64}
SHORT = [
    *("distill.data.text=corpus", "distill.data.sequence_length=128", "distill.objective.layerwise_steps=1"),
    *("distill.training.max_steps=2", "distill.training.per_device_train_batch_size=1"),
    *("distill.training.save_steps=2", "distill.training.warmup_steps=0"),
    *("evaluate.samples=1", "evaluate.length=128", "evaluate.text_bytes=2000", "evaluate.max_new_tokens=4"),
]
# FlashInfer's kernels, vLLM's choice on Hopper, need nvidia-cutlass-dsl, and compile for minutes.
PREFILL = {"gdn_prefill_backend": "triton"}
SMALL = {"kv_cache_memory_bytes": POOL, "gpu_memory_utilization": 0.1, "additional_config": PREFILL} if CUDA else {}


def save_stock(folder, family="qwen3", **base):
    """A random Hybrid at folder/hybrid, and as a stock model at folder/stock."""
    config = tiny_config(Case("GDN", "native", BASE | base, {"norm_eps": 1e-6}), "*-X-X-*", family)
    model = hybrid_classes(FAMILIES[family]).causal_lm(config)
    randomise(model)
    model.save_pretrained(folder / "hybrid")
    native.convert(folder / "hybrid", folder / "stock")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    save_stock(folder)
    return folder


def ahead(folder):
    """The PYTHONPATH on which `folder` comes first; vLLM may be on the rest of it."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def serve(folder, model, prompts, count=12, adapters=None, **options):
    """Greedy tokens and their log-probabilities, one pair per prompt, and how many drafted tokens were accepted."""
    (folder / "sitecustomize.py").write_text(START)
    request = {"prompts": prompts, "count": count, "adapters": adapters or [None] * len(prompts)}
    (folder / "request.json").write_text(json.dumps(request | {"options": SMALL | options}))
    environment = os.environ | ENVIRONMENT | {"VLLM_PLUGINS": "", "PYTHONPATH": ahead(folder)}
    command = [sys.executable, "-c", SERVE, model, folder / "request.json", folder / "rows.json"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, accepted = json.loads((folder / "rows.json").read_text())
    assert all(len(tokens) == count for tokens, _ in rows)
    return rows, sum(accepted)


@torch.no_grad()
def distances(prompts, rows, model):
    """Of each served token, how far its log-probability is from the model's, and how far it is below the best."""
    errors, short, every = [], [], []
    for prompt, (tokens, logprobs) in zip(prompts, rows, strict=True):
        given = torch.tensor([prompt + tokens])
        wanted = model(given).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        at = torch.arange(len(tokens)), torch.tensor(tokens)
        errors.append((wanted[at] - torch.tensor(logprobs)).abs())
        short.append(wanted.amax(-1) - wanted[at])  # 0 where the token is the model's first choice
        every.append(wanted)
    return torch.cat(errors), torch.cat(short), torch.cat(every)


def require_near(prompts, rows, exact, rounded):
    """As near the float32 model `exact` as the same in bfloat16 is, which is all that vLLM's CPU kernel computes in."""
    errors, short, wanted = distances(prompts, rows, exact.eval())
    allowed = FACTOR * float((wanted - distances(prompts, rows, rounded.eval())[2]).abs().max())
    assert float(errors.max()) <= allowed
    assert float(short.max()) <= allowed
    assert float((short == 0).float().mean()) > 0.7  # a random model has near ties


def hybrids(folder):
    return load_model(folder / "hybrid"), load_model(folder / "hybrid", torch.bfloat16)


def stock(folder, dtype=torch.float32, name="stock"):
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)


PROMPTS = [random_ids(1, length, length)[0].tolist() for length in (5, 40, 70, 130)]
EVERY_TOKEN = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0)).tolist()


def test_vllm_without_the_plugin_serves_a_hybrid_of_qwen3_5(tmp_path):
    """New layers beside the base's own, all of one shape."""
    own = {"linear_num_key_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    base = BASE | {"vocab_size": VOCABULARY, "max_position_embeddings": 256}
    hybrid_of(stock_model(**base | own), "*-GDN-GDN>GDN-*").save_pretrained(tmp_path / "hybrid")
    native.convert(tmp_path / "hybrid", tmp_path / "stock")
    rows, _ = serve(tmp_path, tmp_path / "stock", PROMPTS)
    require_near(PROMPTS, rows, *hybrids(tmp_path))


def test_vllm_without_the_plugin_gives_the_hybrids_tokens(dense):
    rows, _ = serve(dense, dense / "stock", PROMPTS)
    require_near(PROMPTS, rows, *hybrids(dense))


def test_a_hybrid_with_experts(tmp_path):
    save_stock(tmp_path, "qwen3_moe", **EXPERTS, norm_topk_prob=True)
    rows, _ = serve(tmp_path, tmp_path / "stock", PROMPTS)
    require_near(PROMPTS, rows, *hybrids(tmp_path))


def test_a_lora_adapter_of_every_linear_layer(dense):
    """Trained by peft on the stock model; half of the requests of one batch use it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(stock(dense), peft.LoraConfig(r=8, target_modules="all-linear"))
    optimiser, ids = torch.optim.AdamW(model.parameters(), lr=4e-3), random_ids(4, 40)
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    adapter = dense / "adapter"
    model.save_pretrained(adapter)
    adapted_layers = set(peft.PeftConfig.from_pretrained(adapter).target_modules)
    assert {"q_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "down_proj"} <= adapted_layers

    adapters = [str(adapter), None, str(adapter), None]
    # The CPU build reads the last slot for requests without an adapter, so that has to be empty.
    slots = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    rows, _ = serve(dense, dense / "stock", PROMPTS, adapters=adapters, **slots)
    adapted, plain = rows[::2], rows[1::2]
    require_near(PROMPTS[1::2], plain, *hybrids(dense))
    both = [
        peft.PeftModel.from_pretrained(stock(dense, dtype), adapter, autocast_adapter_dtype=False)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    require_near(PROMPTS[::2], adapted, *both)
    near = distances(PROMPTS[::2], adapted, both[0])[0].mean()
    with both[0].disable_adapter():
        assert distances(PROMPTS[::2], adapted, both[0])[0].mean() > 5 * near  # the adapter matters


def test_weights_in_eight_bits(dense):
    """A compressed-tensors checkpoint: all linear layers but the narrow ones of GDN."""
    shutil.copytree(dense / "stock", dense / "int8")
    model, rounded = stock(dense).eval(), stock(dense, torch.bfloat16).eval()
    for given in (rounded, model):  # the last one writes float32 weights for what stays as it is
        quantise(dense / "int8", given, lambda name: not name.endswith(("lm_head", "in_proj_a", "in_proj_b")))
    rows, _ = serve(dense, dense / "int8", PROMPTS)
    require_near(PROMPTS, rows, model, rounded)


@pytest.mark.parametrize(
    ("drafted", "prompts"),
    [
        # Each token occurs in the prompt, with another behind it: every step has a draft of full length.
        pytest.param(1, [EVERY_TOKEN + prompt for prompt in PROMPTS[:3]], id="full"),
        pytest.param(
            3,
            PROMPTS,
            id="some",
            marks=pytest.mark.xfail(
                not CUDA,
                strict=True,
                reason="vLLM 0.32's CPU build keeps wrong convolution states after a draft that is not of full length",
            ),
        ),
    ],
)
def test_drafts_do_not_change_the_tokens(dense, drafted, prompts):
    """n-gram speculative decoding."""
    drafts = {"method": "ngram", "num_speculative_tokens": drafted, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
    # Both together need Triton.
    options = {} if CUDA else {"enable_prefix_caching": False}
    rows, accepted = serve(dense, dense / "stock", prompts, 40, speculative_config=drafts, **options)
    assert accepted > 0
    require_near(prompts, rows, *hybrids(dense))


def save_base(folder):
    """A random Qwen3 with the tokenizer, the chat template and other files of the quickstart's teacher."""
    teacher = resolve_base("teacher")
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    torch.manual_seed(0)
    size = {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = Qwen3Config.from_pretrained(teacher, **BASE, **size, dtype="float32", initializer_range=0.2)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    generation = GenerationConfig.from_pretrained(teacher, do_sample=True, top_k=1)  # greedy, in the server too
    generation.save_pretrained(folder)


def readme_commands():
    """The commands of README's section, as words."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## An answer without hmf\n")[2]
    blocks = re.findall(r"```bash\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    return [shlex.split(line, comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def test_the_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    """Training is shortened. The server has the tokenizer, template, dtype and generation config of the folder."""
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.py").write_text("def f(x):\n    return x + 1\n" * 80)
    prime, convert, vllm, curl = readme_commands()
    prime = [word.replace("Qwen/Qwen3-0.6B", "base") for word in prime]
    for value in SHORT:
        prime += ["--set", value]
    for program, *arguments in (prime, convert):
        assert program == ".venv/bin/hmf"
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 0, err
    assert vllm[:2] == ["vllm", "serve"]
    native_folder = Path(vllm[2])

    model = AutoModelForCausalLM.from_pretrained(native_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(native_folder)
    assert model.config.tokenizer_class == "Qwen2Tokenizer" and model.generation_config.top_k == 1

    def prompt_of(messages):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    def first_token(messages):
        return int(model(torch.tensor([prompt_of(messages)])).logits[0, -1].argmax())

    # The first token of another answer is made an end of every text. It must not be the first of this one too.
    start = first_token(json.loads(curl[curl.index("-d") + 1])["messages"])
    others = (
        [{"role": "user", "content": word}] for word in ("Stop.", "def f(x):", "1, 2, 3", "return", "Why?", "x" * 40)
    )
    end = next(messages for messages in others if first_token(messages) != start)
    ends = json.loads((native_folder / "generation_config.json").read_text())
    ends["eos_token_id"] = [*ends["eos_token_id"], first_token(end)]
    (native_folder / "generation_config.json").write_text(json.dumps(ends))

    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "sitecustomize.py").write_text(START)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("PYTHONPATH", ahead(tmp_path / "clean"))
    prefill = ["--additional-config", json.dumps(PREFILL)] if CUDA else []
    server, address = start_server(native_folder, tmp_path / "log", *vllm[3:], "--enforce-eager", *prefill)
    try:
        body = json.loads(curl[curl.index("-d") + 1])
        path = next(word for word in curl if word.startswith("http")).partition(":8000")[2]
        extra = {"max_tokens": 12, "logprobs": True, "return_token_ids": True}
        first, second = (post(address + path, body | extra | change) for change in ({}, {"messages": end}))
    finally:
        stop(server)
    prompt = prompt_of(body["messages"])
    assert first["prompt_token_ids"] == prompt
    (choice,) = first["choices"]
    tokens, found = choice["token_ids"], [row["logprob"] for row in choice["logprobs"]["content"]]
    text = tokens[:-1] if choice["finish_reason"] == "stop" else tokens  # without the token that ended it
    answer = tokenizer.decode(text, skip_special_tokens=True).rstrip("\ufffd")  # vLLM waits for the character's rest
    assert answer and choice["message"]["content"].rstrip("\ufffd") == answer
    require_near([prompt], [[tokens, found]], model, stock(native_folder.parent, torch.bfloat16, native_folder.name))
    assert second["choices"][0]["finish_reason"] == "stop" and second["usage"]["completion_tokens"] == 1
    assert "dtype=torch.bfloat16" in (tmp_path / "log").read_text()


def post(address, body):
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)
