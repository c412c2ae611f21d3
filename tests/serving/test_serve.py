# SPDX-License-Identifier: Apache-2.0
"""`hmf serve` finds the options of a checkpoint and a machine and leaves nothing; `hmf chat --url` talks to it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from hmf.bench.gpus import GIB
from hmf.errors import HmfError
from hmf.serving import serve
from hmf.serving.chat import LocalChat, Markers, ServerChat, run
from tests.hybrids import Case
from tests.serving import engines
from tests.serving.quantised import quantise
from tests.serving.scripted import save_scripted

STATES = ["--mamba-cache-dtype", "float32", "--mamba-ssm-cache-dtype", "float32"]
PARSERS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
PREFIXES = ["--enable-prefix-caching", "--mamba-cache-mode", "align"]


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripted")
    save_scripted(path)
    return path


@pytest.fixture
def gpus(monkeypatch):
    """Call with (count, GiB): so many GPUs of that memory are in the machine."""

    def install(count, memory):
        found = types.SimpleNamespace(name="Test GPU", total_memory=int(memory * GIB))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)

    return install


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(serve.CPU_SPACE, raising=False)


@pytest.mark.usefixtures("no_gpu")
class TestOptions:
    def test_hybrid_on_a_cpu(self, scripted):
        launch = serve.prepare(scripted)
        assert launch.environment == {"VLLM_CPU_KVCACHE_SPACE": "1"}
        options = ["--dtype", "float32", "--max-num-seqs", "128", *PREFIXES, *STATES, *PARSERS]
        assert list(launch.arguments) == [str(scripted), *options]
        assert launch.line.startswith(f"VLLM_CPU_KVCACHE_SPACE=1 vllm serve {scripted} --dtype float32")

    def test_users_options_replace_ours(self, scripted):
        extra = ["--max-num-seqs=4", "--dtype", "bfloat16", "--served-model-name", "two words"]
        launch = serve.prepare(scripted, extra)
        assert list(launch.arguments) == [str(scripted), *PREFIXES, *STATES, *PARSERS, *extra]
        assert launch.line.endswith("'two words'")

    def test_no_prefix_caching(self, scripted):
        arguments = serve.prepare(scripted, ["--no-enable-prefix-caching"]).arguments
        assert "align" not in arguments and set(STATES) <= set(arguments)

    def test_users_cache_size_stays(self, scripted, monkeypatch):
        monkeypatch.setenv(serve.CPU_SPACE, "2")
        assert serve.prepare(scripted).environment == {}
        monkeypatch.setenv(serve.CPU_SPACE, "lots")
        with pytest.raises(HmfError, match="VLLM_CPU_KVCACHE_SPACE: 'lots' is no number"):
            serve.prepare(scripted)

    def test_transformer_has_no_states(self, tmp_path):
        engines.save_hybrid(tmp_path, Case("GDN", "none"), "*-*")
        assert serve.prepare(_with_tokenizer(tmp_path)).arguments[1:] == ("--dtype", "float32", "--max-num-seqs", "128")

    def test_state_dtype_is_the_checkpoints(self, tmp_path):
        engines.save_hybrid(tmp_path, Case("GDN", "half"), "X-*", state_dtype="bfloat16")
        arguments = serve.prepare(_with_tokenizer(tmp_path)).arguments
        assert arguments[-4:] == ("--mamba-cache-dtype", "bfloat16", "--mamba-ssm-cache-dtype", "bfloat16")

    @pytest.mark.parametrize(
        ("template", "options"),
        [
            ("<tool_call> </think>", "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"),
            ("<think> </think>", "--reasoning-parser qwen3"),
            ("<tool_call><function=f>", ""),
            ("plain", ""),
        ],
    )  # fmt: skip
    def test_parsers_follow_the_template(self, scripted, monkeypatch, template, options):
        monkeypatch.setattr(serve, "load_tokenizer", lambda source: types.SimpleNamespace(chat_template=template))
        assert " ".join(serve.prepare(scripted).arguments[len([1, *PREFIXES, *STATES]) + 4 :]) == options

    def test_quantised_checkpoint(self, tmp_path):
        quantise(tmp_path, engines.save_hybrid(tmp_path, Case("GDN", "int8"), "X-*"), lambda name: ".mlp." in name)
        assert "align" in serve.prepare(_with_tokenizer(tmp_path)).arguments

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda tensors: tensors["model.norm.weight"][1:3].fill_(float("nan")), "norm.weight: 2 of 64 numbers are"),
            (lambda tensors: tensors["lm_head.weight"].add_(1), "lm_head.weight differs from the embeddings"),
        ],
        ids=["nan", "head"],
    )
    def test_weights_that_would_answer_nonsense(self, tmp_path, change, said):
        engines.save_hybrid(_with_tokenizer(tmp_path), Case("GDN", "bad"), "X-*")
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        serve.prepare(tmp_path)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(HmfError, match=said):
            serve.prepare(tmp_path)

    @pytest.mark.parametrize(("given", "narrowed"), [("auto", None), ("bfloat16", "bfloat16"), ("half", "float16")])
    def test_narrowed_weights_are_named(self, tmp_path, capfd, given, narrowed):
        engines.save_hybrid(_with_tokenizer(tmp_path), Case("GDN", "wide"), "X-*")
        serve.prepare(tmp_path, [] if given == "auto" else ["--dtype", given])
        line = capfd.readouterr().err
        assert (f"tensors to {narrowed}, first " in line) if narrowed else not line
        assert "A_log" not in line

    def test_teacher_still_in_it(self, tmp_path):
        engines.save_hybrid(tmp_path, Case("GDN", "fused"), "GDN*-*DA")
        with pytest.raises(HmfError, match="hmf export"):
            serve.prepare(tmp_path)

    def test_no_vllm(self, monkeypatch):
        monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(HmfError, match="vLLM is not installed"):
            serve.require_vllm()


class TestGPUs:
    def test_one_is_enough(self, scripted, gpus):
        gpus(4, 80)
        assert list(serve.prepare(scripted).arguments[1:]) == [
            "--max-num-seqs", "1024", *PREFIXES, *STATES, *PARSERS,
        ]  # fmt: skip

    def test_as_many_as_a_full_sequence_needs(self, tmp_path, gpus):
        """Keys and values of 2^21 tokens: 512 MiB on one GPU, 256 on each of two."""
        engines.save_hybrid(tmp_path, Case("GDN", "long"), "X-*", max_position_embeddings=2**21)
        _with_tokenizer(tmp_path)
        gpus(4, 1.65)
        arguments = serve.prepare(tmp_path).arguments
        assert arguments[1:3] == ("--tensor-parallel-size", "2") and "--max-model-len" not in arguments
        chosen = serve.prepare(tmp_path, ["--tensor-parallel-size", "1"]).arguments
        length = int(chosen[chosen.index("--max-model-len") + 1])
        assert 2**19 < length < 2**21
        gpus(1, 1.1)
        with pytest.raises(HmfError, match="leave no room for a cache"):
            serve.prepare(tmp_path)

    def test_never_more_than_the_plugin_splits(self, tmp_path, gpus):
        options = {"gdn_config": {"kv_proj_rank": 4}, "max_position_embeddings": 2**21}
        engines.save_hybrid(tmp_path, Case("GDN", "low-rank"), "X-*", **options)
        _with_tokenizer(tmp_path)
        gpus(4, 1.65)
        assert "--tensor-parallel-size" not in serve.prepare(tmp_path).arguments
        with pytest.raises(HmfError, match="kv_proj_rank mixes"):
            serve.prepare(tmp_path, ["-tp", "2"])


class TestChat:
    def test_markers(self):
        markers = Markers()
        pieces = ["a", "<think>", "b\n", " c</think>d", "<think></think>", "e"]
        parts = [part for piece in pieces for part in markers.parts(piece)]
        assert parts == [("a", False), ("b\n", True), (" c", True), ("d", False), ("e", False)]

    def test_local(self, scripted):
        chat = LocalChat(scripted)
        parts = list(chat.answer("Hi"))
        assert "".join(text for text, is_thought in parts if is_thought) == "ponder deeply"
        assert "".join(text for text, is_thought in parts if not is_thought).strip() == "Hello world"
        assert [message["role"] for message in chat.messages] == ["user", "assistant"]

    def test_no_server(self, scripted):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(HmfError, match="is the server up"):
                ServerChat(scripted, url)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_server_and_chat(scripted, tmp_path):
    """One start: a conversation through it, then Ctrl-C. Nothing that it started is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hmf.cli", "serve", str(scripted), "--"]
    command += ["--port", str(port), "--enforce-eager", *engines.SMALL]
    log = tmp_path / "log"
    with log.open("w") as output:
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        chat = _until_up(process, lambda: ServerChat(scripted, url), log)
        lines = iter(["Hi", ""])
        from rich.console import Console

        with (tmp_path / "said").open("w") as said:
            run(chat, scripted, lambda prompt: next(lines), Console(file=said, force_terminal=True, width=80))
        text = (tmp_path / "said").read_text()
        assert "\x1b[2mponder" in text and "Hello" in text and "\x1b[2mHello" not in text
        quiet = ServerChat(scripted, url, thinking=False)
        assert not any(is_thought for _, is_thought in quiet.answer("Hi"))
        with pytest.raises(HmfError, match="max_tokens"):
            list(ServerChat(scripted, url, max_new_tokens=10**6).answer("Hi"))
        begun = _descendants(process.pid)
        assert len(begun) >= 2  # the front end and the engine
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(90)
    assert code == 0, log.read_text()[-3000:]
    deadline = time.monotonic() + 10
    while (left := [pid for pid in begun if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    first = next(line for line in log.read_text().splitlines() if line.startswith("vllm serve "))
    assert first.startswith(f"vllm serve {scripted} ") and "--mamba-cache-mode align" in first


def _with_tokenizer(path):
    """The checkpoint at `path` with a tokenizer that has no chat template."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(path)
    return path


def _until_up(process, connect, log):
    for _ in range(1000):
        try:
            return connect()
        except HmfError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
    raise AssertionError(f"no answer:\n{log.read_text()[-3000:]}")


def _descendants(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _runs(pid):
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
