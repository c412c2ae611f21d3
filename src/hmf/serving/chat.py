# SPDX-License-Identifier: Apache-2.0
"""A conversation in the terminal, with a checkpoint or with a running server: answers stream, thinking is dimmed."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from transformers import TextIteratorStreamer

from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.model.checkpoint import load_model

THINK_START, THINK_END = "<think>", "</think>"
Part = tuple[str, bool]  # a piece of an answer, and whether it is a thought


class Chat(Protocol):
    """Messages so far and the model that answers."""

    def answer(self, text: str) -> Iterator[Part]:
        """Send `text`; yields the answer as it comes and remembers both turns."""
        ...


class LocalChat:
    """By Hugging Face's `generate`. Raises HmfError for a checkpoint without a chat template."""

    def __init__(self, source: str | Path, thinking: bool = True, max_new_tokens: int = 512, temperature: float = 0.0):
        self.tokenizer = load_tokenizer(source)
        if not self.tokenizer.chat_template:
            raise HmfError(f"{source}: the tokenizer has no chat template; chat needs an instruction-tuned checkpoint")
        self.model = load_model(source, generates=True).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.thinking, self.max_new_tokens, self.temperature = thinking, max_new_tokens, temperature
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str) -> Iterator[Part]:
        self.messages.append({"role": "user", "content": text})
        inputs = self.tokenizer.apply_chat_template(
            self.messages,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            enable_thinking=self.thinking,
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        arguments = {**inputs, **sampling, "streamer": streamer, "max_new_tokens": self.max_new_tokens}
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                self.model.generate(**arguments, pad_token_id=self.tokenizer.pad_token_id)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        pieces, markers = [], Markers()
        for piece in streamer:
            pieces.append(piece)
            yield from markers.parts(piece)
        worker.join()
        if failure:
            raise failure[0]
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


class ServerChat:
    """With an OpenAI-compatible server at `url`, such as `hmf serve` starts. Raises HmfError when none answers.

    source: the checkpoint's directory; the server may also have it under another name if it serves nothing else.
    """

    def __init__(
        self, source: str | Path, url: str, thinking: bool = True, max_new_tokens: int = 512, temperature: float = 0.0
    ):
        try:
            import openai
        except ImportError:
            raise HmfError("--url: needs the openai client; pip install openai") from None
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.client = openai.OpenAI(base_url=base, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0)
        self.url, self.failure = url, openai.OpenAIError
        try:
            served = [model.id for model in self.client.models.list()]
        except openai.OpenAIError as error:
            raise self._said(error) from None
        if str(source) not in served and len(served) != 1:
            raise HmfError(f"--url: {url} does not serve {source}; it serves {', '.join(served) or 'nothing'}")
        self.arguments: dict[str, Any] = {
            "model": str(source) if str(source) in served else served[0],
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}},
        }
        self.messages: list[Any] = []

    def answer(self, text: str) -> Iterator[Part]:
        self.messages.append({"role": "user", "content": text})
        pieces, markers = [], Markers()  # a server without a reasoning parser leaves the markers in
        try:
            stream = self.client.chat.completions.create(messages=self.messages, stream=True, **self.arguments)
            for chunk in stream:
                for choice in chunk.choices:
                    delta = choice.delta
                    # vLLM's own field, under its present or its former name
                    if thought := getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None):
                        yield thought, True
                    if delta.content:
                        pieces.append(delta.content)
                        yield from markers.parts(delta.content)
        except self.failure as error:
            raise self._said(error) from None
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _said(self, error: Exception) -> HmfError:
        what = " ".join(str(error).split()).rstrip(".")
        return HmfError(f"--url: {self.url}: {what}; is the server up? `hmf serve DIR` starts one")


def run(chat: Chat, name: str | Path, read: Callable[[str], str] = input, console: Console | None = None) -> None:
    """`hmf chat`: read a line, stream the answer, until an empty line, Ctrl-D or Ctrl-C."""
    console = console or Console(highlight=False)
    console.print(f"{name}: an empty line ends the conversation", style="dim")
    while True:
        try:
            text = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        for piece, is_thought in chat.answer(text):
            console.print(piece, style="dim" if is_thought else None, end="", markup=False, soft_wrap=True)
        console.print()


class Markers:
    """Tells thoughts from the answer in a stream, by the markers around them; each is a token, so no piece cuts one."""

    def __init__(self) -> None:
        self.inside = False

    def parts(self, piece: str) -> Iterator[Part]:
        """The piece without its markers."""
        for part in re.split(f"({THINK_START}|{THINK_END})", piece):
            if part in (THINK_START, THINK_END):
                self.inside = part == THINK_START
            elif part:
                yield part, self.inside
