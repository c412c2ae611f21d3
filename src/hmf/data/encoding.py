# SPDX-License-Identifier: Apache-2.0
"""From a text or a conversation to token ids and labels, for training by the same tokens as in generation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hmf.data.tokenizer import document_separator, encode_texts
from hmf.errors import HmfError

IGNORED = -100
Message = dict[str, Any]
Thinking = Literal["keep", "strip"]
Turns = Literal["all", "last"]
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINK_BLOCK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
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


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Separator, text, separator; everything after the first token is supervised."""
    return enclosed(encode_texts(tokenizer, [text])[0], document_separator(tokenizer))


def enclosed(ids: list[int], separator: int) -> Encoded:
    """A document's `ids` between separators."""
    return Encoded([separator, *ids, separator], [IGNORED, *ids, separator])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None = None,
    thinking: Thinking = "keep",
    turns: Turns = "all",
) -> list[Encoded]:
    """A conversation with its assistant turns supervised, by the tokenizer's chat template.

    Where the template marks what the assistant says ({% generation %}), its marks count. Else each turn is what the
    template adds to the prompt that the model would be given for it. Templates that take the thinking out of earlier
    turns change the text before a later turn; such a turn starts a document of its own, so that every turn is trained
    after exactly the prompt that it is generated from. What follows the last assistant turn is left out.

    Args:
        thinking: "strip" takes the thinking out of all assistant turns, wherever it stands.
        turns: which of the assistant turns are supervised.
    Raises:
        HmfError: no assistant turn, or an empty one; the template fails, leaves tools or a part of a turn out, writes
            `<think>` twice, does not start a turn with its own prompt, or does not end it with a special token.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise HmfError("no assistant turn, so no token is supervised; remove the row or add the answer")
    messages = messages[: answers[-1] + 1]
    if thinking == "strip":
        messages = [_without_thinking(message) for message in messages]
    chat = _Template(tokenizer, tools)
    answers = answers if turns == "all" else answers[-1:]
    if chat.marks_turns:
        return [chat.by_marks(messages, turns)]
    return chat.by_prompts(messages, answers)


class _Template:
    """A tokenizer's chat template with one conversation's tools."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None):
        if not tokenizer.chat_template:
            raise HmfError("the tokenizer has no chat template; take an instruction model's, or give it one")
        self.tokenizer, self.tools = tokenizer, tools
        self.marks_turns = bool(_GENERATION.search(tokenizer.get_chat_template(tools=tools)))

    def render(self, messages: list[Message], **options: Any) -> Any:
        """The template's text, or what else `options` ask of transformers."""
        options = {"tokenize": False, "enable_thinking": bool(thinking_of(messages[-1]))} | options
        try:
            return self.tokenizer.apply_chat_template(messages, tools=self.tools, **options)
        except Exception as error:  # a template may fail in any way that Python code can
            raise HmfError(f"the chat template fails: {' '.join(str(error).split())}") from None

    def by_prompts(self, messages: list[Message], answers: list[int]) -> list[Encoded]:
        documents: list[Encoded] = []
        text, parts = "", list[tuple[str, bool]]()
        for index in answers:
            if not index:
                raise HmfError("messages[0]: the assistant speaks first, so its turn has no prompt; start with a user")
            message = messages[index]
            prompt = self.render(
                messages[:index], add_generation_prompt=True, enable_thinking=bool(thinking_of(message))
            )
            whole = self.render(messages[: index + 1])
            self.check_tools(whole)
            if not whole.startswith(prompt):
                raise HmfError(f"messages[{index}]: {_difference(prompt, whole)}")
            # The template may write a newline after the turn; the turn itself ends with the end-of-turn token.
            turn = whole[len(prompt) :].rstrip("\n")
            self.check_turn(index, message, turn, opening=prompt[-32:])
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
        for part, (_, supervised) in zip(encode_texts(self.tokenizer, [text for text, _ in parts]), parts, strict=True):
            if supervised:
                self.check_end(part)
            ids += part
            labels += part if supervised else [IGNORED] * len(part)
        return [Encoded(ids, labels)]

    def by_marks(self, messages: list[Message], turns: Turns) -> Encoded:
        text = self.render(messages)
        self.check_tools(text)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                # Whether earlier thinking stays is up to a template that marks its turns; the last turn's has to.
                self.check_turn(index, message, text, whole=index == len(messages) - 1)
        found = self.render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
        changes = [index for index in range(len(mask) + 1) if mask[index - 1 : index] != mask[index : index + 1]]
        spans = [(start, stop) for start, stop in pairwise(changes) if mask[start]]
        if not spans:
            raise HmfError("the chat template marks no token as the assistant's; mend its {% generation %} block")
        labels = [IGNORED] * len(ids)
        for start, stop in spans if turns == "all" else spans[-1:]:
            while stop > start and self.tokenizer.decode(ids[stop - 1]).isspace():  # a newline after the turn's end
                stop -= 1
            self.check_end(ids[start:stop])
            labels[start:stop] = ids[start:stop]
        return Encoded(ids[:stop], labels[:stop])

    def check_turn(self, index: int, message: Message, turn: str, opening: str = "", whole: bool = True) -> None:
        """HmfError when the `turn` that the template makes of a message, after the prompt's end `opening`, is not what
        the message says; `whole`: when its thinking has to be there, too."""
        if found := _DOUBLED.search(opened := opening + turn):
            around = opened[max(0, found.start() - 24) : found.end() + 24]
            raise HmfError(
                f"messages[{index}]: <think> is there twice ({around!r}): the chat template writes it around what has "
                "it already; put thinking into reasoning_content without tags, or set thinking: strip"
            )
        thinking, content, calls = thinking_of(message), text_of(message.get("content")), _names(message, "tool_calls")
        content = _THINK_BLOCK.sub("", content, count=1) if _THINK_BLOCK.match(content) else content
        if not (thinking or content.strip() or calls):
            raise HmfError(f"messages[{index}]: the assistant says nothing; remove the row or the message")
        lost = {
            "thinking": whole and thinking not in turn,
            "content": content.strip() not in turn,
            "tool calls": any(name not in turn for name in calls),
        }
        for what in (name for name, gone in lost.items() if gone):
            mend = "set thinking: strip, or " if what == "thinking" else ""
            raise HmfError(
                f"messages[{index}]: the chat template leaves its {what} out; {mend}take a tokenizer whose template "
                f"writes {what}"
            )

    def check_tools(self, text: str) -> None:
        if lost := [name for name in _names({"tools": self.tools}, "tools") if name not in text]:
            raise HmfError(
                f"the chat template leaves tools out ({lost[0]}); take a tokenizer whose template writes them"
            )

    def check_end(self, ids: list[int]) -> None:
        if not ids or ids[-1] not in self.tokenizer.all_special_ids:
            shown = self.tokenizer.decode(ids[-8:])
            raise HmfError(
                f"an assistant turn ends with {shown!r} and not with a special token, so the model would not learn "
                "to stop; mend the chat template"
            )


def text_of(content: Any) -> str:
    """Text of a message's content: a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or () if isinstance(part, dict))


def thinking_of(message: Message) -> str:
    """What an assistant message thinks, by its own field or in front of its content; without tags."""
    if message["role"] != "assistant":
        return ""
    for name in REASONING_FIELDS:
        if message.get(name):
            return text_of(message[name]).removeprefix("<think>").removesuffix("</think>").strip()
    found = _THINK_BLOCK.match(text_of(message.get("content")))
    return found[0].strip().removeprefix("<think>").removesuffix("</think>").strip() if found else ""


def _names(holder: Message, field: str) -> list[str]:
    """Names of the functions that a list of calls or tools is about."""
    functions = [item.get("function") or item for item in holder.get(field) or () if isinstance(item, dict)]
    return [item["name"] for item in functions if isinstance(item, dict) and isinstance(item.get("name"), str)]


def _without_thinking(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
    content = text_of(kept.get("content"))
    if block := _THINK_BLOCK.match(content):
        kept["content"] = content[block.end() :]
    return kept


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
