# SPDX-License-Identifier: Apache-2.0
"""A Hybrid written as a stock Qwen3.5, served by a vLLM that does not have this package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from hmf.model import native
from hmf.model.checkpoint import load_model
from hmf.model.families import FAMILIES
from hmf.model.modeling import hybrid_classes
from tests import numerics
from tests.hybrids import Case, random_ids, randomise, tiny_config
from tests.serving.engines import ENVIRONMENT, on_cpu

pytestmark = [pytest.mark.vllm, pytest.mark.slow, on_cpu]

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
sizes = {"max_model_len": 256, "max_num_seqs": 4}
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, **sizes)
sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1, detokenize=False)
results = llm.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])], sampling)
first = [result.outputs[0] for result in results]
rows = [[o.token_ids, [found[token].logprob for token, found in zip(o.token_ids, o.logprobs)]] for o in first]
json.dump(rows, open(sys.argv[3], "w"))
"""


def test_vllm_without_the_plugin_gives_the_hybrids_tokens(tmp_path):
    """As near the float32 Hybrid as the Hybrid in bfloat16 is, which is all that vLLM's CPU kernel computes in."""
    base = {"hidden_size": 128, "head_dim": 128}  # the CPU kernel refuses small heads
    config = tiny_config(Case("GDN", "native", base, {"norm_eps": 1e-6}), "*-X-X-*")
    model = hybrid_classes(FAMILIES["qwen3"]).causal_lm(config)
    randomise(model)
    model.save_pretrained(tmp_path / "hybrid")
    native.convert(tmp_path / "hybrid", tmp_path / "stock")
    (tmp_path / "sitecustomize.py").write_text(START)
    prompts = [random_ids(1, length, length)[0].tolist() for length in (5, 40, 70, 130)]
    environment = os.environ | ENVIRONMENT | {"VLLM_PLUGINS": "", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", SERVE, tmp_path / "stock", json.dumps(prompts), tmp_path / "rows.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    exact, rounded = load_model(tmp_path / "hybrid").eval(), load_model(tmp_path / "hybrid", torch.bfloat16).eval()
    errors, own, short = [], [], []
    for prompt, (tokens, logprobs) in zip(prompts, json.loads((tmp_path / "rows.json").read_text()), strict=True):
        assert len(tokens) == 12
        with torch.no_grad():
            wanted, half = (
                given(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                for given in (exact, rounded)
            )
        at = torch.arange(12), torch.tensor(tokens)
        errors.append((wanted[at] - torch.tensor(logprobs)).abs())
        own.append((wanted - half).abs())
        short.append(wanted.amax(-1) - wanted[at])  # 0 where the token is the float32 Hybrid's first choice
    allowed = numerics.FACTOR * float(torch.cat(own).max())
    assert float(torch.cat(errors).max()) <= allowed
    assert float(torch.cat(short).max()) <= allowed
    assert float((torch.cat(short) == 0).float().mean()) > 0.8
