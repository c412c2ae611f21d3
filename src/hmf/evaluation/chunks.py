# SPDX-License-Identifier: Apache-2.0
"""How state composition splits a prompt: a shared prefix, chunks that are processed separately, and the tail."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

from hmf.data.conversation import Message
from hmf.data.template import Template
from hmf.errors import HmfError, unknown_name

Keys = Literal["full", "concatenated", "sliding"]
States = Literal["averaged", "fused", "dropped"]
MIN_CHUNK = 16  # tokens; a chunk must be longer than the context of a convolution


@dataclass(frozen=True)
class Composition:
    """How the caches of chunks are combined (docs/composition.md).

    Attributes:
        keys: keys and values of attention layers. "full": each chunk attends to all earlier tokens. "concatenated":
            each chunk attends to the prefix and itself; the tail and the answer attend to all chunks. "sliding": as
            "concatenated", but only the last chunk stays in the cache.
        states: states of recurrent layers. "averaged": the mean of the chunks' states. "fused": their composition in
            order. "dropped": the state after the prefix.
        chunk: largest number of tokens in a chunk. The sum of prefix, chunk, tail and answer should not exceed the
            trained length.
        tail: largest number of tokens at the prompt's end, which are processed after the caches are composed.
    """

    keys: Keys = "concatenated"
    states: States = "fused"
    chunk: int = 768
    tail: int = 128

    def __post_init__(self) -> None:
        for name, kinds in (("keys", Keys), ("states", States)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise HmfError(f"compose: {unknown_name(name, value, get_args(kinds))}")
        if self.chunk < MIN_CHUNK:
            raise HmfError(f"compose: a chunk of {self.chunk} tokens is too short; give at least {MIN_CHUNK}")
        if self.tail < 1:
            raise HmfError(f"compose: a tail of {self.tail} tokens; at least the last token is processed after chunks")

    @classmethod
    def parse(cls, text: str, **sizes: int) -> Composition:
        """ "KEYS,STATES", as in "concatenated,fused". Raises HmfError for anything else."""
        keys, comma, states = text.partition(",")
        if not comma:
            raise HmfError(
                f"compose: {text!r} is not KEYS,STATES; give one of {', '.join(get_args(Keys))}, a comma, and one of "
                f"{', '.join(get_args(States))}"
            )
        return cls(keys, states, **sizes)  # type: ignore[arg-type] # checked in __post_init__


@dataclass(frozen=True)
class Parts:
    """The token ids of one prompt in order: `prefix`, which may be empty, one or more `chunks`, and `tail`."""

    prefix: Sequence[int]
    chunks: Sequence[Sequence[int]]
    tail: Sequence[int]

    def __post_init__(self) -> None:
        if not self.chunks or not all(map(len, self.chunks)) or not self.tail:
            raise HmfError("compose: a prompt needs at least one token before its last one, and no chunk may be empty")


def cut(ids: Sequence[int], prefix: int, composition: Composition, lines: Sequence[int] = ()) -> Parts:
    """Split the ids of a prompt [T] whose first `prefix` tokens are shared by all chunks.

    The chunks have nearly equal lengths. A chunk begins at one of `lines`, the positions where a line begins, if there
    is one nearby. A prompt that fits into one chunk and the tail is processed in the ordinary way. Raises HmfError for
    a prompt of one token.
    """
    total, chunk, tail = len(ids), composition.chunk, composition.tail
    if total - prefix <= chunk + tail:
        return Parts((), (ids[:-1],), ids[-1:])
    end = min((at for at in lines if total - tail <= at < total), default=total - tail)
    start, chunks = prefix, []
    while start < end:
        even = math.ceil((end - start) / math.ceil((end - start) / chunk))
        near = [at for at in lines if start + even // 2 < at <= min(start + chunk, end)]
        stop = end if end - start <= chunk else min(near, key=lambda at: abs(at - start - even), default=start + even)
        chunks.append(ids[start:stop])
        start = stop
    return Parts(ids[:prefix], chunks, ids[end:])


def conversation_parts(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    composition: Composition,
    tools: list[Any] | None = None,
    thinking: bool = True,
) -> Parts:
    """The parts of the prompt that the chat template makes of `messages`, for the assistant's next turn.

    The prefix is all that the template writes before the text of the first message that is not the system message: the
    system message, the tools, and the header of that turn. Where possible, chunks and tail begin at the start of a
    line. Raises HmfError if the template fails.
    """
    if isinstance(messages, str):
        raise HmfError('compose: messages are text; give a list of messages: [{"role": "user", "content": ...}]')
    render = partial(Template.of(tokenizer).render, tools=tools, add_generation_prompt=True, enable_thinking=thinking)
    text = render(list(messages))
    first = next((at for at, message in enumerate(messages) if message["role"] not in ("system", "developer")), None)
    shared = 0
    if first is not None:  # the prefix is the part that does not change with the text of that message
        other = render([*messages[:first], {**messages[first], "content": "\ue000"}, *messages[first + 1 :]])
        shared = len(os.path.commonprefix([text, other]))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    lines = [at for at, (begin, _) in enumerate(offsets) if begin and text[begin - 1] == "\n"]
    return cut(ids, sum(stop <= shared for _, stop in offsets), composition, lines)
