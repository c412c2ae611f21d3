# SPDX-License-Identifier: Apache-2.0
"""Encoding of texts and conversations into token ids and labels, with the same tokens as in generation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hmf.data.conversation import (
    RESULT_ROLES,
    ROLES,
    THINK_BLOCK,
    Message,
    messages_after,
    normalise,
    supervised,
    text_of,
    thinking_of,
    without_thinking,
)
from hmf.data.marked import MarkedConversation
from hmf.data.marks import marked_turns
from hmf.data.template import Template
from hmf.data.tokenizer import SpecialTokenSplitter, document_separator, encode_parts, encode_texts, is_special
from hmf.errors import HmfError

IGNORED = -100  # the label that transformers' losses ignore
Thinking = Literal["keep", "strip"]
Turns = Literal["all", "last"]
_DOUBLED = re.compile(r"(?:<think>|</think>)\s*<think>")


@dataclass(frozen=True)
class Encoded:
    """The token ids of one document and their labels."""

    ids: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Encoded:
        """A part as a document of its own. Its first token has no context and is not supervised."""
        return Encoded(self.ids[start:stop], [IGNORED, *self.labels[start + 1 : stop]])

    @property
    def prompt(self) -> list[int]:
        """The ids before the first supervised token."""
        return self.ids[: next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.ids))]


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> Encoded:
    """Separator, text, separator. All tokens but the first are supervised.

    Args:
        split_special_tokens: encode special tokens in the text as plain text.
    Raises:
        HmfError: the text has a lone surrogate.
    """
    return enclosed(encode_texts(tokenizer, [text], split_special_tokens)[0], document_separator(tokenizer))


def enclosed(ids: list[int], separator: int) -> Encoded:
    """A document's `ids` with a separator before and after them."""
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
    chat_template_kwargs: dict[str, Any] | None = None,
    enable_thinking: bool | None = None,
) -> list[Encoded]:
    """Encode a conversation with the tokenizer's chat template. The assistant's turns are supervised.

    If the template marks the assistant's text with {% generation %}, the marked parts are the turns, and a turn whose
    thinking the template removes later is a document of its own. Otherwise, a turn is the text that it adds to the
    prompt from which the model would generate it. A template that removes the thinking from earlier turns changes
    the text before a later turn. Such a turn starts another document, so that every turn is trained after exactly the
    prompt from which it is generated. Turns of weight 0 are context. Messages after the last supervised turn are left
    out.

    Args:
        thinking: "strip" removes the thinking from all assistant turns.
        turns: which of the assistant's turns are supervised.
        ignore_keys: keys of messages that are not read.
        split_special_tokens: encode special tokens in messages and tools as plain text; those that the template writes
            stay special.
        chat_template_kwargs: variables of the template. With `thinking="strip"`, `enable_thinking` is false.
        enable_thinking: that variable if it is not in `chat_template_kwargs`; None: true for the turns that have
            thinking.
    Returns:
        One or more documents.
    Raises:
        HmfError: `normalise` refuses the messages; there is no supervised assistant turn, or an empty one; or the
            template fails, omits a part of the messages, tools or variables, writes `<think>` twice, does not start a
            turn with its prompt, or does not end it with a special token.
    """
    messages, tools = normalise(messages, tools, ignore_keys)
    answers = [index for index, message in enumerate(messages) if supervised(message)]
    if not answers:
        others = sorted({message["role"] for message in messages} - {*ROLES, *RESULT_ROLES})
        named = f" (an answer's role is assistant, not {' or '.join(map(repr, others))})" if others else ""
        raise HmfError(f"no assistant turn is supervised{named}; remove the row or add an answer")
    messages = messages[: len(messages) - messages_after(messages)]
    if thinking == "strip":
        messages = [_stripped(message, f"messages[{index}]") for index, message in enumerate(messages)]
    for index, message in enumerate(messages):
        content = text_of(message["content"])
        answer = THINK_BLOCK.sub("", content, count=1) if THINK_BLOCK.match(content) else content
        if message["role"] == "assistant" and not (answer.strip() or thinking_of(message) or "tool_calls" in message):
            raise HmfError(f"messages[{index}]: the assistant's message is empty; remove the row or the message")
    variables = chat_template_kwargs or {}
    splitter = SpecialTokenSplitter(tokenizer, [messages, tools, variables]) if split_special_tokens else None
    if splitter:
        messages, tools = [_hidden(message, splitter) for message in messages], splitter.hide(tools)
        variables = splitter.hide(variables)
    template, answers = Template.of(tokenizer), answers if turns == "all" else answers[-1:]
    template.require_variables(variables, tools)
    enabled = False if thinking == "strip" else variables.get("enable_thinking", enable_thinking)
    variables = {name: value for name, value in variables.items() if name != "enable_thinking"}
    thinks = {index: bool(thinking_of(messages[index])) if enabled is None else enabled for index in answers}
    if not template.marks_turns(tools):
        return _Chat(template, template.read(messages, tools, thinks, variables), thinks, splitter).by_prompts()
    last = answers[-1]
    conversation = template.read(messages, tools, {last: thinks[last]}, variables)
    stripped = template.stripped(conversation, last, thinks[last], answers)
    if stripped:
        conversation = template.read(messages, tools, {index: thinks[index] for index in (*stripped, last)}, variables)
    chat = _Chat(template, conversation, thinks, splitter)
    return [
        *(chat.by_marks([index]) for index in stripped),
        chat.by_marks([index for index in answers if index not in stripped]),
    ]


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    answers: list[Message],
    tools: list[Any] | None = None,
    *,
    ignore_keys: Iterable[str] = (),
    split_special_tokens: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Encoded]:
    """Encode several answers to one prompt, each supervised after the same prompt tokens.

    Thinking is enabled for all answers if one of them has it, unless `chat_template_kwargs` has `enable_thinking`.

    Raises:
        HmfError: as for `encode_chat`; or the template writes different prompts for the answers.
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
            chat_template_kwargs=chat_template_kwargs,
            enable_thinking=thinking,
        )[0]
        for answer in answers
    ]
    if any(item.prompt != encoded[0].prompt for item in encoded):
        raise HmfError(
            "the chat template writes different prompts for the answers, so they cannot be compared; write thinking "
            "into all answers or none"
        )
    return encoded


class _Chat:
    """Encodes a conversation with a template.

    thinks: by index of the turns that must be written in full, whether thinking is enabled for them.
    """

    def __init__(
        self,
        template: Template,
        conversation: MarkedConversation,
        thinks: dict[int, bool],
        splitter: SpecialTokenSplitter | None,
    ):
        self.template, self.conversation, self.thinks, self.splitter = template, conversation, thinks, splitter
        self.tokenizer = template.tokenizer

    def by_prompts(self) -> list[Encoded]:
        """Supervise the texts that the template adds to the prompts."""
        documents: list[Encoded] = []
        text, parts = "", list[tuple[str, bool]]()
        messages, tools, variables = self.conversation.messages, self.conversation.tools, self.conversation.variables
        for index, thinking in self.thinks.items():
            if not index:
                raise HmfError(
                    "messages[0]: the first message is the assistant's, so it has no prompt; start with a user "
                    "message, or give it weight: 0 to keep it as context"
                )
            options = variables | {"enable_thinking": thinking}
            prompt = self.template.render(messages[:index], tools, add_generation_prompt=True, **options)
            whole = self.template.render(messages[: index + 1], tools, **options)
            if not whole.startswith(prompt):
                tagged = "</think>" in text_of(messages[index]["content"])
                fix = "write thinking into reasoning_content without tags, or " if tagged else ""
                raise HmfError(f"messages[{index}]: {_difference(prompt, whole, fix)}")
            # The template may write a newline after the end-of-turn token; it does not belong to the turn.
            turn = whole[len(prompt) :].rstrip("\n")
            self.check_doubled(index, prompt[-32:] + turn)
            self.template.check(self.conversation, index, thinking, whole, len(prompt))
            if not (parts and prompt.startswith(text)):
                documents += self.tokenised(parts)
                text, parts = "", []
            parts += [(prompt[len(text) :], False), (turn, True)]
            text = prompt + turn
        return documents + self.tokenised(parts)

    def tokenised(self, parts: list[tuple[str, bool]]) -> list[Encoded]:
        """Encode a list of (text, is supervised). Prompts and turns are tokenised separately, as in generation."""
        if not parts:
            return []
        ids: list[int] = []
        labels: list[int] = []
        for part, (text, is_turn) in zip(encode_parts(self.tokenizer, [text for text, _ in parts]), parts, strict=True):
            if self.splitter:
                part, _ = self.splitter.restore(text, part, [0] * len(part))
            if is_turn:
                self.check_end(part)
            ids += part
            labels += part if is_turn else [IGNORED] * len(part)
        return [Encoded(ids, labels)]

    def by_marks(self, answers: list[int]) -> Encoded:
        """Supervise the parts of `answers` that the template marks, in the messages up to the last of them."""
        last = answers[-1]
        thinking, messages, tools = self.thinks[last], self.conversation.messages[: last + 1], self.conversation.tools
        text, marks = self.template.render_marked(
            messages, tools, enable_thinking=thinking, **self.conversation.variables
        )
        self.check_doubled(last, text)
        # A template that marks its turns may remove the thinking of earlier turns, but not that of the last.
        self.template.check(self.conversation, last, thinking, text)
        turns = marked_turns(self.template, self.conversation, last, thinking, answers)
        if len(turns) != len(marks) or any(turn - {*answers} and turn & {*answers} for turn in turns):
            raise HmfError(
                "the chat template's marks cannot be assigned to the assistant's turns; use another template"
            )
        wanted = [mark for mark, turn in zip(marks, turns, strict=True) if turn & {*answers}]
        ids, mask = self.masked(text, wanted)
        if self.splitter:
            ids, mask = self.splitter.restore(text, ids, mask)
        changes = [index for index in range(len(mask) + 1) if mask[index - 1 : index] != mask[index : index + 1]]
        spans = [(start, stop) for start, stop in pairwise(changes) if mask[start]]
        labels = [IGNORED] * len(ids)
        for start, stop in spans:
            while stop > start and self.tokenizer.decode(ids[stop - 1]).isspace():  # a newline after the turn's end
                stop -= 1
            self.check_end(ids[start:stop])
            labels[start:stop] = ids[start:stop]
        return Encoded(ids[:stop], labels[:stop])

    def masked(self, text: str, marks: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The ids of a text, and a mask that is 1 for all tokens that overlap a part in `marks`."""
        if not self.tokenizer.is_fast:
            raise HmfError(
                "the chat template has {% generation %} marks, which need a fast tokenizer; add its tokenizer.json"
            )
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=False)
        ids, mask = list(encoded["input_ids"]), [0] * len(encoded["input_ids"])
        for start, stop in marks:
            tokens = [token for at in range(start, stop) if (token := encoded.char_to_token(at)) is not None]
            if tokens:
                mask[tokens[0] : tokens[-1] + 1] = [1] * (tokens[-1] + 1 - tokens[0])
        return ids, mask

    def check_doubled(self, index: int, text: str) -> None:
        if match := _DOUBLED.search(text):
            context = text[max(0, match.start() - 24) : match.end() + 24]
            raise HmfError(
                f"messages[{index}]: <think> occurs twice ({context!r}): the chat template adds it to a text that has "
                "it "
                "already; move the thinking into reasoning_content without tags, or set thinking: strip"
            )

    def check_end(self, ids: list[int]) -> None:
        if not ids or not is_special(self.tokenizer, ids[-1]):
            shown = self.tokenizer.decode(ids[-8:])
            raise HmfError(
                f"an assistant turn ends with {shown!r} instead of a special token, so the model would not learn to "
                "stop; fix the chat template"
            )


def _stripped(message: Message, place: str) -> Message:
    """The message without thinking. HmfError if an assistant's content has a part of a <think> block."""
    message = without_thinking(message)
    before, closing, _ = text_of(message["content"]).partition("</think>")
    if message["role"] == "assistant" and (
        before.lstrip().startswith("<think>") or (closing and "<think>" not in before)
    ):
        raise HmfError(
            f"{place}.content: has <think> or </think> alone, so thinking: strip cannot tell the thinking from the "
            "answer; complete the tags, or remove the row"
        )
    return message


def _hidden(message: Message, splitter: SpecialTokenSplitter) -> Message:
    """A message with the special tokens in its texts hidden, except the tags of the assistant's thinking."""
    marks = ("<think>", "</think>") if message["role"] == "assistant" else ()
    return {key: value if key == "role" else splitter.hide(value, marks) for key, value in message.items()}


def _difference(prompt: str, whole: str, fix: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    start = max(0, same - 16)
    return (
        f"the chat template writes {prompt[start : same + 24]!r} in the prompt, but {whole[start : same + 24]!r} in "
        "the "
        "conversation, so the turn cannot be separated from its prompt; "
        f"{fix}use a template with {{% generation %}} marks"
    )
