# SPDX-License-Identifier: Apache-2.0
"""Conversations become tokens with every assistant turn supervised exactly as it is generated, or are refused."""

import copy

import pytest

from hmf.data.encoding import IGNORED, encode_chat
from hmf.data.tokenizer import encode_texts
from hmf.errors import HmfError

QUESTION = [{"role": "user", "content": "1+1?"}]
TWO = {"role": "assistant", "content": "2", "reasoning_content": "Count."}
THREE = {"role": "assistant", "content": "3", "reasoning_content": "Count on."}
TALK = [*QUESTION, TWO, {"role": "user", "content": "2+1?"}, THREE, {"role": "user", "content": "Thanks"}]

# ChatML that keeps all turns as they are, with and without marks.
LINE = "{{ '\n' }}"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}BEFORE{{ m.content }}<|im_end|>AFTER{% else %}{{ m.content }}<|im_end|>"
    + LINE
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)


def plain(before="", after=LINE, opening=""):
    return PLAIN.replace("BEFORE", before).replace("AFTER", after).replace("OPEN", opening)


SIMPLE, MARKED = plain(), plain("{% generation %}", "{% endgeneration %}" + LINE)
# As most templates for training have it: the newline after the turn is marked, too.
MARKED_WIDE = plain("{% generation %}", LINE + "{% endgeneration %}")
THINK = "<think>\n"


@pytest.fixture
def templated(tokenizer):
    def make(template):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return make


def shown(tokenizer, document):
    """Whole text of a document, and its supervised parts."""
    parts, last = [], IGNORED
    for label in document.labels:
        if label != IGNORED:
            if last == IGNORED:
                parts.append([])
            parts[-1].append(label)
        last = label
    assert all(label in (IGNORED, token) for token, label in zip(document.ids, document.labels, strict=True))
    return tokenizer.decode(document.ids), [tokenizer.decode(part) for part in parts]


def test_a_turn_whose_context_changes_later_has_a_document_of_its_own(tokenizer):
    documents = encode_chat(tokenizer, TALK)
    first, second = (shown(tokenizer, document) for document in documents)
    assert first[1] == ["<think>\nCount.\n</think>\n\n2<|im_end|>"]
    assert second[1] == ["<think>\nCount on.\n</think>\n\n3<|im_end|>"]
    # The prompts are those of generation, token by token; what follows the last answer is left out.
    for document, turn in zip(documents, (1, 3), strict=True):
        prompt = tokenizer.apply_chat_template(TALK[:turn], tokenize=False, add_generation_prompt=True)
        ids = encode_texts(tokenizer, [prompt])[0]
        assert document.ids[: len(ids)] == ids and set(document.labels[: len(ids)]) == {IGNORED}
        assert IGNORED not in document.labels[len(ids) :]
    [last] = encode_chat(tokenizer, TALK, turns="last")
    assert last == documents[1]


def test_turns_around_a_tool_stay_in_one_document(tokenizer):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    talk = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "I add."},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two.", "reasoning_content": "So."},
    ]
    [document] = encode_chat(tokenizer, talk, tools)
    text, learnt = shown(tokenizer, document)
    assert text == tokenizer.apply_chat_template(talk, tools=tools, tokenize=False).removesuffix("\n")
    assert learnt == [
        '<think>\nI add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "<think>\nSo.\n</think>\n\nTwo.<|im_end|>",
    ]


def test_thinking_can_be_stripped_from_field_and_content(tokenizer):
    inside = {"role": "assistant", "content": "<think>\nCount.\n</think>\n\n2"}
    for answer in (TWO, inside):
        [document] = encode_chat(tokenizer, [*QUESTION, answer], thinking="strip")
        text, learnt = shown(tokenizer, document)
        assert learnt == ["2<|im_end|>"] and "Count" not in text
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>")  # the prompt without thinking
    assert encode_chat(tokenizer, [*QUESTION, inside]) == encode_chat(tokenizer, [*QUESTION, TWO])


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("template", [MARKED, MARKED_WIDE], ids=["turn", "turn and newline"])
def test_marks_of_a_template_and_its_prompts_say_the_same(templated, template, turns):
    simple, marked = templated(SIMPLE), templated(template)
    [by_prompts] = encode_chat(simple, TALK, thinking="strip", turns=turns)
    [by_marks] = encode_chat(marked, TALK, thinking="strip", turns=turns)
    assert by_prompts == by_marks
    assert shown(simple, by_marks)[1] == ["2<|im_end|>", "3<|im_end|>"][turns == "last" :]


THOUGHT = {"role": "assistant", "content": "<think>\nCount.\n</think>\n\n2"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TALK_WITH = {
    "lost": [*QUESTION, TWO],
    "there": [*QUESTION, THOUGHT],
    "first": [TWO],
    "unanswered": QUESTION,
    "nothing": [*QUESTION, {"role": "assistant", "content": " "}],
    "call": [*QUESTION, CALL],
}
REFUSED = {
    "nobody answers": (None, "unanswered", "no assistant turn"),
    "the assistant is first": (None, "first", r"messages\[0\]: the assistant speaks first"),
    "nothing is said": (None, "nothing", r"messages\[1\]: the assistant says nothing"),
    "a call is lost": (SIMPLE, "call", r"messages\[1\]: the chat template leaves its tool calls out"),
    "content is lost": (
        SIMPLE.replace("{{ m.content }}<|im_end|>", "<|im_end|>", 1),
        "there",
        r"messages\[1\]: the chat template leaves its thinking out",
    ),
    "an answer is lost": (
        SIMPLE.replace("{{ m.content }}", "{{ m.content.split('</think>')[0] }}", 1),
        "there",
        r"messages\[1\]: the chat template leaves its content out",
    ),
    "doubled": (plain(before="<think>\n\n</think>\n\n"), "there", r"messages\[1\]: <think> is there twice"),
    "doubled by the prompt": (plain(before=THINK, opening=THINK), "there", r"messages\[1\]: <think> is there twice"),
    "doubled under marks": (
        MARKED.replace("{% gen", "<think>\n{% gen"),
        "there",
        r"messages\[1\]: <think> is there twice",
    ),
    "thinking is lost": (SIMPLE, "lost", r"messages\[1\]: the chat template leaves its thinking out"),
    "marked thinking is lost": (MARKED, "lost", r"messages\[1\]: the chat template leaves its thinking out"),
    "another prompt": (plain(opening="Sure: "), "there", "told from its prompt"),
    "no end": (SIMPLE.replace("<|im_end|>" + LINE + "{% else", LINE + "{% else"), "there", "would not learn to stop"),
    "marks without the end": (MARKED.replace("<|im_end|>{% endgen", "{% endgen"), "there", "would not learn to stop"),
    "marks nothing": (MARKED.replace("== 'assistant'", "== 'nobody'"), "there", "marks no token"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "there", "template fails: roles must alternate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_something_else_is_refused(tokenizer, templated, name):
    template, messages, words = REFUSED[name]
    with pytest.raises(HmfError, match=words):
        encode_chat(tokenizer if template is None else templated(template), TALK_WITH[messages])


def test_tools_that_the_template_does_not_write(templated):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    for template in (SIMPLE, MARKED):
        with pytest.raises(HmfError, match=r"the chat template leaves tools out \(add\)"):
            encode_chat(templated(template), TALK_WITH["there"], tools)


def test_a_prompt_that_opens_the_thinking(templated):
    opening = templated(plain(opening=THINK))
    [document] = encode_chat(opening, TALK_WITH["there"])
    text, learnt = shown(opening, document)
    assert learnt == ["Count.\n</think>\n\n2<|im_end|>"] and text.count("<think>") == 1


def test_a_tokenizer_without_a_template(templated):
    with pytest.raises(HmfError, match="no chat template"):
        encode_chat(templated(None), [*QUESTION, TWO])
