# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, one thread, skips that say why, a tiny teacher."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line sets it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny: more threads only wait for each other

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SERVING = "tests/serving/"
# These begin first, so that none is left when all else is done.
LONGEST = ("serving/test_server.py", "serving/test_serve.py", "test_tuned_kernel", SERVING)
SHARE_NOTHING = ("test_cuda_graphs.py", "test_layer_types.py", "test_gpu.py")  # long tests, no common fixtures


def pytest_collection_modifyitems(items):
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if importlib.util.find_spec("vllm") is None:
        missing["vllm"] = "needs vLLM, which `make test` installs"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):  # not keywords, which hold the folders too
                item.add_marker(pytest.mark.skip(reason=reason))
    items.sort(key=lambda item: next((n for n, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests share fixtures, so they stay in one process.

    All those with an engine of vLLM do, as there is room for one at a time; a GPU machine has room for several.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            if torch.cuda.is_available():
                return nodeid if file.endswith(SHARE_NOTHING) else file
            return SERVING if SERVING in nodeid else file

    return ByFile(config, log)


def pytest_runtest_logstart():
    """A kernel that crashed has broken CUDA for its process: the tests that are left go to another one."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _library_is_encoded_once():
    """Most training runs read the standard library. Its tokens take seconds, so the runs of a process share them."""
    from hmf.data import mixture

    encode, kept = mixture.encode_texts, {}

    def encode_once(tokenizer, texts, *args):
        if sum(map(len, texts)) < 1_000_000:
            return encode(tokenizer, texts, *args)
        key = (tokenizer.backend_tokenizer.to_str(), tuple(texts), args)
        if key not in kept:
            kept[key] = encode(tokenizer, texts, *args)
        return [list(ids) for ids in kept[key]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "encode_texts", encode_once)
        yield


@pytest.fixture
def blank_pictures():
    """Figures are made and not rendered: pictures of the losses take half the time of a tiny run."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "draw", lambda figure, renderer: None)
        yield


@pytest.fixture
def in_float64():
    """A float64 model computes in float64 throughout: norms and rotary tables do not round to float32."""
    from tests import numerics

    with numerics.in_float64():
        yield


@pytest.fixture(scope="session")
def tiny_qwen3_config():
    """A Qwen3 of 4 layers, 4 query and 2 key/value heads of 16, vocabulary 128."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tiny_qwen3_config, tmp_path_factory) -> Path:
    """That model with random float32 weights, saved; a test that changes a model loads its own copy from here."""
    from transformers import Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("tiny_qwen3")
    torch.manual_seed(0)
    Qwen3ForCausalLM(tiny_qwen3_config).save_pretrained(path)
    return path


@pytest.fixture
def tiny_qwen3(tiny_qwen3_dir):
    """That model, loaded anew for each test, in eval mode."""
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(tiny_qwen3_dir).eval()
