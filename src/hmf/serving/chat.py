# SPDX-License-Identifier: Apache-2.0
"""`hmf chat`: a conversation in the terminal with a checkpoint or a server. Answers stream; thoughts are dimmed."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from transformers import StoppingCriteriaList, TextIteratorStreamer

from hmf.config.strict import require_text
from hmf.data.template import Template
from hmf.data.tokenizer import load_tokenizer, special_tokens
from hmf.errors import HmfError, notice
from hmf.evaluation.chunks import Composition, conversation_parts
from hmf.evaluation.compose import prefill
from hmf.evaluation.generation import end_tokens, generating, pad_token
from hmf.evaluation.prompts import THINK_END, THINK_START
from hmf.evaluation.server import api_key, served_name, server_root
from hmf.model.checkpoint import load_model

STARTS, ENDS = (THINK_START, "[THINK]"), (THINK_END, "[/THINK]")  # Ministral's are special tokens
Part = tuple[str, bool]  # a piece of an answer, and whether it is a thought


class Chat(Protocol):
    """A conversation with a model.

    cut_off: whether the last answer reached the maximum number of new tokens before the model ended it.
    """

    cut_off: bool

    def answer(self, text: str) -> Iterator[Part]:
        """Send `text`; yields the answer while it is generated, and adds both turns to the conversation.

        A KeyboardInterrupt stops the answer. The part generated so far is kept, and the exception is raised again.
        """
        ...


class LocalChat:
    """Chat with Hugging Face's `generate`. Raises HmfError for a checkpoint without a chat template.

    compose: how chunks of a long conversation are combined; None: it is processed as a whole.
    """

    def __init__(
        self,
        source: str | Path,
        thinking: bool = True,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        compose: Composition | None = None,
    ):
        self.source, self.tokenizer = source, load_tokenizer(source)
        if not self.tokenizer.chat_template:
            raise HmfError(f"{source}: the tokenizer has no chat template; give an instruction-tuned checkpoint")
        self.model = load_model(source, generates=True).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.thinking, self.max_new_tokens, self.temperature = thinking, max_new_tokens, temperature
        self.compose = compose
        self.messages: list[dict[str, str]] = []
        self.cut_off = False

    def answer(self, text: str) -> Iterator[Part]:
        self.messages.append({"role": "user", "content": text})
        inputs = self._inputs()
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        ends = end_tokens(self.model, self.tokenizer)
        arguments = {**inputs, **sampling, "streamer": streamer, "max_new_tokens": self.max_new_tokens}
        failure: list[BaseException] = []
        stopped = threading.Event()
        self.cut_off = False

        def generate() -> None:
            try:
                with generating(self.model):
                    whole = self.model.generate(
                        **arguments,
                        stopping_criteria=StoppingCriteriaList([lambda *_, **__: stopped.is_set()]),
                        eos_token_id=ends or None,
                        pad_token_id=pad_token(self.tokenizer, ends),
                    )[0]
                self._notice_length(len(whole))
                tokens = whole[inputs["input_ids"].shape[1] :]
                self.cut_off = len(tokens) == self.max_new_tokens and tokens[-1].item() not in ends
            except BaseException as error:
                failure.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        # Some templates write the start of the thinking into the prompt.
        end = self.tokenizer.decode(inputs["input_ids"][0, -8:]).rstrip()
        pieces = [f"{start}\n" for start in STARTS if end.endswith(start)]
        markers = Markers(bool(pieces))
        special = special_tokens(self.tokenizer)
        try:
            for piece in streamer:
                piece = special.sub(lambda match: match[0] if match[0] in (*STARTS, *ENDS) else "", piece)
                pieces.append(piece)
                yield from markers.parts(piece)
        finally:  # also if the caller stops early, or on Ctrl-C
            stopped.set()
            worker.join()
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if failure:
            raise failure[0]

    def _notice_length(self, tokens: int) -> None:
        """Print a notice if the conversation is longer than the model's context. Composed chunks share positions."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.compose is None and context is not None and tokens > context:
            notice(
                f"the conversation exceeds the {context:,} tokens that {self.source} has (max_position_embeddings); "
                "answers now include positions for which the model was not trained"
            )

    def _inputs(self) -> Mapping[str, Any]:
        """What `generate` gets for the conversation so far."""
        if self.compose is not None:
            parts = conversation_parts(self.tokenizer, self.messages, self.compose, thinking=self.thinking)
            return prefill(self.model, [parts], self.compose).for_generate()
        text = Template.of(self.tokenizer).render(
            self.messages, add_generation_prompt=True, enable_thinking=self.thinking
        )
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.model.device)


class ServerChat:
    """Chat with an OpenAI-compatible server at `url`, such as `hmf serve`. Raises HmfError if it does not answer.

    source: the checkpoint's directory; the server may have another name for the model if it serves only one.
    """

    def __init__(
        self, source: str | Path, url: str, thinking: bool = True, max_new_tokens: int = 512, temperature: float = 0.0
    ):
        try:
            import openai
        except ImportError:
            raise HmfError("--url: needs the openai client; pip install openai") from None
        self.client = openai.OpenAI(base_url=f"{server_root(url)}/v1", api_key=api_key() or "none", max_retries=0)
        self.url, self.failure, self.unreachable = url, openai.OpenAIError, openai.APIConnectionError
        try:
            served = [model.id for model in self.client.models.list()]
        except openai.OpenAIError as error:
            raise self._server_error(error) from None
        self.arguments: dict[str, Any] = {
            "model": served_name(source, url, served),
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}},
        }
        self.messages: list[Any] = []
        self.cut_off = False

    def answer(self, text: str) -> Iterator[Part]:
        self.messages.append({"role": "user", "content": text})
        pieces, markers = [], Markers()  # a server without a reasoning parser does not remove the markers
        self.cut_off = False
        try:
            stream = self.client.chat.completions.create(messages=self.messages, stream=True, **self.arguments)
            for chunk in stream:
                for choice in chunk.choices:
                    delta, self.cut_off = choice.delta, choice.finish_reason == "length"
                    # vLLM's field, under its current or its former name
                    if thought := getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None):
                        yield thought, True
                    if delta.content:
                        pieces.append(delta.content)
                        yield from markers.parts(delta.content)
        except self.failure as error:
            raise self._server_error(error) from None
        finally:  # also if the caller stops early, or on Ctrl-C
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _server_error(self, error: Exception) -> HmfError:
        hint = ""  # the server's own message names what to change
        if isinstance(error, self.unreachable):
            hint = "; check that the server is running (`hmf serve DIR` starts one)"
        elif getattr(error, "status_code", None) in (401, 403):
            hint = "; set VLLM_API_KEY to the server's key"
        return HmfError(f"--url: {self.url}: {' '.join(str(error).split()).rstrip('.')}{hint}")


def run(chat: Chat, name: str, read: Callable[[], str] | None = None, console: Console | None = None) -> None:
    """Read messages and stream the answers until an empty message, Ctrl-D, or Ctrl-C at the prompt.

    Ctrl-C during an answer stops the answer. read: returns the next message; None reads from the terminal, or a line
    of the standard input if it is not a terminal.
    """
    console, read = console or Console(highlight=False, markup=False, emoji=False), read or _reader()
    console.print(f"{name}: an empty message ends the conversation; {KEYS}", style="dim", soft_wrap=True)
    while True:
        try:
            text = read().strip()
        except (EOFError, KeyboardInterrupt):
            text = ""
        if not text:
            return
        require_text(text, "message")  # a terminal or a pipe may give bytes that are not UTF-8
        try:
            for piece, is_thought in chat.answer(text):
                console.print(piece, style="dim" if is_thought else None, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="dim")
            continue
        console.print()
        if chat.cut_off:
            console.print("(cut off: --max-new-tokens allows longer answers)", style="dim")


KEYS = "Escape and Enter begin a new line, Ctrl-X Ctrl-E opens an editor, Ctrl-C stops an answer"


def _reader() -> Callable[[], str]:
    if not sys.stdin.isatty():
        return lambda: input("> ")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    # Pasted text of several lines is one message.
    session: PromptSession[str] = PromptSession("> ", key_bindings=keys, enable_open_in_editor=True)
    return session.prompt


class Markers:
    """Separates thoughts from the answer in a stream, by their markers. A marker is one token, so it is never split.

    inside: whether the stream begins with a thought.
    """

    def __init__(self, inside: bool = False) -> None:
        self.inside = inside

    def parts(self, piece: str) -> Iterator[Part]:
        """The parts of a piece of text, without the markers."""
        for part in re.split(f"({'|'.join(map(re.escape, (*STARTS, *ENDS)))})", piece):
            if part in (*STARTS, *ENDS):
                self.inside = part in STARTS
            elif part:
                yield part, self.inside
