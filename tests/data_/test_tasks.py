# SPDX-License-Identifier: Apache-2.0
import copy
import json
import re
from pathlib import Path

import pytest

from hmf.data import phrases, tasks
from hmf.data.encoding import encode_chat
from hmf.data.tokenizer import encode_texts
from hmf.errors import HmfError
from hmf.evaluation.run import evaluate_model

SEEDS = range(12)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("thinking", [True, False])
def test_every_sample_is_whole(tokenizer, task, thinking):
    for seed in SEEDS:
        sample = tasks.sample(task, seed, tokenizer, 512, thinking=thinking)
        assert sample == tasks.sample(task, seed, tokenizer, 512, thinking=thinking)
        prompt, text = sample.prompt(tokenizer), sample.text(tokenizer)
        assert text.startswith(prompt)
        turn = text[len(prompt) :].removesuffix("<|im_end|>\n")
        assert turn.startswith("<think>") == thinking
        assert sample.is_correct(turn)
        assert not sample.is_correct(turn + "x") and not sample.is_correct("")
        assert sample.is_correct("[THINK]" + turn.replace("<think>", "").replace("</think>", "[/THINK]")) == thinking
        assert len(encode_texts(tokenizer, [text])[0]) <= 512


@pytest.mark.parametrize("task", ["recall", "needle"])
@pytest.mark.parametrize("length", [128, 512, 1024])
def test_contexts_fill_the_length_and_hold_the_answer(tokenizer, task, length):
    lengths = []
    for seed in SEEDS:
        sample = tasks.sample(task, seed, tokenizer, length, split="heldout")
        lengths.append(len(encode_texts(tokenizer, [sample.text(tokenizer)])[0]))
        context, question = sample.messages[0]["content"].rsplit("\n\n", 1)
        assert sample.answer in context and sample.answer not in question
    assert max(lengths) <= length
    assert sum(lengths) / len(lengths) > 0.9 * length - 40


def test_a_key_is_asked_that_is_in_the_list_once(tokenizer):
    for seed in SEEDS:
        sample = tasks.sample("recall", seed, tokenizer, 512, thinking=True)
        line = sample.messages[-1]["reasoning_content"]
        assert sample.messages[0]["content"].split("\n").count(line) == 1
    # With this seed two of the random words are the same.
    context = tasks.sample("needle_many", 33, tokenizer, 16384).messages[0]["content"]
    names = re.findall(r"^The favourite word of (\w+) is \w+\.$", context, re.MULTILINE)
    assert len({*names}) == len(names) == 158


@pytest.mark.parametrize("task", ["recall", "needle", "arithmetic", "tool_call"])
def test_training_and_evaluation_share_nothing(tokenizer, task):
    def asked(split):
        found = set()
        for seed in range(60):
            sample = tasks.sample(task, seed, tokenizer, 128, split=split, thinking=True)
            # For a sum the problem itself; elsewhere the line or call with key and value.
            found.add(sample.messages[-1]["reasoning_content"].split("\n")[-1])
        return found

    assert len(asked("train")) > 50
    assert not asked("train") & asked("heldout")


def test_arithmetic_is_right(tokenizer):
    for seed in range(100):
        sample = tasks.sample("arithmetic", seed, tokenizer, 128, thinking=True)
        *steps, last = sample.messages[-1]["reasoning_content"].split("\n")
        problem, result = last.split(" = ")
        assert eval(problem) == int(result) == int(sample.answer)
        for step in steps:
            if " = " in step:
                left, right = step.split(",")[0].split(" = ")
                assert eval(left) == int(right)
        digits = [step.split("write ")[1].split(",")[0] for step in steps if "write" in step]
        if digits:
            assert int("".join(reversed(digits))) == int(result)


def test_a_call_fits_its_tool(tokenizer):
    for seed in range(40):
        sample = tasks.sample("tool_call", seed, tokenizer, 512)
        call = json.loads(sample.answer)
        schema = next(t["function"] for t in sample.tools if t["function"]["name"] == call["name"])["parameters"]
        assert list(call["arguments"]) == schema["required"]
        for name, value in call["arguments"].items():
            assert isinstance(value, {"string": str, "integer": int}[schema["properties"][name]["type"]])
            assert str(value) in sample.messages[-2]["content"]


def test_calls_are_compared_as_json(tokenizer):
    sample = tasks.sample("tool_call", 3, tokenizer, 512, thinking=False)
    call = json.loads(sample.answer)
    assert sample.is_correct(f"<tool_call>\n{json.dumps(call, indent=1)}\n</tool_call>")
    assert not sample.is_correct(json.dumps(call))
    assert not sample.is_correct("<tool_call>\n{not json}\n</tool_call>")
    assert not sample.is_correct(f"<tool_call>{json.dumps({**call, 'name': 'other'})}</tool_call>")


@pytest.mark.parametrize("template", ["qwen3_5_think", "qwen3_8", "qwen3", "nemotron_3_nano"])
def test_a_call_in_the_form_of_the_models_template_is_right(tokenizer, template):
    """Qwen3.5's templates write calls as XML, and so its models answer."""
    trl = pytest.importorskip("trl", reason="needs trl's chat templates")
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    for seed in SEEDS:
        sample = tasks.sample("tool_call", seed, templated, 512, thinking=True)
        turn = sample.text(templated)[len(sample.prompt(templated)) :].removesuffix("<|im_end|>\n")
        assert sample.is_correct(turn)
        for value in json.loads(sample.answer)["arguments"].values():
            assert not sample.is_correct(turn.split("</think>")[-1].replace(str(value), "x"))


CALL_FORMS = {  # what a chat template writes for the calls of a turn: as OLMo 3, Mistral and Ministral 3
    "python": "<calls>{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ k }}={{ v | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}){% endfor %}</calls>",
    "list": '[CALLS][{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}, "id": {{ c.id | tojson }}}'
    "{% endfor %}]",
    "marks": "{% for c in m.tool_calls %}[CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}",
}


@pytest.mark.parametrize("form", CALL_FORMS)
def test_a_call_in_a_form_of_any_template_is_right_for_its_tokenizer(tokenizer, form):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content or '' }}"
        f"{{% if m.tool_calls %}}{CALL_FORMS[form]}{{% endif %}}<|im_end|>{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    tasks.require_template(tasks.TASKS, templated)
    for seed in SEEDS:
        sample = tasks.sample("tool_call", seed, templated, 512, thinking=False)
        call = json.loads(sample.answer)
        turned = {"name": call["name"], "arguments": dict(reversed(call["arguments"].items()))}
        words = [tasks.written_call(one, sample.messages[:-1], sample.tools, templated) for one in (call, turned)]
        words.append(words[0].replace("a1b2c3d4e", "ZZZZZZZZZ").replace(": ", " :\n") + "<|im_end|>")
        assert all(sample.is_correct(text, templated) for text in words)
        assert not any(sample.is_correct(text, tokenizer) for text in words)
        for value in call["arguments"].values():
            assert not sample.is_correct(words[0].replace(str(value), "x"), templated)
        assert not any(sample.is_correct(text, templated) for text in ("", "<|im_end|>", words[0] * 2, words[0][:-1]))


NINE = "{% if ID | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"  # as Mistral's
WITH_RESULTS = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    f"{NINE.replace('ID', 'c.id')}{{{{ c.function | tojson }}}}{{% endfor %}}"
    f"{{% if m.role == 'tool' %}}{NINE.replace('ID', 'm.tool_call_id')}{{% endif %}}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def test_tasks_with_tools_have_ids_for_templates_that_need_them(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = WITH_RESULTS
    tasks.require_template(["tool_call", "tool_answer"], other)
    for task in ("tool_call", "tool_answer"):
        sample = tasks.sample(task, 1, other, 512, thinking=False)
        assert sample.text(other).startswith(sample.prompt(other))
        assert encode_chat(other, sample.messages, sample.tools, turns="last")


def test_a_template_without_results_is_refused_for_answers_from_them(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = WITH_RESULTS.replace(
        "<|im_start|>{{ m.content }}", "<|im_start|>{{ m.content if m.role != 'tool' }}"
    )
    tasks.require_template(["tool_call"], other)
    with pytest.raises(HmfError, match="tasks: tool_answer: .* leaves its content out .*of role .tool"):
        tasks.require_template(["tool_answer"], other)


def test_blanks_inside_texts_are_not_layout(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.content }}{% if m.tool_calls %}"
        f"{CALL_FORMS['python']}{{% endif %}}<|im_end|>{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>"
        "{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}]
    call, prompt = {"name": "f", "arguments": {"a": "x, y"}}, [{"role": "user", "content": "Call."}]
    for text, right in (('f( a = "x, y" )', True), ('f(a="x,y")', False), ('f(a=" x, y")', False)):
        given = f"<calls>{text}</calls>"
        assert tasks.is_written_call(given, call, prompt, tools, other) is right


def test_a_template_without_calls_is_refused_for_tasks_with_tools(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    tasks.require_template(["recall", "chat"], other)
    with pytest.raises(HmfError, match="tasks: tool_call: the chat template leaves tools out .* or leave the task out"):
        evaluate_model(None, other, ["recall", "tool_call"])


def test_values_of_calls_in_xml_have_the_types_of_the_schema():
    kinds = {"s": "string", "n": "integer", "on": "boolean", "list": "array"}
    properties = {name: {"type": kind} for name, kind in kinds.items()}
    tools = [{"function": {"name": "f", "parameters": {"properties": properties}}}]
    values = {"s": "12", "n": "12", "on": "True", "list": '["a"]'}
    lines = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    found = tasks.parse_call(f"\n<function=f>\n{lines}</function>\n", tools)
    assert found == {"name": "f", "arguments": {"s": "12", "n": 12, "on": True, "list": ["a"]}}
    assert tasks.parse_call("<function=f>\n</function>", tools) == {"name": "f", "arguments": {}}
    for wrong in ("<function=f><parameter=n>\ntwelve\n</parameter></function>", f"<function=f>{lines}", f"x {lines}"):
        with pytest.raises(ValueError):
            tasks.parse_call(wrong, tools)


def test_words_are_many():
    from random import Random

    rng = Random(0)
    assert len({phrases.word(rng) for _ in range(1000)}) > 900


@pytest.mark.parametrize(("task", "length", "named"), [("recal", 512, "recall"), ("recall", 40, "96")])
def test_bad_requests(tokenizer, task, length, named):
    with pytest.raises(HmfError, match=named):
        tasks.sample(task, 0, tokenizer, length)
