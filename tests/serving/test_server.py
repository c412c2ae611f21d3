# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the model card's flags: its own processes, torch.compile, the plugin through its entry point."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving import engines
from tests.serving.scripted import save_scripted

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

CARD_FLAGS = [
    "--enable-prefix-caching",
    *("--mamba-cache-mode", "align"),
    *("--mamba-cache-dtype", "float32"),
    *("--mamba-ssm-cache-dtype", "float32"),
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "hermes"),
    *("--reasoning-parser", "qwen3"),
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
HI = [{"role": "user", "content": "Hi"}]
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


def start_server(model: Path, log: Path, *flags: str) -> tuple[subprocess.Popen, str]:
    """A server of `model` in its own process group, once it answers; and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags, *engines.SMALL]
    command += ["--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"},
        )
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 500
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return process, address
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    stop(process)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen) -> int:
    """Ctrl-C, and as a last resort an end to the whole group."""
    process.send_signal(signal.SIGINT)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, directory of the model, log file) of a running server."""
    model = tmp_path_factory.mktemp("scripted")
    save_scripted(model)
    log = tmp_path_factory.mktemp("log") / "server.log"
    process, address = start_server(model, log, *CARD_FLAGS)
    yield address, str(model), log
    stop(process)


@pytest.fixture(scope="module")
def ask(server):
    """`client.chat.completions.create` on that server, greedy."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server[0]}/v1", api_key="none")

    def create(messages, **options):
        return client.chat.completions.create(model=server[1], messages=messages, temperature=0, **options)

    return create


def post(server, **body) -> dict:
    """The card's curl call."""
    request = urllib.request.Request(
        f"{server[0]}/v1/chat/completions",
        json.dumps({"model": server[1], **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["choices"][0]


def test_thinking_is_kept_apart(server):
    message = post(server, messages=HI)["message"]
    assert (message["reasoning"], message["content"].strip()) == ("ponder deeply", "Hello world")


def test_thinking_off(server):
    message = post(server, messages=HI, **QUIET)["message"]
    assert (message["reasoning"], message["content"]) == (None, "Hello world")


@pytest.mark.parametrize(("options", "thought"), [({}, "ponder deeply"), ({"extra_body": QUIET}, "")])
def test_streaming(ask, options, thought):
    content, reasoning, chunks = "", "", 0
    for chunk in ask(HI, stream=True, **options):
        delta = chunk.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning", None) or ""
        chunks += 1
    assert (reasoning, content.strip()) == (thought, "Hello world")
    assert chunks > 2


def test_tool_call(ask):
    choice = ask(HI, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    function = choice.message.tool_calls[0].function
    assert (function.name, json.loads(function.arguments)) == ("get_time", {"city": "Rome"})


def test_tool_call_streamed(ask):
    name, arguments = "", ""
    for chunk in ask(HI, tools=TOOLS, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == ("get_time", {"city": "Rome"})


def said(ask, messages, stream, **options):
    """(thoughts, content, [(id, name, arguments)], tokens of the prompt) of one answer."""
    if not stream:
        answer = ask(messages, tools=TOOLS, **options)
        message = answer.choices[0].message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        return getattr(message, "reasoning", None) or "", message.content or "", calls, answer.usage.prompt_tokens
    thoughts, content, calls, size = "", "", {}, 0
    for chunk in ask(messages, tools=TOOLS, stream=True, stream_options={"include_usage": True}, **options):
        if chunk.usage is not None:
            size = chunk.usage.prompt_tokens
        for choice in chunk.choices:
            thoughts += getattr(choice.delta, "reasoning", None) or ""
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index, ["", "", ""])
                call[0] += part.id or ""
                call[1] += part.function.name or ""
                call[2] += part.function.arguments or ""
    return thoughts, content, [tuple(call) for call in calls.values()], size


def test_ten_turns_with_tool_results(ask):
    """In each turn a tool is called and answers; streamed and not, with thinking and without, in one conversation."""
    messages, sizes = [], []
    for turn in range(10):
        stream, thinking = turn % 2 == 1, turn % 4 < 2
        options = {} if thinking else {"extra_body": QUIET}
        messages.append({"role": "user", "content": "Hi"})
        _, content, calls, size = said(ask, messages, stream, **options)
        ((identity, name, arguments),) = calls
        assert (content, name, json.loads(arguments)) == ("", "get_time", {"city": "Rome"})
        sizes.append(size)
        call = {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        messages.append({"role": "tool", "tool_call_id": identity, "content": "word"})
        thoughts, content, calls, size = said(ask, messages, stream, **options)
        assert (thoughts, content.strip(), calls) == ("ponder deeply" if thinking else "", "Hello world", [])
        sizes.append(size)
        messages.append({"role": "assistant", "content": content})
    assert sizes == sorted(set(sizes)) and len(sizes) == 20  # the model is given all that was said


@pytest.mark.parametrize("thinking", [True, False])
def test_langchain(server, thinking):
    """LangChain's model for OpenAI servers: a tool is called, its result answered; whole and streamed."""
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai, which `make test` installs")
    from langchain_core.messages import HumanMessage, ToolMessage

    body = {"extra_body": {} if thinking else QUIET}
    model = langchain.ChatOpenAI(model=server[1], base_url=f"{server[0]}/v1", api_key="none", temperature=0, **body)
    tooled, messages = model.bind_tools(TOOLS), [HumanMessage("Hi")]
    for stream in (False, True):
        for final in (False, True):
            if stream:
                whole = None
                for part in tooled.stream(messages):
                    whole = part if whole is None else whole + part
            else:
                whole = tooled.invoke(messages)
            messages.append(whole)
            if not final:
                (call,) = whole.tool_calls
                assert (call["name"], call["args"]) == ("get_time", {"city": "Rome"})
                messages.append(ToolMessage("word", tool_call_id=call["id"]))
        assert (whole.content.strip(), whole.tool_calls) == ("Hello world", [])
        messages.append(HumanMessage("Hi"))


def test_prefix_hits_are_in_the_metrics(server, ask):
    def hits() -> float:
        with urllib.request.urlopen(f"{server[0]}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))

    long = [{"role": "user", "content": "word" * 300}]
    before = hits()
    answers = [ask(long, extra_body=QUIET).choices[0].message.content for _ in range(2)]
    assert answers == ["Hello world"] * 2
    assert hits() - before >= 128


def test_start_says_the_smallest_cacheable_prefix(server):
    line = next(line for line in server[2].read_text().splitlines() if "smallest cacheable prefix" in line)
    assert re.search(rf"is {'[0-9]+' if engines.CUDA else 128} tokens", line)


def nccl_lacks() -> str | None:
    """What vLLM's own bindings miss in the NCCL that is here."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    try:
        NCCLLibrary()
    except (AttributeError, OSError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("family", "fields", "flags"),
    [
        pytest.param("qwen3", {}, [], marks=engines.devices(2)),
        pytest.param("qwen3_moe", engines.EXPERTS, ["--enable-expert-parallel"], marks=engines.gpus(2)),
    ],
    ids=["whole-copies", "shared-experts"],
)
def test_two_copies(tmp_path, family, fields, flags):
    """Data parallelism: both engines answer, and say the same."""
    if flags and (lacking := nccl_lacks()):
        pytest.skip(f"vLLM's experts in several copies need a newer NCCL: {lacking}")
    model, log = tmp_path / "model", tmp_path / "log"
    save_scripted(model, family, **fields)
    process, address = start_server(model, log, "--data-parallel-size", "2", "--enforce-eager", *flags)
    try:
        ask = {"messages": HI, "temperature": 0, "max_tokens": 8, **QUIET}
        with ThreadPoolExecutor(8) as pool:
            choices = list(pool.map(lambda _: post((address, str(model)), **ask), range(16)))
        assert {choice["message"]["content"] for choice in choices} == {"Hello world"}
        with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        answered = dict.fromkeys("01", 0.0)
        for line in lines:
            if line.startswith("vllm:request_success_total"):
                answered[re.search(r'engine="(\d+)"', line)[1]] += float(line.split()[-1])
        assert sum(answered.values()) == 16 and min(answered.values()) > 0
    finally:
        stop(process)
