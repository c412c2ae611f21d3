# SPDX-License-Identifier: Apache-2.0
"""A conversation in the terminal, by Hugging Face's `generate`: answers stream, thinking is dimmed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer, TextIteratorStreamer

from hmf.errors import HmfError
from hmf.model.checkpoint import load_model

THINK_START, THINK_END = "<think>", "</think>"


class Chat:
    """Messages so far and the model that answers. Raises HmfError for a checkpoint without a chat template."""

    def __init__(self, source: str | Path, thinking: bool = True, max_new_tokens: int = 512, temperature: float = 0.0):
        self.model = load_model(source).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        if not self.tokenizer.chat_template:
            raise HmfError(f"{source}: the tokenizer has no chat template; chat needs an instruction-tuned checkpoint")
        self.thinking, self.max_new_tokens, self.temperature = thinking, max_new_tokens, temperature
        self.messages: list[dict[str, str]] = []

    def answer(self, text: str) -> Iterator[str]:
        """Send `text`; yields pieces of the answer, markers of thinking included, and remembers both turns."""
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
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        worker.join()
        if failure:
            raise failure[0]
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


def run(source: str | Path, read: Callable[[str], str] = input, console: Console | None = None, **options: Any) -> None:
    """`hmf chat`: read a line, stream the answer, until an empty line, Ctrl-D or Ctrl-C."""
    console = console or Console(highlight=False)
    chat = Chat(source, **options)
    console.print(f"{source}: an empty line ends the conversation", style="dim")
    while True:
        try:
            text = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        dimmed = False
        for piece in chat.answer(text):
            for part in _split_markers(piece):
                if part in (THINK_START, THINK_END):
                    dimmed = part == THINK_START
                else:
                    console.print(part, style="dim" if dimmed else None, end="", markup=False, soft_wrap=True)
        console.print()


def _split_markers(piece: str) -> Iterator[str]:
    """The piece with the thinking markers, single tokens each, as parts of their own."""
    for marker in (THINK_START, THINK_END):
        before, found, after = piece.partition(marker)
        if found:
            yield from (before, marker)
            yield from _split_markers(after)
            return
    yield piece
