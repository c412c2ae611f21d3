# SPDX-License-Identifier: Apache-2.0
"""The parts of a conversation that a chat template marks with {% generation %}, and the turns that they are of."""

from __future__ import annotations

from hmf.data.marked import TOOLS, MarkedConversation
from hmf.data.template import Template, keep
from hmf.errors import HmfError

BLOCK = "{% generation %} block, or use another template"


def marked_turns(
    template: Template, conversation: MarkedConversation, last: int, thinking: bool, answers: list[int]
) -> list[set[int]]:
    """For each part that {% generation %} marks in the messages up to `last`: the messages that it is of.

    Raises:
        HmfError: a part holds a text that is not the assistant's, or a text of one of `answers` is not marked.
    """
    key = ("".join(conversation.structures[: last + 1]), conversation.context, thinking, *answers)
    if key in template.turns:
        return template.turns[key]
    text, marks = template.render_marked(
        conversation.marked[: last + 1], conversation.marked_tools, enable_thinking=thinking, **conversation.variables
    )
    if not any(start < stop for start, stop in marks):
        raise HmfError(f"the chat template marks no token as the assistant's; fix its {BLOCK}")
    written = [(place, conversation.leaves[number]) for place, number in conversation.written(text)]
    parts = [[leaf for place, leaf in written if start <= place < stop] for start, stop in marks]
    inside = {leaf for leaves in parts for leaf in leaves}
    for _, leaf in written:
        if leaf in inside and (leaf.message == TOOLS or conversation.original[leaf.message]["role"] != "assistant"):
            what = "tools" if leaf.message == TOOLS else f"messages[{leaf.message}].{leaf.path}"
            raise HmfError(f"the chat template marks {what} as the assistant's text; fix its {BLOCK}")
        if leaf.message in answers and leaf not in inside and leaf.what != "name":
            raise HmfError(
                f"messages[{leaf.message}].{leaf.path}: the chat template does not mark its {leaf.what}, so the "
                f"model would not learn to write it; fix its {BLOCK}"
            )
    # A part without texts, such as the end of a turn, belongs to the assistant's text before it or after it.
    texts = [(place, leaf.message) for place, leaf in written]
    turns = []
    for leaves, (start, _) in zip(parts, marks, strict=True):
        near = [message for place, message in texts if place < start][-1:]
        near += [message for place, message in texts if place >= start][:1]
        own = [message for message in near if message >= 0 and conversation.original[message]["role"] == "assistant"]
        turns.append({leaf.message for leaf in leaves} or {*own[:1]})
    keep(template.turns, key, turns)
    return turns
