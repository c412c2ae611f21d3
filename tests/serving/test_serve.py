# SPDX-License-Identifier: Apache-2.0
"""`hmf serve` finds the options of a checkpoint and a machine and leaves nothing; `hmf chat --url` talks to it."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import hmf
from hmf.data.encoding import encode_chat
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.evaluation.chunks import Composition
from hmf.evaluation.local import Sampling
from hmf.evaluation.server import Server
from hmf.gpus import GIB
from hmf.serving import serve
from hmf.serving.chat import LocalChat, Markers, ServerChat, run
from hmf.serving.process import GRACE
from tests.hybrids import Case
from tests.model.test_recurrent_bases import hybrid_of, stock_model
from tests.serving import engines
from tests.serving.quantised import quantise
from tests.serving.scripted import save_scripted

STATES = ["--mamba-cache-dtype", "float32", "--mamba-ssm-cache-dtype", "float32"]
PARSERS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
}
LOCAL = ["--host", "127.0.0.1"]
PREFIXES = ["--enable-prefix-caching", "--mamba-cache-mode", "align"]


needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM's parser of options")


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
    @pytest.mark.parametrize("names", [["HybridQwen3Model"], ["Qwen3ForCausalLM"], None])
    def test_what_vllm_would_not_generate_text_with(self, scripted, tmp_path, names):
        folder = shutil.copytree(scripted, tmp_path / "model")
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"architectures": names}))
        with pytest.raises(HmfError, match=f"architectures: {re.escape(repr(names))}: .* only HybridQwen3ForCausalLM"):
            serve.prepare(folder)

    def test_hybrid_on_a_cpu(self, scripted):
        launch = serve.prepare(scripted)
        assert launch.environment == {"VLLM_CPU_KVCACHE_SPACE": "1"}
        options = ["--dtype", "float32", "--max-num-seqs", "128", *PREFIXES, *STATES, *LOCAL, *PARSERS]
        assert list(launch.arguments) == [str(scripted), *options]
        assert launch.line.startswith(f"VLLM_CPU_KVCACHE_SPACE=1 vllm serve {scripted} --dtype float32")

    def test_users_options_replace_ours(self, scripted):
        extra = ["--max-num-seqs=4", "--dtype", "bfloat16", "--served-model-name", "two words"]
        launch = serve.prepare(scripted, extra)
        assert list(launch.arguments) == [str(scripted), *PREFIXES, *STATES, *LOCAL, *PARSERS, *extra]
        assert launch.line.endswith("'two words'")

    def test_no_prefix_caching(self, scripted):
        arguments = serve.prepare(scripted, ["--no-enable-prefix-caching"]).arguments
        assert "align" not in arguments and set(STATES) <= set(arguments)

    def test_users_cache_size_stays(self, scripted, monkeypatch):
        monkeypatch.setenv(serve.CPU_SPACE, "2")
        assert serve.prepare(scripted).environment == {}
        monkeypatch.setenv(serve.CPU_SPACE, "lots")
        with pytest.raises(HmfError, match="VLLM_CPU_KVCACHE_SPACE: 'lots' is not a whole number"):
            serve.prepare(scripted)

    def test_transformer_has_no_states(self, tmp_path):
        engines.save_hybrid(tmp_path, Case("GDN", "none"), "*-*")
        options = ["--dtype", "float32", "--max-num-seqs", "128", *LOCAL]
        assert list(serve.prepare(_with_tokenizer(tmp_path)).arguments[1:]) == options

    def test_vllms_own_recurrent_layers_take_bfloat16_alone(self, tmp_path, capsys):
        """A stock Qwen3.5 on a CPU; a Hybrid of it runs in float32."""
        stock = stock_model(head_dim=32)
        stock.save_pretrained(tmp_path / "stock")
        assert "--dtype" not in serve.prepare(_with_tokenizer(tmp_path / "stock")).arguments
        notice = capsys.readouterr().err
        assert "tensors to bfloat16" in notice and "--dtype float32" not in notice
        assert ("class of this base needs torchvision" in notice) == (importlib.util.find_spec("torchvision") is None)
        hybrid_of(stock, "*-*-*-*").save_pretrained(tmp_path / "hybrid")
        assert serve.prepare(_with_tokenizer(tmp_path / "hybrid")).arguments[1:3] == ("--dtype", "float32")

    def test_state_dtype_is_the_checkpoints(self, tmp_path):
        engines.save_hybrid(tmp_path, Case("GDN", "half"), "X-*", state_dtype="bfloat16")
        arguments = serve.prepare(_with_tokenizer(tmp_path)).arguments
        assert arguments[-6:-2] == ("--mamba-cache-dtype", "bfloat16", "--mamba-ssm-cache-dtype", "bfloat16")

    @pytest.mark.parametrize(
        ("template", "options"),
        [
            ("<tool_call> </think>", "--enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3"),
            ("<think> </think>", "--reasoning-parser qwen3"),
            ("<tool_call><function=f>", "--enable-auto-tool-choice --tool-call-parser qwen3_coder"),
            ("<|python_tag|>", "--enable-auto-tool-choice --tool-call-parser llama3_json"),
            (  # Llama 3.2
                'Respond in the format {"name": function name, "parameters": dictionary} {{ m.tool_calls }}',
                "--enable-auto-tool-choice --tool-call-parser llama3_json",
            ),
            ("plain", ""),
        ],
    )
    def test_parsers_follow_the_template(self, scripted, monkeypatch, tmp_path, template, options):
        monkeypatch.setattr(serve, "load_tokenizer", lambda source: types.SimpleNamespace(chat_template=template))
        assert " ".join(serve.prepare(scripted).arguments[len([1, *PREFIXES, *STATES, *LOCAL]) + 4 :]) == options
        monkeypatch.undo()
        (tmp_path / "other.jinja").write_text(template)
        for given in (template, str(tmp_path / "other.jinja")):
            assert " ".join(filter(None, sum(serve.parsers(scripted, {"chat_template": given}).items(), ()))) == options

    def test_a_template_whose_calls_no_parser_reads_is_named(self, scripted, monkeypatch, capsys):
        template = "{{ m.tool_calls }}"
        monkeypatch.setattr(serve, "load_tokenizer", lambda source: types.SimpleNamespace(chat_template=template))
        assert "--tool-call-parser" not in serve.prepare(scripted).arguments
        assert "tool calls have no parser that hmf knows" in capsys.readouterr().err
        serve.parsers("other", {"tool_call_parser": "mistral"})
        assert not capsys.readouterr().err

    @needs_vllm
    @pytest.mark.parametrize("name", [None, "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_8", "qwen3_instruct_2507"])
    def test_the_parsers_read_what_the_template_writes(self, monkeypatch, name):
        """vLLM's own parsers, on calls as training data has them."""
        trl = pytest.importorskip("trl", reason="needs trl's chat templates")
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.reasoning import ReasoningParserManager
        from vllm.tool_parsers import ToolParserManager

        tokenizer = load_tokenizer(Path(hmf.__file__).parent / "assets" / "teacher")
        if name:
            tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
        monkeypatch.setattr(serve, "load_tokenizer", lambda source: tokenizer)
        options = serve.parsers("checkpoint")
        values = {"city": 'Lyon "x"', "days": 3, "now": True, "of": [1, {"a": "b"}]}
        kinds = {"city": "string", "days": "integer", "now": "boolean", "of": "array"}
        schema = {"type": "object", "properties": {key: {"type": kind} for key, kind in kinds.items()}}
        tools = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": schema}}]
        calls = [{"function": {"name": "weather", "arguments": made}} for made in (values, {"city": "Nice"})]
        thought = {"reasoning_content": "why"} if "--reasoning-parser" in options else {}
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls} | thought]
        [document] = encode_chat(tokenizer, talk, tools)
        text = tokenizer.decode([x for x in document.labels if x >= 0][:-1])
        request = ChatCompletionRequest(messages=talk[:1], tools=tools, model="m")
        if thought:
            reads = ReasoningParserManager.get_reasoning_parser(options["--reasoning-parser"])(tokenizer)
            reasoning, text = reads.extract_reasoning(text, request)
            assert reasoning.strip() == "why"
        parser = ToolParserManager.get_tool_parser(options["--tool-call-parser"])(tokenizer, request.tools)
        found = parser.extract_tool_calls(text, request)
        assert [json.loads(call.function.arguments) for call in found.tool_calls] == [values, {"city": "Nice"}]
        assert not (found.content or "").strip()

    @needs_vllm
    def test_options_in_any_of_vllms_spellings(self, scripted, tmp_path):
        """Whatever vLLM's own parser accepts is seen: underscores, abbreviations, and options in a file."""
        (tmp_path / "config.yaml").write_text("enable-prefix-caching: false\nhost: 0.0.0.0\n")
        extra = ["--max_num_seqs=4", "--dtyp", "bfloat16", "--config", str(tmp_path / "config.yaml")]
        assert list(serve.prepare(scripted, extra).arguments) == [str(scripted), *STATES, *PARSERS, *extra]
        with pytest.raises(HmfError, match="after --: unrecognized arguments: --max-num-sequences"):
            serve.prepare(scripted, ["--max-num-sequences", "4"])
        with pytest.raises(HmfError, match="after --: argument --max-num-seqs.*'many'"):
            serve.prepare(scripted, ["--max-num-seqs", "many"])

    @needs_vllm
    def test_who_can_reach_it(self, scripted, monkeypatch):
        monkeypatch.delenv(serve.API_KEY, raising=False)
        assert "http://127.0.0.1:8000, for this machine only" in serve.prepare(scripted).access
        assert "http://127.0.0.1:9000, for this machine only" in serve.prepare(scripted, ["--port=9000"]).access
        assert "localhost:8000, for this machine only" in serve.prepare(scripted, ["--host", "localhost"]).access
        opened = serve.prepare(scripted, ["--host", "::"])
        assert "http://[::]:8000: everyone who reaches" in opened.access and opened.arguments.count("--host") == 1
        for given in (["--api-key", "sesame"], ["--api-key=sesame"], ["--api-key", "c2U=="], ["--api_key=c2U=="]):
            keyed = serve.prepare(scripted, ["--host=0.0.0.0", *given])
            assert "for clients with the API key" in keyed.access
            assert given[-1] in keyed.arguments and not re.search("sesame|c2U", keyed.line)
        monkeypatch.setenv(serve.API_KEY, "sesame")
        assert "for clients with the API key" in serve.prepare(scripted, ["--host", "0.0.0.0"]).access
        assert "--host" not in serve.prepare(scripted, ["--uds", "/tmp/socket"]).arguments

    @needs_vllm
    def test_a_port_in_use_is_told_before_vllm_starts(self, scripted):
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            launch = serve.prepare(scripted, ["--port", str(port)])
            with pytest.raises(HmfError, match=f"127.0.0.1:{port}: Address already in use; choose another port: -- "):
                launch.require_port()
        launch.require_port()
        serve.prepare(scripted, ["--uds", "/tmp/socket"]).require_port()
        for given, problem in (
            (["--port", "99999"], "choose another port"),
            (["--host", "203.0.113.7"], "correct the host"),
        ):
            with pytest.raises(HmfError, match=f"{given[1]}.*; {problem}"):
                serve.prepare(scripted, given).require_port()

    def test_quantised_checkpoint(self, tmp_path):
        quantise(tmp_path, engines.save_hybrid(tmp_path, Case("GDN", "int8"), "X-*"), lambda name: ".mlp." in name)
        assert "align" in serve.prepare(_with_tokenizer(tmp_path)).arguments

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda tensors: tensors["model.norm.weight"][1:3].fill_(float("nan")), "norm.weight: 2 of 64 values are"),
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
        assert (f"tensors to {narrowed}, such as " in line) if narrowed else not line
        assert "A_log" not in line

    def test_what_the_start_refuses_is_refused_before(self, tmp_path, scripted):
        """The same line as tests/serving/test_support.py sees from vLLM."""
        engines.save_hybrid(_with_tokenizer(tmp_path), Case("GDN", "other"), "X-*", "olmo2")
        with pytest.raises(HmfError, match=f"^{tmp_path}: vLLM's decoder for olmo2 does not take the layers of a Hyb"):
            serve.prepare(tmp_path)
        config = json.loads((scripted / "config.json").read_text())
        for change, line in (
            ({"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config in config.json: vLLM's"),
            ({"rope_parameters": YARN}, r"vLLM's table of rotary positions \(yarn\) ends at 256, before the 1024 of"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(config | change))
            for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                shutil.copy(scripted / name, tmp_path)
            with pytest.raises(HmfError, match=f"^{tmp_path}: {line}"):
                serve.prepare(tmp_path)

    @needs_vllm
    def test_a_base_is_not_served_beyond_vllms_positions(self, tmp_path):
        """vLLM would read behind the end of its table, which it does not scale as transformers does."""
        dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        for rope, end in ((dynamic, 1024), (YARN, 256)):
            _stock(tmp_path, rope_parameters=rope)
            with pytest.raises(HmfError, match=rf"^{tmp_path}: vLLM's table .*\({rope['rope_type']}\) ends at {end}"):
                serve.prepare(tmp_path)
            assert "--max-model-len" in serve.prepare(tmp_path, ["--max-model-len", str(end)]).arguments

    @needs_vllm
    def test_overrides_of_a_base_are_whole(self, tmp_path):
        _stock(tmp_path)
        table = {"rope_type": "linear", "factor": 2.0}
        with pytest.raises(HmfError, match=f"^{tmp_path}: --hf-overrides: rope_parameters.rope_theta: is missing"):
            serve.prepare(tmp_path, ["--hf-overrides", json.dumps({"rope_parameters": table})])
        serve.prepare(tmp_path, ["--hf-overrides", json.dumps({"rope_parameters": table | {"rope_theta": 1e4}})])

    @needs_vllm
    @pytest.mark.parametrize(
        ("fields", "extra", "line"),
        [
            (LONGROPE, [], "rope_type 'longrope': with --max-model-len above 64, vLLM uses long_factor for every"),
            (LONGROPE, ["--max-model-len", "64"], ""),
            (LONGROPE | {"attention_factor": 1.2}, ["--max-model-len", "64"], "rope_parameters.attention_factor and"),
            ({"partial_rotary_factor": 0.5}, [], "rope_parameters.partial_rotary_factor: vLLM rotates a part of each"),
            ({"rope_dim": 16}, [], "rope_parameters.rope_dim: transformers does not read it, and vLLM may"),
            (YARN | {"factor": 8, "attention_factor": 1.1, "mscale": 1.0, "truncate": False}, [], ""),
        ],
    )
    def test_other_positions_of_a_base_are_named(self, tmp_path, capfd, fields, extra, line):
        _stock(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4} | fields)
        serve.prepare(tmp_path, extra)
        err = capfd.readouterr().err
        assert f"{tmp_path}: {line}" in err if line else "rope" not in err

    @needs_vllm
    @pytest.mark.parametrize(
        ("extra", "line"),
        [
            (
                ["--additional-config", '{"gdn_prefill_backend": "own"}'],
                "--additional-config: gdn_prefill_backend: unknown backend 'own'; valid: aiter_flydsl, auto",
            ),
            (["--enable-lora"], "LoRA is not supported on Hybrids"),
            (
                ["--hf-overrides", '{"rope_parameters": {"rope_type": "linear", "factor": 2}}'],
                "--hf-overrides: rope_pa",
            ),
            (["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'], "drop --speculative-config"),
            (["--spec-method", "ngram", "--spec-tokens", "2"], "drop --speculative-config and --spec-method"),
            (["--kv-offloading-size", "1"], "drop --kv-transfer-config and --kv-offloading-size"),
            (["--disable-hybrid-kv-cache-manager"], "drop --disable-hybrid-kv-cache-manager"),
            (["--quantization", "fp8"], "vLLM's CPU build cannot quantise to fp8"),
            (["--pipeline-parallel-size", "2"], "stage 2 of 2 has no recurrent layer"),
            (["--tensor-parallel-size=3"], "do not split over 3 ranks"),
        ],
    )
    def test_options_that_the_start_refuses(self, scripted, extra, line):
        with pytest.raises(HmfError, match=line):
            serve.prepare(scripted, extra)

    @needs_vllm
    def test_a_head_dim_without_a_kernel(self, tmp_path):
        engines.save_hybrid(_with_tokenizer(tmp_path), Case("GDN", "narrow"), "X-*", head_dim=8)
        with pytest.raises(HmfError, match=f"^{tmp_path}: vLLM's attention on a CPU has no kernel for head_dim 8"):
            serve.prepare(tmp_path)

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
            "--max-num-seqs",
            "1024",
            *PREFIXES,
            *STATES,
            *LOCAL,
            *PARSERS,
        ]

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
        stored = ["--tensor-parallel-size", "1", "--kv-cache-dtype", "fp8"]
        fewer = serve.prepare(tmp_path, stored).arguments
        assert "--max-model-len" not in fewer  # keys and values of a sequence are a quarter of those in float32
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
        assert list(Markers().parts("[THINK]b[/THINK]c")) == [("b", True), ("c", False)]

    def test_local(self, scripted):
        chat = LocalChat(scripted)
        parts = list(chat.answer("Hi"))
        assert "".join(text for text, is_thought in parts if is_thought) == "ponder deeply"
        assert "".join(text for text, is_thought in parts if not is_thought).strip() == "Hello world"
        assert [message["role"] for message in chat.messages] == ["user", "assistant"]

    def test_markers_that_are_special_tokens(self, scripted):
        """As Ministral's are. Other special tokens, such as the end of the answer, are not shown."""
        chat = LocalChat(scripted)
        chat.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
        parts = list(chat.answer("Hi"))
        assert "".join(text for text, is_thought in parts if is_thought) == "ponder deeply"
        assert "".join(text for text, is_thought in parts if not is_thought).strip() == "Hello world"
        assert "".join(chat.messages[-1]["content"].split()) == "<think>ponderdeeply</think>Helloworld"

    def test_a_thought_that_begins_in_the_prompt(self, scripted):
        """As in Qwen3.5's template. The model then ends a thought that it did not begin."""
        chat = LocalChat(scripted)
        chat.tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
        parts = list(chat.answer("Hi"))
        assert "".join(text for text, is_thought in parts if is_thought) == "ponder deeply"
        assert chat.messages[-1]["content"].startswith("<think>\nponder deeply</think>")

    def test_a_message_that_is_not_text_is_named(self, scripted):
        """A pipe may give bytes that are not UTF-8, which Python reads as lone surrogates."""
        with pytest.raises(HmfError, match=r"message: a lone surrogate \(\\udce9\) is not valid text"):
            run(LocalChat(scripted), "name", lambda: b"h\xe9llo".decode(errors="surrogateescape"))

    def test_an_answer_that_is_cut_off(self, scripted):
        chat = LocalChat(scripted, max_new_tokens=2)
        list(chat.answer("Hi"))
        assert chat.cut_off
        chat.max_new_tokens = 100
        list(chat.answer("Hi"))
        assert not chat.cut_off

    def test_a_conversation_beyond_the_context_is_named(self, scripted, capsys):
        chat = LocalChat(scripted)
        chat.model.config.max_position_embeddings = 24
        for notices in (0, 1, 0):  # once
            list(chat.answer("Hi word word"))
            notices -= capsys.readouterr().err.count(f"exceeds the 24 tokens that {scripted} has")
            assert not notices

    def test_the_tokenizer_ends_an_answer_where_the_generation_config_does_not(self, scripted):
        chat = LocalChat(scripted, max_new_tokens=100)
        chat.model.generation_config.eos_token_id = None
        list(chat.answer("Hi"))
        assert chat.messages[-1]["content"].endswith("Hello world") and not chat.cut_off

    def test_composed(self, scripted):
        """The conversation grows beyond one chunk; a script answers to the prompt's last token alone."""
        chat = LocalChat(scripted, compose=Composition(chunk=16, tail=4))
        for _ in range(3):
            assert "".join(text for text, is_thought in chat.answer("Hi word " * 8) if not is_thought).strip()
        assert [message["content"].strip()[-11:] for message in chat.messages[1::2]] == ["Hello world"] * 3

    def test_a_stopped_answer_ends_in_its_thread_and_is_remembered(self, scripted, capsys):
        """Ctrl-C during an answer, here after its first piece; then the conversation goes on."""
        chat = LocalChat(scripted, max_new_tokens=10**5)
        chat.model.generation_config.eos_token_id = chat.tokenizer.eos_token_id = None  # it never ends by itself
        whole, lines = chat.answer, iter(["Hi", "Hi", ""])

        def interrupted(text):
            for piece in whole(text):
                yield piece
                raise KeyboardInterrupt

        chat.answer = interrupted
        before = set(threading.enumerate())
        run(chat, "name", lambda: next(lines))
        assert set(threading.enumerate()) <= before
        assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
        assert capsys.readouterr().out.count("(stopped)") == 2

    @pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http:/localhost"])
    def test_an_address_without_http(self, scripted, url):
        for connect in (ServerChat, lambda model, url: Server(url, model, "chat", Sampling(), 1)):
            with pytest.raises(HmfError, match=f"--url: '{url}' does not start with http:// or https://"):
                connect(scripted, url)

    def test_no_server(self, scripted):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}"
            with pytest.raises(HmfError, match="check that the server is running"):
                ServerChat(scripted, url)


class TestEnd:
    """`process.run` with a stand-in for vLLM, which has a child and does what its argument says."""

    STAND_IN = """
import os, signal, subprocess, sys, time
from pathlib import Path
what, pids = sys.argv[2:]
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["/bin/sh", "-c", 'trap "" TERM; sleep 120'])
Path(pids + ".part").write_text(f"{os.getpid()} {child.pid}")
os.rename(pids + ".part", pids)
if what == "interrupted":
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        sys.exit(0)
if what == "refused":
    Path(os.environ["HMF_SERVE_REASON_FILE"]).write_text("model: no kernel for this")
if what in ("refused", "ended"):
    sys.exit(0)
time.sleep(120)
"""
    RUN = """
import sys
from hmf.errors import HmfError
from hmf.serving import process
grace, *arguments = sys.argv[1:]
process.GRACE = float(grace)
try:
    process.run(arguments, {})
except HmfError as error:
    sys.exit(f"hmf: {error}")
"""

    @pytest.fixture
    def start(self, tmp_path):
        """Call with what the stand-in does: the process of `process.run` and the processes that it started.

        What has to end soon has a minute here, so that a busy machine does not fail the tests; what must not be waited
        for takes longer than that.
        """
        package = tmp_path / "vllm" / "entrypoints" / "cli"
        package.mkdir(parents=True)
        (package / "main.py").write_text(self.STAND_IN)
        for folder in (package, package.parent, package.parent.parent):
            (folder / "__init__.py").touch()
        (tmp_path / "run.py").write_text(self.RUN)

        def begin(what, script='exec "$@"', grace=GRACE):
            path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
            command = [sys.executable, str(tmp_path / "run.py"), str(grace), what, str(tmp_path / "pids")]
            process = subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", *command],
                env=os.environ | {"PYTHONPATH": path},
                stderr=subprocess.PIPE,
                text=True,
            )
            _until(lambda: (tmp_path / "pids").is_file(), 60)
            return process, [int(pid) for pid in (tmp_path / "pids").read_text().split()]

        return begin

    @pytest.mark.parametrize(
        ("what", "number"), [("deaf", signal.SIGTERM), ("interrupted", signal.SIGINT), ("interrupted", signal.SIGHUP)]
    )
    def test_stopped(self, start, what, number):
        """In time, also when neither the server nor its child listens."""
        assert GRACE <= 10
        process, started = start(what, grace=2)
        process.send_signal(number)
        assert process.wait(60) == 0
        assert not any(map(_runs, started))

    def test_second_interrupt_does_not_wait(self, start):
        process, started = start("deaf", grace=100)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert not any(map(_runs, started))

    def test_killed(self, start):
        process, started = start("deaf")
        process.kill()
        process.wait()
        _until(lambda: not any(map(_runs, started)), 60)

    def test_interrupts_reach_a_background_job(self, start, tmp_path):
        """A script's background jobs ignore SIGINT, and so would what they start."""
        shell, started = start("interrupted", 'trap "" INT; exec "$@"')
        os.kill(started[0], signal.SIGINT)  # straight to the server, which is to hear it
        _until(lambda: not _runs(started[0]), 60)
        assert "ended by itself (exit code 0)" in shell.communicate(timeout=60)[1]

    @pytest.mark.parametrize(
        ("what", "line"),
        [
            ("ended", "hmf: the server ended by itself (exit code 0); read its last messages above"),
            ("refused", "hmf: model: no kernel for this"),
        ],
    )
    def test_ended_by_itself(self, start, what, line):
        process, started = start(what)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and errors.splitlines()[-1] == line
        assert not any(map(_runs, started))


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
            run(chat, scripted, lambda: next(lines), Console(file=said, force_terminal=True, width=80))
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
        code = process.wait(60)
    assert code == 0, log.read_text()[-3000:]
    assert log.read_text().splitlines()[-1] == "The server has stopped."
    deadline = time.monotonic() + 10
    while (left := [pid for pid in begun if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    first = next(line for line in log.read_text().splitlines() if line.startswith("vllm serve "))
    assert first.startswith(f"vllm serve {scripted} ") and "--mamba-cache-mode align" in first


def _stock(path, **fields):
    """A small Llama at `path`, in place of what is there, with a tokenizer."""
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 61}
    config = LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=1024, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(_with_tokenizer(path))


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


def _until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _descendants(pid):
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _runs(pid):
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
