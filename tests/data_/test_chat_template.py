# SPDX-License-Identifier: Apache-2.0
"""The teacher's chat template, against the exact text of each rule."""

from pathlib import Path

import pytest

TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
TOOLS_TEXT = (
    'Tools:\n<tools>\n{"type": "function", "function": {"name": "add", "description": "Add.", '
    '"parameters": {"type": "object"}}}\n</tools>\n'
    'Call one as <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
CALL_TEXT = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


EMPTY = "<think>\n\n</think>\n\n"
CASES = {
    "one user turn": ([user("Hi")], {}, turn("user", "Hi")),
    "a system turn": (
        [{"role": "system", "content": "Be kind."}, user("Hi")],
        {},
        turn("system", "Be kind.") + turn("user", "Hi"),
    ),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]}],
        {},
        turn("user", "Hi there"),
    ),
    "ready to answer, thinking on": (
        [user("Hi")],
        {"add_generation_prompt": True},
        turn("user", "Hi") + "<|im_start|>assistant\n",
    ),
    "thinking on by name": (
        [user("Hi")],
        {"add_generation_prompt": True, "enable_thinking": True},
        turn("user", "Hi") + "<|im_start|>assistant\n",
    ),
    "thinking off": (
        [user("Hi")],
        {"add_generation_prompt": True, "enable_thinking": False},
        turn("user", "Hi") + "<|im_start|>assistant\n" + EMPTY,
    ),
    "the last answer shows its thinking": (
        [user("1+1"), assistant("2", reasoning_content="Two.")],
        {},
        turn("user", "1+1") + turn("assistant", "<think>\nTwo.\n</think>\n\n2"),
    ),
    "the last answer without thinking has an empty block": (
        [user("1+1"), assistant("2")],
        {},
        turn("user", "1+1") + turn("assistant", EMPTY + "2"),
    ),
    "thinking inside the content": (
        [user("1+1"), assistant("<think>\nTwo.\n</think>\n\n2")],
        {},
        turn("user", "1+1") + turn("assistant", "<think>\nTwo.\n</think>\n\n2"),
    ),
    "earlier thinking is stripped, from its field and from the content": (
        [
            user("a"),
            assistant("b", reasoning_content="x"),
            user("c"),
            assistant("<think>\ny\n</think>\n\nd"),
            user("e"),
        ],
        {},
        turn("user", "a") + turn("assistant", "b") + turn("user", "c") + turn("assistant", "d") + turn("user", "e"),
    ),
    "tools without a system turn": ([user("Hi")], {"tools": [TOOL]}, turn("system", TOOLS_TEXT) + turn("user", "Hi")),
    "tools after a system turn": (
        [{"role": "system", "content": "Be kind."}, user("Hi")],
        {"tools": [TOOL]},
        turn("system", "Be kind.\n\n" + TOOLS_TEXT) + turn("user", "Hi"),
    ),
    "a call, its arguments a dict": (
        [user("Add"), assistant("", tool_calls=[CALL])],
        {},
        turn("user", "Add") + turn("assistant", EMPTY + CALL_TEXT),
    ),
    "a call, its arguments JSON text": (
        [user("Add"), assistant(None, tool_calls=[{"function": {"name": "add", "arguments": '{"a": 1, "b": "é"}'}}])],
        {},
        turn("user", "Add") + turn("assistant", EMPTY + CALL_TEXT),
    ),
    "two calls after words": (
        [user("Add"), assistant("Both.", tool_calls=[CALL, CALL["function"]])],
        {},
        turn("user", "Add") + turn("assistant", f"{EMPTY}Both.\n{CALL_TEXT}\n{CALL_TEXT}"),
    ),
    "results in one user turn, and the thinking since the question stays": (
        [
            user("Add"),
            assistant("", tool_calls=[CALL], reasoning_content="I add."),
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "4"},
            assistant("Done.", reasoning_content="So."),
        ],
        {},
        turn("user", "Add")
        + turn("assistant", f"<think>\nI add.\n</think>\n\n{CALL_TEXT}")
        + turn("user", "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>")
        + turn("assistant", "<think>\nSo.\n</think>\n\nDone."),
    ),
    "a later question strips the thinking of a call": (
        [
            user("Add"),
            assistant("", tool_calls=[CALL], reasoning_content="I add."),
            {"role": "tool", "content": "3"},
            assistant("Three.", reasoning_content="So."),
            user("Thanks"),
        ],
        {},
        turn("user", "Add")
        + turn("assistant", CALL_TEXT)
        + turn("user", "<tool_response>\n3\n</tool_response>")
        + turn("assistant", "Three.")
        + turn("user", "Thanks"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rendering(tokenizer, name):
    messages, options, expected = CASES[name]
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == expected


def test_the_recipe_holds_the_template_that_the_teacher_has(tokenizer):
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "teacher" / "chat_template.jinja"
    assert tokenizer.chat_template.rstrip("\n") == recipe.read_text(encoding="utf-8").rstrip("\n")


def test_markers_are_single_tokens_and_only_turns_are_special(tokenizer):
    for marker in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"):
        ids = tokenizer(marker).input_ids
        assert len(ids) == 1 and tokenizer.decode(ids, skip_special_tokens=True) == marker
    assert (
        tokenizer.decode(tokenizer("<|im_start|>x<|im_end|><|endoftext|>").input_ids, skip_special_tokens=True) == "x"
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 2025 \n\n\n", "Füße 漢字 🙂 e\u0301", " \u00a0 x", "\r\n  a\r"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("2025").input_ids) == 4  # digits stand alone
