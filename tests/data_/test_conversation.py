# SPDX-License-Identifier: Apache-2.0
"""What messages hold is in the text that the model reads, in its one meaning, or the conversation is refused."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hmf.data.conversation import messages_after, normalise
from hmf.data.encoding import encode_answers, encode_chat
from hmf.errors import HmfError

trl = pytest.importorskip("trl", reason="needs trl's chat templates, which `make test` installs")
PUBLISHED = Path(trl.__file__).parent / "chat_templates"
ENDS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|END_OF_TURN_TOKEN|>",
    "<turn|>",
]

# As templates of a year or two ago are: `arguments | tojson`, roles without a check, contents that are strings.
OLD = (
    "{%- for tool in tools or [] %}{{ tool | tojson }}\n{% endfor -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{%- endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the system says goes before the last question, as in Mistral's; no other role is known.
INST = (
    "{%- set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{%- for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ system }} {% endif %}{{ m.content | trim }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}"
)
DROPS_ZERO = OLD.replace("{{ m.content }}", "{{ m.content.split('#')[0] }}")
TEXT_ARGUMENTS = OLD.replace("c.function.arguments | tojson", "'args ' + c.function.arguments")
AS_IT_IS = OLD.replace("c.function.arguments | tojson", "c.function.arguments")  # Python's notation of an object
NULL_CONTENT = OLD.replace("in m.tool_calls or []", "in (m.tool_calls if m.content is none else []) or []")
TWICE = OLD.replace("{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}")
ONE_CALL = OLD.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
# As in Ministral 3's: the parts of an answer are thinking and text.
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.content is string %}{{ m.content }}<|im_end|>"
    "{% else %}{% for p in m.content %}{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}"
    "{% endfor %}<|im_end|>{% endif %}{% endfor %}"
)
REVERSED = OLD.replace("for m in messages", "for m in messages | reverse")
PARTS_ONLY = OLD.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")


@pytest.fixture(scope="module")
def templated(tokenizer):
    made = {}

    def make(template):
        """The tokenizer with a template: a text, a file of trl's by its name, or None for its own."""
        if template not in made:
            changed = copy.deepcopy(tokenizer)
            if template is not None:
                changed.add_special_tokens({"additional_special_tokens": ENDS, "bos_token": "<|endoftext|>"})
                published = PUBLISHED / f"{template[:40]}.jinja"
                changed.chat_template = published.read_text() if published.is_file() else template
            made[template] = changed
        return made[template]

    return make


def text_of(tokenizer, messages, tools=None, **options):
    """The text of the last document, the answer after a bar."""
    document = encode_chat(tokenizer, messages, tools, **options)[-1]
    cut = len(document.prompt)
    return tokenizer.decode(document.ids[:cut]) + "|" + tokenizer.decode(document.ids[cut:])


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def call(city="Lyon", identity=None, **more):
    function = {"name": "weather", "arguments": json.dumps({"city": city, "days": 3, "unit": None})}
    return {"type": "function", "function": function | more} | ({"id": identity} if identity else {})


def result(content, identity=None, **more):
    return {"role": "tool", "content": content, **more} | ({"tool_call_id": identity} if identity else {})


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": {}}}]
HI, HELLO = user("Hi?"), answer("Hello.")


@pytest.mark.parametrize("template", [None, OLD, "qwen2_5", "qwen3", "llama3_1", "gptoss"], ids=lambda t: str(t)[:9])
def test_arguments_as_json_text_are_those_of_an_object(templated, template):
    tokenizer = templated(template)
    talk = [HI, answer(None, tool_calls=[call()]), result("21"), answer("21.")]
    objects = copy.deepcopy(talk)
    objects[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Lyon", "days": 3, "unit": None}
    assert encode_chat(tokenizer, talk, TOOLS) == encode_chat(tokenizer, objects, TOOLS)
    text = text_of(tokenizer, talk[:2], TOOLS)
    assert '{"city": "Lyon", "days": 3, "unit": null}' in text.split("|", 1)[1]


VALUES = "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ VALUE }}{% endfor %}"
AS_TEXT = OLD.replace("{{ c.function.arguments | tojson }}", VALUES.replace("VALUE", "v"))
READS_PARAMETERS = OLD.replace("tool | tojson", "[tool.name, tool.description, tool.parameters or {}] | tojson")
NO_NULL = OLD.replace(
    "{{ c.function.arguments | tojson }}",
    VALUES.replace("<{{ k }}>{{ VALUE }}", "{% if v is not none %}<{{ k }}>{{ v | tojson }}{% endif %}"),
)


@pytest.mark.parametrize(
    "template", [None, OLD, TEXT_ARGUMENTS, AS_IT_IS, AS_TEXT, "qwen3", "qwen3_5_think", "qwen3_8", "llama3_1"]
)
def test_null_true_and_false_are_those_of_json(templated, template):
    """Qwen3.5's published template writes None and True; where values are text, JSON's literals are passed as text."""
    talk = [
        user("None or True?"),
        answer(None, tool_calls=[call(arguments={"unit": None, "now": True, "on": False, "word": "True"})]),
    ]
    tokenizer = templated(template)
    [document] = encode_chat(tokenizer, talk)
    text = tokenizer.decode(document.ids[len(document.prompt) :])
    names = {"unit": "null", "now": "true", "on": "false", "word": "True"}
    assert all(re.search(rf"\b{name}\b\W+{value}\b", text) for name, value in names.items())
    assert not re.search(r"None|False", text) and '"null"' not in text and "'null'" not in text


def test_literals_inside_of_arguments(templated):
    nested = [user("q"), answer(None, tool_calls=[call(arguments={"place": [None, {"now": True}]})])]
    assert '[null, {"now": true}]' in text_of(templated("qwen3_5_think"), nested)
    for refused, message in [(AS_TEXT, "Python's notation"), (NO_NULL, "leaves its tool calls out")]:
        talk = nested if refused == AS_TEXT else [user("q"), answer(None, tool_calls=[call(arguments={"place": None})])]
        with pytest.raises(HmfError, match=message):
            encode_chat(templated(refused), talk)


def test_the_schema_of_a_tool_may_have_another_key(templated):
    """Anthropic's input_schema is in the text where a template writes tools whole, and refused where it is left out."""
    schema = {"type": "object", "properties": {"townname": {"type": "string"}}}
    tools = [{"name": "weather", "description": "Now.", "input_schema": schema}]
    assert "townname" in text_of(templated("qwen3"), [user("q"), answer("a")], tools)
    with pytest.raises(HmfError, match=r"leaves tools out \(weather.townname\)"):
        encode_chat(templated(READS_PARAMETERS), [user("q"), answer("a")], tools)


QUOTED = OLD.replace(
    "{{ c.function.arguments | tojson }}",
    "{ {%- for k, v in c.function.arguments.items() %}{{ k }}:"
    "{% if v is string %}«{{ v }}»{% elif v is none %}None{% else %}{{ v }}{% endif %}{% endfor %} }",
).replace("{ {%- for", "{{ '{' }}{%- for")


NAMES = "{% for tool in tools or [] %}{{ tool.name }}({{ tool.description }}){% endfor %}" + OLD.split("endfor -%}")[1]


def test_the_parameters_of_a_tool_are_not_left_out(templated):
    """Their names may occur anywhere else in the text."""
    place = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
    schemas = {
        "f.a": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        "f.place": {"type": "object", "properties": {"place": place}},
        "f.city": {"city": {"type": "str", "description": "A town."}},
    }
    for path, schema in schemas.items():
        tools = [{"name": "f", "description": "Finds a place, town or city.", "parameters": schema}]
        with pytest.raises(HmfError, match=rf"leaves tools out \({path}\)"):
            encode_chat(templated(NAMES), [user("a place?"), answer("a city")], tools)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": schemas["f.place"]}}]
    only_outer = OLD.replace(
        "{{ tool | tojson }}", "{{ tool.function.name }}{{ tool.function.description }} place: {type: object}"
    )
    with pytest.raises(HmfError, match=r"leaves tools out \(f.place\)"):
        encode_chat(templated(only_outer), [HI, HELLO], tools)
    for template in ("qwen3", "gptoss", "gemma4", "llama3_1"):
        assert "town" in text_of(templated(template), [HI, HELLO], tools)


def test_calls_may_be_json_text_and_texts_may_be_json(templated):
    """As in tables, where all messages have the same fields."""
    objects = [HI, answer("", tool_calls=[call()]), result("21"), HELLO]
    texts = [
        HI,
        answer("", tool_calls=json.dumps([call()])),
        result("21", tool_calls=""),
        answer("Hello.", tool_calls="[]"),
    ]
    assert normalise(texts) == normalise(objects)
    parts = json.dumps([{"type": "text", "text": "21"}])
    for said in ([{"type": "text", "text": parts}], json.dumps([{"type": "event"}]), '[{"type": "text", ', "[1]"):
        assert normalise([user(said), HELLO])[0][0]["content"] == said
    assert normalise([*objects[:2], result(parts), HELLO])[0][2]["content"] == parts  # as a tool may write it


def test_ids_that_a_template_writes_are_not_empty(templated):
    """A template such as Mistral's, but without a check, would write an empty id for a call that has none."""
    writes = OLD.replace("<call>", "<call>#{{ c.id }}#").replace(
        "{{ m.content }}", "{{ m.content }}{% if m.role == 'tool' %}@{{ m.tool_call_id }}@{% endif %}"
    )
    with pytest.raises(HmfError, match=r"messages\[1\]: a call or result has no id, but the chat template writes it"):
        encode_chat(templated(writes), [HI, answer("", tool_calls=[call()]), result("21"), HELLO], TOOLS)
    with pytest.raises(HmfError, match=r"messages\[1\]: a call or result has no id"):
        encode_chat(templated(writes), [HI, result("21"), HELLO])
    several = [HI, answer("", tool_calls=[call(identity="a"), call("Paris", "b")]), result("21"), result("18"), HELLO]
    text = text_of(templated(writes), several, TOOLS)  # results without an id have that of their call
    assert text.index("#a#") < text.index("#b#") < text.index("21@a@") < text.index("18@b@")
    alike = [HI, answer("", tool_calls=[call(identity="a"), call("Paris", "a")]), result("21"), result("18"), HELLO]
    assert "tool_call_id" not in normalise(normalise(alike)[0])[0][2]
    optional = writes.replace("#{{ c.id }}#", "{{ '#' + c.id if c.id else '' }}").replace("@{{ m.tool_call_id }}@", "")
    assert "#" not in text_of(templated(optional), [HI, answer("", tool_calls=[call()]), result("21"), HELLO], TOOLS)


def test_schemas_as_json_text_are_those_of_objects(templated):
    """As in tables, whose columns have one type: quoted text in the prompt would be encoded twice."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    whole, inside = json.dumps(schema), schema | {"properties": json.dumps(schema["properties"])}
    for template in (None, "qwen2_5", "gptoss"):
        texts = {
            text_of(templated(template), [HI, HELLO], [{"type": "function", "function": TOOLS[0]["function"] | more}])
            for more in ({"parameters": form} for form in (schema, whole, inside))
        }
        assert len(texts) == 1 and "city" in texts.pop()
    for tool, place in (({"name": "f", "parameters": "a city"}, r"tools\[0\].parameters"),):
        with pytest.raises(HmfError, match=f"{place}: is text but not valid JSON .*; write an object"):
            normalise([HI, HELLO], [tool])


def test_tools_without_function_are_wrapped_for_templates_that_read_it(templated):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    whole = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": schema}}
    for template in ("gptoss", "gemma4"):
        expected = text_of(templated(template), [HI, HELLO], [whole])
        for bare in (whole["function"], {"name": "weather", "description": "Of a city.", "input_schema": schema}):
            assert text_of(templated(template), [HI, HELLO], [bare]) == expected
    assert '\n{"name": "weather"' in text_of(templated("qwen2_5"), [HI, HELLO], [whole["function"]])  # as it is
    with pytest.raises(HmfError, match="leaves tools out"):
        encode_chat(templated("llama3"), [HI, HELLO], [whole["function"]])


def test_literals_are_not_passed_as_text_to_a_template_that_quotes_texts(templated):
    """Gemma 4 has its own quotation marks and writes None. With null as text, it would write the text "null"."""
    for template in (QUOTED, "gemma4_v2"):
        with pytest.raises(HmfError, match="Python's notation"):
            encode_chat(templated(template), [HI, answer("", tool_calls=[call(arguments={"unit": None})])], TOOLS)
    assert "weather {city:«Lyon» }" in text_of(
        templated(QUOTED), [HI, answer("", tool_calls=[call(arguments={"city": "Lyon"})])]
    )


IN_PYTHON = OLD.replace("tool | tojson", "tool | string")


def test_tools_may_be_written_in_pythons_notation(templated):
    """As SmolLM3's published template writes them; calls may not."""
    text = text_of(templated(IN_PYTHON), [HI, HELLO], TOOLS)
    assert "{'name': 'weather', 'description': 'Of a city.', 'parameters': {}}" in text
    with pytest.raises(HmfError, match=r"messages\[0\]: the chat template leaves its content out"):
        encode_chat(templated(IN_PYTHON.replace("{{ m.content }}", "{{ [m.content] }}")), [HI, HELLO], TOOLS)


def test_a_template_is_given_the_form_that_it_reads(templated):
    talk = [HI, answer("", tool_calls=[call()])]
    assert 'args {"city": "Lyon", "days": 3, "unit": null}' in text_of(templated(TEXT_ARGUMENTS), talk, TOOLS)
    for arguments in ({"city": "Lyon"}, {"unit": None}, {"days": [3]}, {"on": True}, {"in": {"days": 3}}, {"days": 3}):
        given = [HI, answer("", tool_calls=[call(arguments=arguments)])]
        assert f"weather {json.dumps(arguments)}</call>" in text_of(templated(AS_IT_IS), given, TOOLS)
        assert f"weather {json.dumps(arguments)}</call>" in text_of(templated(OLD), given, TOOLS)
    assert '<call>weather {"city": "Lyon"' in text_of(templated(NULL_CONTENT), talk, TOOLS)
    thought = answer("Hello.", reasoning_content="Greet.")
    assert text_of(templated(BLOCKS), [HI, thought]) == "[INST]Hi?[/INST]|[THINK]Greet.[/THINK]Hello.<|im_end|>"
    assert text_of(templated(BLOCKS), [HI, HELLO]) == "[INST]Hi?[/INST]|Hello.<|im_end|>"
    for template in ("qwen2_5", OLD, PARTS_ONLY):  # which know no thinking
        for thinks in (thought, thought | {"content": "", "tool_calls": [call()]}):
            with pytest.raises(HmfError, match="the chat template leaves its (thinking|content) out"):
                encode_chat(templated(template), [HI, thinks])
    parts = [user([{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]), HELLO]
    assert "One.\nTwo.<|im_end|>" in text_of(templated(OLD), parts)  # as vLLM joins them
    assert "One.Two.<|im_end|>" in text_of(templated(None), parts)  # as the template does
    assert "One.Two.<|im_end|>" in text_of(templated(PARTS_ONLY), parts)
    assert "Hi?<|im_end|>" in text_of(templated(PARTS_ONLY), [HI, HELLO])
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert text_of(templated("qwen3"), [HI, answer("Hello.", **{name: "Greet."})]).endswith(
            "|<think>\nGreet.\n</think>\n\nHello.<|im_end|>"
        )


@pytest.mark.parametrize("template", [None, "qwen3", "llama3_1"], ids=str)
def test_parts_without_text_are_an_empty_text(templated, template):
    """Llama 3.1's template writes a list of parts in Python's notation."""
    empty = [{"type": "text", "text": ""}, {"type": "text", "text": None}]
    assert encode_chat(templated(template), [user(empty), HELLO]) == encode_chat(templated(template), [user(""), HELLO])


def test_a_developer_is_the_system_where_there_is_no_such_role(templated):
    talk = [{"role": "developer", "content": "Be kind."}, HI, HELLO]
    for template in (None, OLD, "qwen2_5", "qwen3", "llama3_1", "gemma3", "cohere2"):
        tokenizer = templated(template)
        assert encode_chat(tokenizer, talk) == encode_chat(tokenizer, [system("Be kind."), *talk[1:]])
    text = text_of(templated("gptoss"), talk)
    assert "Be kind." in text.split("<|start|>developer")[1]


def test_a_result_that_is_no_text_is_its_json(templated):
    for content, written in (
        ({"t": 21, "sky": "è"}, '{"t": 21, "sky": "è"}'),
        ([1, "a"], '[1, "a"]'),
        (21.5, "21.5"),
        (True, "true"),
        ([{"type": "text", "text": "21 C"}], "21 C"),
        ("plain", "plain"),
    ):
        talk = [HI, answer("", tool_calls=[call()]), result(content), answer("Yes.")]
        for template in (None, "qwen2_5", "qwen3"):
            assert f"<tool_response>\n{written}\n</tool_response>" in text_of(templated(template), talk, TOOLS)


def test_results_come_in_the_order_of_their_calls(templated):
    calls = answer("", tool_calls=[call("Lyon", "a"), call("Nice", "b")])
    for results in ([result("L", "a"), result("N", "b")], [result("N", "b"), result("L", "a", name="weather")]):
        text = text_of(templated(None), [HI, calls, *results, answer("So.")], TOOLS)
        assert "<tool_response>\nL\n</tool_response>\n<tool_response>\nN\n" in text


def test_what_the_system_says_may_be_moved_but_not_lost(templated):
    talk = [system("Be kind."), HI, HELLO, user("More?"), answer("Yes.")]
    assert (
        text_of(templated(INST), talk) == "[INST]Hi?[/INST]Hello.<|im_end|>[INST]Be kind. More?[/INST]|Yes.<|im_end|>"
    )
    later = [HI, HELLO, system("In French."), user("More?"), answer("Oui.")]
    with pytest.raises(HmfError, match=r"messages\[2\]: the chat template leaves its content out .* 'system'"):
        encode_chat(templated(INST), later)
    assert "In French." in text_of(templated(None), later)


def test_a_weight_of_0_is_context(templated):
    talk = [
        HI,
        answer("Bad.", weight=0),
        user("Again?"),
        answer("Good.", weight=1),
        user("Thanks"),
        answer("!", weight=0),
    ]
    turn = "{{ m.content }}<|im_end|>"
    marked = "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    marked += (
        f"{{% generation %}}{turn}{{% endgeneration %}}{{% else %}}{turn}{{% endif %}}{{{{ '\n' }}}}{{% endfor %}}"
    )
    wanted = "Bad.<|im_end|>\n<|im_start|>user\nAgain?<|im_end|>\n<|im_start|>assistant\n|Good.<|im_end|>"
    for template in (OLD, marked):
        for turns in ("all", "last"):
            assert text_of(templated(template), talk, turns=turns).endswith(wanted)
    every = [{key: value for key, value in message.items() if key != "weight"} for message in talk]
    assert len([x for x in encode_chat(templated(marked), every)[0].labels if x >= 0]) > 6
    assert messages_after(talk) == 2 and messages_after(every) == 0
    with pytest.raises(HmfError, match="no assistant turn"):
        encode_chat(templated(None), [HI, answer("x", weight=0)])


GENERATION = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
MARKS = OLD.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}" + GENERATION + "{% else %}{{ m.content }}{% endif %}"
)
REASONED = MARKS.replace("generation %}{{ m", "generation %}{{ m.thinking if m.thinking and loop.last }}{{ m")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MARKS.replace("m.role == 'assistant'", "true"), r"marks messages\[0\].content as the assistant's text"),
        (MARKS.replace("== 'assistant'", "== 'user'"), r"marks messages\[0\].content as the assistant's text"),
        (
            MARKS.replace("m.role == 'assistant'", "loop.last"),
            r"messages\[1\].content: the .* does not mark its content",
        ),
        (MARKS, r"messages\[3\].tool_calls\[0\].function.name: the .* does not mark its tool calls"),
        (MARKS.replace("== 'assistant'", "== 'none'"), "marks no token"),
    ],
    ids=["all messages", "the user's", "the last", "calls", "nothing"],
)
def test_marks_that_are_not_those_of_the_answers_are_refused(templated, template, message):
    talk = [HI, HELLO, user("q"), answer("", tool_calls=[call()]) if template == MARKS else answer("a")]
    with pytest.raises(HmfError, match=message):
        encode_chat(templated(template), talk)


@pytest.mark.parametrize("template", [REASONED, "lfm2_2_5"], ids=["reasoned", "lfm2_2_5"])
def test_thinking_that_a_template_with_marks_removes_is_learnt_in_a_document_of_its_own(templated, template):
    """As with a template without marks, each turn is trained with its own thinking, after the prompt that it has."""
    talk = [
        HI,
        answer("One.", thinking="First."),
        user("q"),
        answer("Two."),
        user("r"),
        answer("Three.", thinking="Last."),
    ]
    tokenizer = templated(template)
    texts = [tokenizer.decode([x for x in document.labels if x >= 0]) for document in encode_chat(tokenizer, talk)]
    assert len(texts) == 2
    assert "First." in texts[0] and "One." in texts[0] and "Two." not in texts[0]
    assert "First." not in texts[1] and "One." not in texts[1]
    assert all(word in texts[1] for word in ("Two.", "Last.", "Three."))


@pytest.mark.parametrize("template", [None, "qwen2_5", "qwen3"], ids=str)
def test_tags_that_the_template_writes_too_stand_once(templated, template):
    """Results in the Hermes format have the tags in their text; the template would write a second pair around them."""
    made = '<tool_response>\n{"t": 21}\n</tool_response>'

    def talk(*contents):
        called = answer("", tool_calls=[call()] * len(contents))
        return [HI, called, *map(result, contents), answer("21.")]

    tokenizer = templated(template)
    plain = encode_chat(tokenizer, talk('{"t": 21}'), TOOLS)
    assert encode_chat(tokenizer, talk(made), TOOLS) == encode_chat(tokenizer, talk(f"{made}\n"), TOOLS) == plain
    assert text_of(tokenizer, talk(f"{made}\n{made}"), TOOLS).count(made) == 2  # two results in one message
    assert f"\n{made}<|im_end|>" in text_of(templated(OLD), talk(made), TOOLS)  # which writes no tags
    with pytest.raises(
        HmfError, match=r"messages\[2\].content: begins with <tool_response>, which .* writes before it"
    ):
        encode_chat(tokenizer, talk(f"{made} for Lyon"), TOOLS)
    text = text_of(templated(template), [HI, HELLO, user(f"{made} is a result."), answer("Yes.")])
    assert text.count("<tool_response>") == 1


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_several_templates_need_one_that_is_named_default(templated, tools):
    named = copy.deepcopy(templated(None))
    named.chat_template = {"default": OLD, "tool_use": "TOOLS " + OLD}
    assert encode_chat(named, [HI, HELLO]) == encode_chat(templated(OLD), [HI, HELLO])
    assert text_of(named, [HI, HELLO], TOOLS).startswith("TOOLS{")
    named.chat_template = {"chat": OLD, "rag": OLD}
    with pytest.raises(HmfError, match="several chat templates \\('chat', 'rag'\\), none of them named 'default'"):
        encode_chat(named, [HI, HELLO], tools)


CALLS = answer("", tool_calls=[call("Lyon", "a"), call("Nice", "b")])
REFUSED = {
    "calls as text": ([HI, answer("", tool_calls=[json.dumps(call())])], r"tool_calls\[0\]: an object .* not text"),
    "no calls in JSON": (
        [HI, answer("x", tool_calls="f(x)")],
        r"\.tool_calls: is text but not .*; write a list of calls",
    ),
    "parts as text": (
        [user(json.dumps([{"type": "text", "text": "x"}])), HELLO],
        r"messages\[0\].content: is text that holds parts as JSON",
    ),
    "tools in a message": (
        [{"role": "system", "content": "x", "tools": []} | {"tools": [1]}, HI, HELLO],
        "beside the mess",
    ),
    "older calls": ([HI, answer("x", function_call={"name": "f"})], r"messages\[1\].function_call: .*write tool_calls"),
    "unknown key": ([user("x", contentt="y"), HELLO], r"messages\[0\].contentt: unknown key .* did you mean 'content'"),
    "refusal": ([HI, answer("x", refusal="no")], r"messages\[1\].refusal: unknown key.*ignore_keys"),
    "several": ([user("x", id=1, lang="en", loss=1), HELLO], r".id: unknown .*\(or add to ignore_keys: id, lang\)"),
    "audio": ([HI, answer("x", audio={"id": "1"})], r"messages\[1\].audio: unknown key"),
    "training flag": ([HI, answer("x", train=False)], r"messages\[1\].train: unknown key"),
    "half a weight": ([HI, answer("x", weight=0.5)], r"messages\[1\].weight: is 0.5"),
    "weight of a user": ([user("x", weight=1), HELLO], r"messages\[0\].weight: is 1 for role 'user'"),
    "image": (
        [user([{"type": "image_url", "image_url": {"url": "x"}}]), HELLO],
        r"messages\[0\].content\[0\]: .*image_url",
    ),
    "cached part": ([user([{"type": "text", "text": "x", "cache_control": {"type": "e"}}]), HELLO], "cache_control"),
    "tool_use": ([HI, answer([{"type": "tool_use", "name": "f", "input": {}}])], r"\[1\].content\[0\]: .*'tool_use'"),
    "thinking": ([HI, answer([{"type": "thinking", "thinking": "x"}])], r"\[1\].content\[0\]: .*'thinking'"),
    "object": ([user({"text": "x"}), HELLO], r"messages\[0\].content: an object is not text"),
    "number": ([user(5), HELLO], r"messages\[0\].content: a number is not text"),
    "strings": ([user(["x", "y"]), HELLO], r"messages\[0\].content: a list is not text"),
    "nothing": ([user(None), HELLO], r"messages\[0\].content: .*needs content"),
    "mask": ([HI, answer("x", mask=[1])], r"messages\[1\].mask: unknown key; write weight, 0"),
    "another's role": ([HI, {"role": "model", "content": "x"}], "role is assistant, not 'model'"),
    "half a thought": ([HI, answer("x</think>y")], "write thinking into reasoning_content without tags, or use"),
    "no result": ([HI, CALLS, result([], "a"), HELLO], r"messages\[2\].content: an empty list"),
    "no object": (
        [HI, answer("", tool_calls=[call(arguments="[1]")])],
        r"function.arguments: an object is expected, not a l",
    ),
    "no JSON": (
        [HI, answer("", tool_calls=[call(arguments="{'a': 1}")])],
        r"tool_calls\[0\].function.arguments: .*not valid",
    ),
    "twice": ([HI, answer("", tool_calls=[call(arguments='{"a": 1, "a": 2}')])], "the key .a. occurs twice"),
    "deep": ([HI, answer("", tool_calls=[call(arguments='{"a": ' * 900 + "1" + "}" * 900)])], "nested too deeply"),
    "not finite": ([HI, answer("", tool_calls=[call(arguments='{"a": NaN}')])], "nan is not a valid JSON number"),
    "custom call": (
        [HI, answer("", tool_calls=[{"type": "custom", "custom": {}}])],
        r"tool_calls\[0\].type: is 'custom'",
    ),
    "no name": (
        [HI, answer("", tool_calls=[{"function": {"arguments": {}}}])],
        r"function.name: the call needs the name",
    ),
    "a user calls": ([user("x", tool_calls=[call()]), HELLO], r"messages\[0\].tool_calls: only the assistant"),
    "a user thinks": ([user("x", reasoning="y"), HELLO], r"messages\[0\].reasoning: only the assistant"),
    "other thoughts": (
        [HI, answer("x", reasoning="a", thinking="b")],
        r"messages\[1\].thinking: differs from reasoning",
    ),
    "two thoughts": ([HI, answer("<think>a</think>x", reasoning="b")], r"messages\[1\].content: starts with thinking"),
    "no call": ([HI, CALLS, result("x", "c"), HELLO], r"messages\[2\].tool_call_id: 'c' is the id of no call"),
    "no calls": ([HI, HELLO, result("x", "c"), HELLO], r"messages\[2\].tool_call_id: 'c' is the id of no call"),
    "only the second": ([HI, CALLS, result("x", "b"), HELLO], r"messages\[1\].tool_calls\[0\]: has no result"),
    "two results": ([HI, CALLS, result("x", "a"), result("y", "a"), HELLO], r"tool_calls\[0\]: has two results"),
    "too many": (
        [HI, CALLS, result("x"), result("y"), result("z"), HELLO],
        r"messages\[4\]: the turn before it has fewer calls",
    ),
    "another's": (
        [HI, CALLS, result("x", "a", name="time"), HELLO],
        r"messages\[2\].name: is 'time', but .* 'weather'",
    ),
    "a user's id": ([user("x", tool_call_id="a"), HELLO], r"messages\[0\].tool_call_id: belongs to a tool's result"),
    "role": (
        [{"role": "User", "content": "x"}, HELLO],
        r"messages\[0\].role: unknown role 'User'; did you mean 'user'",
    ),
    "half a pair": ([user("x \ud83d"), HELLO], r"messages\[0\].content: a lone surrogate \(\\ud83d\)"),
    "half in arguments": (
        [HI, answer("", tool_calls=[call(arguments='{"a": "\\udc00"}')])],
        r"messages\[1\].tool_calls\[0\].function.arguments.a: a lone surrogate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_here_is_refused(templated, name):
    messages, expected = REFUSED[name]
    with pytest.raises(HmfError, match=expected) as caught:
        encode_chat(templated(None), messages)
    assert "\n" not in str(caught.value)


LOST = {
    "human": (
        None,
        [{"role": "human", "content": "a"}, HELLO],
        r"messages\[0\]: .*content out .*'human'.*such as system",
    ),
    "ipython": (None, [HI, CALLS, {"role": "ipython", "content": "e"}, HELLO], r"messages\[2\]: .*'ipython'"),
    "name": (None, [user("x", name="e"), HELLO], r"messages\[0\]: .*its name out.*ignore_keys"),
    "of a result": (None, [HI, answer("f()"), result("x", name="f()"), HELLO], r"messages\[2\]: .*its name out"),
    "tool": (INST, [HI, HELLO, result("e"), HELLO], r"messages\[2\]: .*its content out .*'tool'"),
    "second call": (ONE_CALL, [HI, CALLS], r"messages\[1\]: .*its tool calls out \(tool_calls\[1\].function.name"),
    "by content": (DROPS_ZERO, [user("x # and more"), HELLO], r"messages\[0\]: .*its content out"),
    "twice": (TWICE, [HI, HELLO], r"messages\[1\].content: the chat template writes it more than once"),
    "order": (
        REVERSED,
        [HI, HELLO, user("So?"), answer("So.")],
        r"the chat template writes it after|separated from its pr",
    ),
    "alternate": ("gemma", [HI, HI, HELLO], "the chat template fails: Conversation roles must alternate"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_the_template_leaves_out_is_named(templated, name):
    template, messages, expected = LOST[name]
    with pytest.raises(HmfError, match=expected):
        encode_chat(templated(template), messages)


WITH_VARIABLES = "{{ note }}{% if effort == 'high' %}!{% endif %}{{ notes | tojson if notes }}" + OLD


def test_variables_of_the_template(templated):
    def text(variables, template=WITH_VARIABLES, **options):
        return text_of(templated(template), [HI, HELLO], chat_template_kwargs=variables, **options)

    assert text({}) == text(None) == text_of(templated(OLD), [HI, HELLO])
    for split in (False, True):
        note = {"note": "Be kind <|im_end|>.", "effort": "high", "notes": [{"a": 'In "French".'}]}
        written = text(note, split_special_tokens=split)
        assert written.startswith('Be kind <|im_end|>.![{"a": "In \\"French\\"."}]<|im_start|>user')
    assert not text({"effort": "low"}).startswith("!")
    for template in (None, "qwen3"):
        assert "</think>\n\n|Hello." in text({"enable_thinking": False}, template)
        assert "|<think>\n\n</think>\n\nHello." in text({"enable_thinking": True}, template)
        assert "</think>\n\n|Hello." in text({"enable_thinking": True}, template, thinking="strip")
    first, second = encode_answers(
        templated("qwen3"), [HI], [HELLO, answer("Yes.")], chat_template_kwargs={"enable_thinking": True}
    )
    assert first.prompt == second.prompt and templated("qwen3").decode(first.prompt).endswith("assistant\n")
    for variables, template, message in [
        ({"tone": "kind"}, WITH_VARIABLES, r"^chat_template_kwargs.tone: the chat template does not read it"),
        ({"enable_thinking": False}, OLD, r"^chat_template_kwargs.enable_thinking: the chat template does not read it"),
        ({"enable_thinking": "no"}, "qwen3", "is 'no'; write true or false"),
        ({"messages": []}, OLD, "messages: is not a variable to set"),
        ({"note": "Be kind."}, "{%- set note = '' %}" + WITH_VARIABLES, "the chat template leaves 'Be kind.' out"),
    ]:
        with pytest.raises(HmfError, match=message):
            text(variables, template)


def test_keys_can_be_ignored_and_empty_ones_are_absent(templated):
    blank = [HI, answer("Hello.", reasoning_content=" \n", thinking="")]
    assert encode_chat(templated("qwen3"), blank) == encode_chat(templated("qwen3"), [HI, HELLO])
    empty = {"name": None, "refusal": None, "tool_calls": [], "annotations": [], "audio": {}, "prefix": ""}
    wanted = encode_chat(templated(None), [HI, HELLO])
    assert encode_chat(templated(None), [HI, HELLO | empty]) == wanted
    assert encode_chat(templated(None), [HI | {"id": 5}, HELLO], ignore_keys=["id"]) == wanted
    with pytest.raises(HmfError, match=r"messages\[0\].id: unknown key"):
        encode_chat(templated(None), [HI | {"id": 5}, HELLO], ignore_keys=["timestamp"])


class Words:
    """Words that occur nowhere else, and where they stand."""

    def __init__(self):
        self.made = []

    def __call__(self):
        self.made.append(f"qx{len(self.made)}vz")
        return self.made[-1]


@st.composite
def conversations(draw):
    """Messages of every kind that users have, each text a word of its own."""
    word, talk = Words(), []
    value = st.sampled_from(["text", "none", "number", "text part", "two parts", "image", "block", "object", "strings"])

    def content(kind):
        return {
            "text": lambda: word(),
            "none": lambda: None,
            "number": lambda: 7,
            "object": lambda: {"a": word()},
            "text part": lambda: [{"type": "text", "text": word()}],
            "strings": lambda: [word()],
            "two parts": lambda: [{"type": "text", "text": word()}, {"type": "text", "text": word()}],
            "image": lambda: [{"type": "image", "image": word()}],
            "block": lambda: [{"type": "thinking", "thinking": word()}],
        }[kind]()

    for _ in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(["user", "user", "system", "developer", "tool", "human", "function", "ipython"]))
        talk.append({"role": role, "content": content(draw(value) if draw(st.integers(0, 2)) == 0 else "text")})
        if draw(st.booleans()):
            talk.append(answer(word()))
            if draw(st.integers(0, 2)) == 0:
                made = {"name": word(), "arguments": {word(): word(), "n": [word(), {"m": word()}]}}
                if draw(st.booleans()):
                    made["arguments"] = json.dumps(made["arguments"])
                talk[-1]["tool_calls"] = [{"function": made}]
                talk.append({"role": "tool", "content": content(draw(value))})
    talk.append(answer(word()))
    if draw(st.integers(0, 3)) == 0:
        extra = draw(st.sampled_from(["name", "reasoning", "function_call", "refusal", "tool_call_id", "text", "loss"]))
        talk[draw(st.integers(0, len(talk) - 1))][extra] = word()
    return talk, word.made


TEMPLATES = [None, OLD, INST, DROPS_ZERO, PARTS_ONLY, TEXT_ARGUMENTS, NULL_CONTENT, ONE_CALL]
TEMPLATES += ["qwen2_5", "qwen3", "qwen3_training", "llama3", "llama3_1", "gemma3", "gptoss", "phi3", "lfm2_v2"]


def test_a_conversation_is_in_the_text_in_full_or_refused(templated):
    accepted = set()

    @given(talk=conversations(), template=st.sampled_from(TEMPLATES))
    @settings(deadline=None, max_examples=400)
    def check(talk, template):
        messages, words = talk
        tokenizer, before = templated(template), copy.deepcopy(messages)
        try:
            texts = [tokenizer.decode(document.ids) for document in encode_chat(tokenizer, messages)]
        except HmfError:
            return
        text = texts[-1]  # without the thinking of earlier turns, which are documents of their own
        assert not [word for word in words if word not in "".join(texts)]
        order = [
            text.index(word)
            for message in messages
            if message["role"] not in ("system", "developer")
            for word in words
            if word in str(message["content"])
        ]
        assert order == sorted(order)
        assert messages == before  # the caller's are left as they are
        accepted.add((template, *(message["role"] for message in messages)))

    check()
    assert len(accepted) > 30


@given(talk=conversations())
@settings(deadline=None)
def test_what_is_normal_stays(talk):
    try:
        found = normalise(talk[0], TOOLS)
    except HmfError:
        assume(False)
    assert normalise(*found) == found


@pytest.mark.parametrize("arguments", [[], "[]"])
def test_a_list_of_arguments_is_refused(arguments):
    """As PHP writes an empty object."""
    for made in (call(arguments=arguments), call(arguments=arguments)["function"]):
        with pytest.raises(HmfError, match=r"arguments: an object is expected, not a list"):
            normalise([HI, answer("", tool_calls=[made])], None)
