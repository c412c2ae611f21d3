# SPDX-License-Identifier: Apache-2.0
"""From a text or a conversation to token ids and labels, for training by the same tokens as in generation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hmf.data.conversation import (
    THINK_BLOCK,
    Message,
    messages_after,
    normalise,
    supervised,
    text_of,
    thinking_of,
    without_thinking,
)
from hmf.data.template import Talk, Template
from hmf.data.tokenizer import Plain, document_separator, encode_texts
from hmf.errors import HmfError

IGNORED = -100  # the label that transformers' losses leave out
Thinking = Literal["keep", "strip"]
Turns = Literal["all", "last"]
_DOUBLED = re.compile(r"(?:<think>|</think>)\s*<think>")


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document and its labels, both of one length."""

    ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Encoded:
        """A part that stands alone: its first token has no context and is not supervised."""
        return Encoded(self.ids[start:stop], [IGNORED, *self.labels[start + 1 : stop]])

    @property
    def prompt(self) -> list[int]:
        """Ids before the first that is supervised."""
        return self.ids[: next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.ids))]


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> Encoded:
    """Separator, text, separator; everything after the first token is supervised.

    Args:
        split_special_tokens: encode special tokens in the text as the text that they are written with.
    Raises:
        HmfError: the text has a lone surrogate.
    """
    return enclosed(encode_texts(tokenizer, [text], split_special_tokens)[0], document_separator(tokenizer))


def enclosed(ids: list[int], separator: int) -> Encoded:
    """A document's `ids` between separators."""
    return Encoded([separator, *ids, separator], [IGNORED, *ids, separator])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None = None,
    thinking: Thinking = "keep",
    turns: Turns = "all",
    *,
    ignore_keys: Iterable[str] = (),
    split_special_tokens: bool = False,
    enable_thinking: bool | None = None,
) -> list[Encoded]:
    """A conversation with its assistant turns supervised, by the tokenizer's chat template.

    Where the template marks what the assistant says ({% generation %}), its marks count. Else each turn is what the
    template adds to the prompt that the model would be given for it. Templates that take the thinking out of earlier
    turns change the text before a later turn; such a turn starts a document of its own, so that every turn is trained
    after exactly the prompt that it is generated from. Turns of weight 0 are context. What follows the last supervised
    turn is left out.

    Args:
        thinking: "strip" takes the thinking out of all assistant turns, wherever it stands.
        turns: which of the assistant turns are supervised.
        ignore_keys: keys of messages that are not read.
        split_special_tokens: encode special tokens in what messages and tools hold as the text that they are written
            with; the template's own stay special.
        enable_thinking: what the template is given for every prompt; None: whether the turn after it thinks.
    Raises:
        HmfError: messages that `normalise` refuses; no assistant turn that is supervised, or an empty one; the template
            fails, leaves a part of what messages and tools hold out, writes `<think>` twice, does not start a turn with
            its own prompt, or does not end it with a special token.
    """
    messages, tools = normalise(messages, tools, ignore_keys)
    answers = [index for index, message in enumerate(messages) if supervised(message)]
    if not answers:
        raise HmfError("no assistant turn, so no token is supervised; remove the row or add the answer")
    messages = messages[: len(messages) - messages_after(messages)]
    if thinking == "strip":
        messages = [without_thinking(message) for message in messages]
    for index, message in enumerate(messages):
        content = text_of(message["content"])
        answer = THINK_BLOCK.sub("", content, count=1) if THINK_BLOCK.match(content) else content
        if message["role"] == "assistant" and not (answer.strip() or thinking_of(message) or "tool_calls" in message):
            raise HmfError(f"messages[{index}]: the assistant says nothing; remove the row or the message")
    plain = Plain(tokenizer, [messages, tools]) if split_special_tokens else None
    if plain:
        messages, tools = [_hidden(message, plain) for message in messages], plain.hide(tools)
    template, answers = Template.of(tokenizer), answers if turns == "all" else answers[-1:]
    by_marks = template.marks_turns(tools)
    thinks = {
        index: bool(thinking_of(messages[index])) if enable_thinking is None else enable_thinking
        for index in (answers[-1:] if by_marks else answers)
    }
    chat = _Chat(template, template.read(messages, tools, thinks), thinks, plain)
    return [chat.by_marks(answers)] if by_marks else chat.by_prompts()


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    answers: list[Message],
    tools: list[Any] | None = None,
    *,
    ignore_keys: Iterable[str] = (),
    split_special_tokens: bool = False,
) -> list[Encoded]:
    """Several answers to one prompt, each supervised after the same tokens: thinking is enabled for all if one thinks.

    Raises:
        HmfError: as `encode_chat`; the template gives the answers different prompts.
    """
    thinking = any(thinking_of(answer) for answer in answers)
    encoded = [
        encode_chat(
            tokenizer,
            [*prompt, answer],
            tools,
            turns="last",
            ignore_keys=ignore_keys,
            split_special_tokens=split_special_tokens,
            enable_thinking=thinking,
        )[0]
        for answer in answers
    ]
    if any(item.prompt != encoded[0].prompt for item in encoded):
        raise HmfError(
            "the chat template gives the answers different prompts, so they cannot be compared; give all of them "
            "thinking, or none"
        )
    return encoded


class _Chat:
    """A conversation as a template writes it.

    thinks: the turns that are to be in the text in full, and whether the template is to enable thinking for them.
    """

    def __init__(self, template: Template, talk: Talk, thinks: dict[int, bool], plain: Plain | None):
        self.template, self.talk, self.thinks, self.plain = template, talk, thinks, plain
        self.tokenizer = template.tokenizer

    def by_prompts(self) -> list[Encoded]:
        documents: list[Encoded] = []
        text, parts = "", list[tuple[str, bool]]()
        messages, tools = self.talk.messages, self.talk.tools
        for index, thinking in self.thinks.items():
            if not index:
                raise HmfError("messages[0]: the assistant speaks first, so its turn has no prompt; start with a user")
            prompt = self.template.render(messages[:index], tools, add_generation_prompt=True, enable_thinking=thinking)
            whole = self.template.render(messages[: index + 1], tools, enable_thinking=thinking)
            if not whole.startswith(prompt):
                raise HmfError(f"messages[{index}]: {_difference(prompt, whole)}")
            # The template may write a newline after the turn; the turn itself ends with the end-of-turn token.
            turn = whole[len(prompt) :].rstrip("\n")
            self.check_doubled(index, prompt[-32:] + turn)
            self.template.check(self.talk, index, thinking, whole, len(prompt))
            if not (parts and prompt.startswith(text)):
                documents += self.tokenised(parts)
                text, parts = "", []
            parts += [(prompt[len(text) :], False), (turn, True)]
            text = prompt + turn
        return documents + self.tokenised(parts)

    def tokenised(self, parts: list[tuple[str, bool]]) -> list[Encoded]:
        """Prompts and turns are tokenised apart, exactly as in generation."""
        if not parts:
            return []
        ids: list[int] = []
        labels: list[int] = []
        for part, (text, learnt) in zip(encode_texts(self.tokenizer, [text for text, _ in parts]), parts, strict=True):
            if self.plain:
                part, _ = self.plain.restore(text, part, [0] * len(part))
            if learnt:
                self.check_end(part)
            ids += part
            labels += part if learnt else [IGNORED] * len(part)
        return [Encoded(ids, labels)]

    def by_marks(self, answers: list[int]) -> Encoded:
        messages, tools = self.talk.messages, self.talk.tools
        [(last, thinking)] = self.thinks.items()
        text, marks = self.template.render_marked(messages, tools, enable_thinking=thinking)
        self.check_doubled(last, text)
        # Whether earlier thinking stays is up to a template that marks its turns; the last turn's has to.
        self.template.check(self.talk, last, thinking, text)
        ids, mask = self.masked(text, marks)
        if self.plain:
            ids, mask = self.plain.restore(text, ids, mask)
        changes = [index for index in range(len(mask) + 1) if mask[index - 1 : index] != mask[index : index + 1]]
        spans = [(start, stop) for start, stop in pairwise(changes) if mask[start]]
        if not spans:
            raise HmfError("the chat template marks no token as the assistant's; fix its {% generation %} block")
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if turns != answers and answers != [last]:
            if len(spans) != len(turns):
                raise HmfError(
                    f"weight: the chat template marks {len(spans)} parts of the {len(turns)} turns that the assistant "
                    "has, so it is not known which of them are supervised; leave weight out"
                )
            spans = [spans[turns.index(index)] for index in answers]
        labels = [IGNORED] * len(ids)
        for start, stop in spans[-1:] if answers == [last] else spans:
            while stop > start and self.tokenizer.decode(ids[stop - 1]).isspace():  # a newline after the turn's end
                stop -= 1
            self.check_end(ids[start:stop])
            labels[start:stop] = ids[start:stop]
        return Encoded(ids[:stop], labels[:stop])

    def masked(self, text: str, marks: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Ids of a text; 1 for those from the first to the last that has a character of a part in `marks`, else 0."""
        if not self.tokenizer.is_fast:
            raise HmfError("the chat template marks parts of its text, which needs a tokenizer with a tokenizer.json")
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids, mask = list(encoded["input_ids"]), [0] * len(encoded["input_ids"])
        for start, stop in marks:
            tokens = [token for at in range(start, stop) if (token := encoded.char_to_token(at)) is not None]
            if tokens:
                mask[tokens[0] : tokens[-1] + 1] = [1] * (tokens[-1] + 1 - tokens[0])
        return ids, mask

    def check_doubled(self, index: int, text: str) -> None:
        if found := _DOUBLED.search(text):
            around = text[max(0, found.start() - 24) : found.end() + 24]
            raise HmfError(
                f"messages[{index}]: <think> is there twice ({around!r}): the chat template writes it around what has "
                "it already; put thinking into reasoning_content without tags, or set thinking: strip"
            )

    def check_end(self, ids: list[int]) -> None:
        if not ids or ids[-1] not in self.tokenizer.all_special_ids:
            shown = self.tokenizer.decode(ids[-8:])
            raise HmfError(
                f"an assistant turn ends with {shown!r} and not with a special token, so the model would not learn "
                "to stop; fix the chat template"
            )


def _hidden(message: Message, plain: Plain) -> Message:
    """A message without special tokens in its texts, but for the marks of an assistant's thinking."""
    marks = ("<think>", "</think>") if message["role"] == "assistant" else ()
    return {key: value if key == "role" else plain.hide(value, marks) for key, value in message.items()}


def _difference(prompt: str, whole: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    start = max(0, same - 16)
    return (
        f"by the chat template the prompt goes on {prompt[start : same + 24]!r} and the whole conversation "
        f"{whole[start : same + 24]!r}, so a turn cannot be told from its prompt; take a template with "
        "{% generation %} marks"
    )
