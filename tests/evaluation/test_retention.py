# SPDX-License-Identifier: Apache-2.0
"""The retention tasks: prompts of the length that was asked for, and rules that take right answers and no others."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf.errors import HmfError
from hmf.evaluation.prompts import Answer, Prompter
from hmf.evaluation.retention import TASKS

CONTEXT = 1 << 30


def prompter(tokenizer, seed=0, thinking=True, allowance=64, context=CONTEXT):
    return Prompter(tokenizer, seed, thinking, allowance, context, "the model has")


def prompt(tokenizer, name, index=0, length=1024, **options):
    task = TASKS[name]
    *_, last = prompter(tokenizer, **options).prompts(task, length if task.long else None, index + 1)
    return last


def judged(prompt, text, truncated=False):
    return prompt.is_correct(Answer(text, truncated, 1))


@pytest.fixture(scope="module", params=["chat template", "plain"])
def either(request, tokenizer):
    if request.param == "chat template":
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1024, 5000])
def test_a_prompt_and_its_longest_answer_fill_the_length(either, name, length):
    made = prompt(either, name, 1, length)
    assert made.ids == either(made.text, add_special_tokens=False)["input_ids"]
    assert made.limit == 64 + len(either(made.problem.answer, add_special_tokens=False)["input_ids"])
    if TASKS[name].long:
        assert length - 100 < len(made.ids) + made.limit <= length
        assert all(fact in made.text for fact in made.problem.facts)
    assert judged(made, made.problem.answer)
    for tool in made.problem.tools or ():
        assert tool["function"]["name"] in made.text


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 11), st.sampled_from(sorted(TASKS)))
def test_a_task_is_a_function_of_the_seed_and_takes_its_own_answer_alone(tokenizer, seed, index, name):
    made = prompt(tokenizer, name, index, seed=seed, length=700)
    assert made.sha256 == prompt(tokenizer, name, index, seed=seed, length=700).sha256
    assert made.sha256 != prompt(tokenizer, name, index, seed=seed + 1, length=700).sha256
    answer = made.problem.answer
    assert judged(made, f"<think>\nLet me see.\n</think>\n\n{answer}\n")
    assert not judged(made, answer, truncated=True)
    assert not judged(made, f"<think>\n{answer}")  # reasoning that does not end
    assert judged(made, f"[THINK]Let me see.[/THINK]{answer}") and not judged(made, f"[THINK]{answer}")  # Ministral's
    for wrong in ("", f"{answer} and more", answer[:-1], answer[1:], f"The answer is {answer}"):
        assert not judged(made, wrong) or name == "instructions"


def test_a_long_context_takes_few_encodings(tokenizer):
    made = prompt(tokenizer, "needle_multi_key", length=128 * 1024)
    assert 128 * 1024 - 100 < len(made.ids) + made.limit <= 128 * 1024


def test_thinking_is_what_was_asked_for_and_always_on_in_arithmetic(tokenizer):
    empty = "<think>\n\n</think>\n\n"
    assert not prompt(tokenizer, "needle_single").text.endswith(empty)
    direct = prompt(tokenizer, "needle_single", thinking=False)
    assert direct.text.endswith(empty) and direct.direct == direct.text
    assert not prompt(tokenizer, "arithmetic", thinking=False).text.endswith(empty)
    assert prompt(tokenizer, "arithmetic").direct.endswith(empty)


def test_a_template_without_tools_gets_them_in_the_message(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    made = prompt(other, "tool_schema")
    assert made.tools is None and all(tool["function"]["name"] in made.text for tool in made.problem.tools)


def test_a_call_is_expected_as_the_template_writes_it(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }},{% endfor %})"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    made, hermes = prompt(other, "tool_schema"), prompt(tokenizer, "tool_schema").problem
    name, arguments = hermes.call["name"], hermes.call["arguments"]
    written = f"{name}({''.join(f'{key}={json.dumps(value)},' for key, value in arguments.items())})"
    assert made.problem.answer == written and made.answer_ids == other(written)["input_ids"]
    assert judged(made, written) and judged(made, hermes.answer) and not judged(made, written.replace("(", "(x=1,"))
    assert hermes.answer == f"<tool_call>\n{json.dumps(hermes.call)}\n</tool_call>"


@pytest.mark.parametrize("index", range(8))
def test_arithmetic_is_what_python_computes(tokenizer, index):
    made = prompt(tokenizer, "arithmetic", index)
    expression = made.problem.question.removeprefix("What is ").partition("?")[0]
    assert str(eval(expression)) == made.problem.answer and expression.count(" ") == 2 * (1 + index % 4)


def test_variables_are_those_that_lead_to_the_value(tokenizer):
    problem = prompt(tokenizer, "variable_tracking").problem
    values: dict[str, str] = {}
    for fact in problem.facts:
        _, name, _, value = fact.split(maxsplit=3)
        values[name] = values.get(value.removeprefix("VAR "), value)
    wanted = problem.question.split("value ")[1].split(",")[0]
    assert sorted(problem.answer.split(", ")) == sorted(name for name, value in values.items() if value == wanted)
    assert len(set(values.values())) == 2


def test_rules(tokenizer):
    single = prompt(tokenizer, "needle_single")
    number = single.problem.answer
    assert all(judged(single, text) for text in (f"{number}.", f"**{number}**", f"`{number}`", f' "{number}" '))
    several = prompt(tokenizer, "needle_multi_value")
    numbers = several.problem.answer.split(", ")
    assert judged(several, "\n".join(reversed(numbers)))
    assert not judged(several, ", ".join(numbers[:3])) and not judged(several, ", ".join([*numbers, numbers[0]]))
    recall = prompt(tokenizer, "multi_query_recall")
    assert not judged(recall, "\n".join(reversed(recall.problem.answer.split("\n"))))
    passage = prompt(tokenizer, "long_copy")
    lines = passage.problem.answer.split("\n")
    assert judged(passage, "```python\n" + "\n".join(f"{line}  " for line in lines) + "\n```")
    assert not judged(passage, "\n".join(lines[:-1])) and not judged(passage, "\n".join([*lines, "x"]))


def test_the_rule_of_tools_knows_types_and_takes_one_call(tokenizer):
    made = next(
        one for one in prompter(tokenizer).prompts(TASKS["tool_schema"], None, 50) if "true" in one.problem.answer
    )
    body = made.problem.answer.removeprefix("<tool_call>").removesuffix("</tool_call>")
    assert judged(made, body) and judged(made, f"```json\n{body.strip()}\n```")
    assert judged(made, body.replace('"arguments"', '"parameters"'))
    call = json.loads(body)
    for start, end in (("[TOOL_CALLS]", ""), ("", ""), ("<|tool_call|>", "<|/tool_call|>")):  # Mistral, Granite, Phi-4
        assert judged(made, f"{start}{json.dumps([call | {'id': 'abcdef123'}])}{end}")
        assert not judged(made, f"{start}{json.dumps([call, call])}{end}") and not judged(made, f"{start}[]{end}")
    assert judged(made, f"<|python_tag|>{body.replace('arguments', 'parameters')}")  # Llama
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in call["arguments"].items()}
    lines = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in texts.items())
    written = f"<tool_call>\n<function={call['name']}>\n{lines}</function>\n</tool_call>"  # as Qwen3.5 does
    assert judged(made, written) and not judged(made, written.replace("true", "1"))
    assert not judged(made, made.problem.answer.replace("true", "1"))
    assert not judged(made, made.problem.answer * 2) and not judged(made, f"I call it. {made.problem.answer}")
    assert not judged(made, made.problem.answer.replace("</tool_call>", ""))


def test_lengths_that_do_not_fit_are_refused_by_name(tokenizer):
    with pytest.raises(HmfError, match=r"--lengths: 4,096 tokens exceed the 2,048 that the model has"):
        prompter(tokenizer, context=2048).require([1024, 4096])
    with pytest.raises(HmfError, match=r"--lengths: 128 is too small for the prompt of needle_multi_key"):
        prompt(tokenizer, "needle_multi_key", length=128)
    with pytest.raises(HmfError, match=r"arithmetic: a prompt of .* exceed the 80 that .* lower --max-new-tokens"):
        prompt(tokenizer, "arithmetic", context=80)
