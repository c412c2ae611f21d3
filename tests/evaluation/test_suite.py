# SPDX-License-Identifier: Apache-2.0
"""`hmf evaluate --suite`: files of results, resume, models in pairs, and what the card shows of them."""

import json
import os
import shutil
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hmf.config.strict import parse_sealed
from hmf.evaluation.local import Local
from hmf.evaluation.paired import compare, mcnemar
from hmf.evaluation.results import Answered, read_answers, summary, wilson
from hmf.report.card import write_card
from hmf.report.evidence import Evidence

TASKS = "needle_single,arithmetic,perplexity"


@pytest.fixture
def asked(monkeypatch):
    """Indexes of the prompts that models were given to answer."""
    given = []
    answers = Local.answers

    def counted(self, prompts):
        for found in answers(self, prompts):
            given.append(found[0].index)
            yield found

    monkeypatch.setattr(Local, "answers", counted)
    return given


def test_files_of_a_run_folder(run, tiny, evaluated):
    printed = evaluated(run / "model", tiny / "base", "--tasks", TASKS, "--lengths", "512,1K")
    assert list(printed) == [str(run / "model"), str(tiny / "base")]
    for name in ("primed", "teacher"):
        scores = parse_sealed((run / f"scores.{name}-retention.json").read_text())
        keys = ["needle_single@512", "needle_single@1024", "arithmetic"]
        assert scores["suite"] == "retention" and list(scores["tasks"]) == keys
        assert scores["settings"]["seed"] == 0 and scores["settings"]["dtype"] == "float32"
        assert scores["settings"]["sampling"] == {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8}
        assert set(scores["versions"]) == {"hmf", "torch", "transformers", "python"}
        assert [place["end"] for place in scores["positions"]] == [256, 512, 1024]
        for key in keys:
            lines = (run / f"evaluation/{name}-retention/{key}.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            assert sorted(line["index"] for line in found) == [0, 1, 2]
            task = scores["tasks"][key]
            assert task["n"] == 3 and task["accuracy"] == sum(line["correct"] for line in found) / 3
            assert task["truncated"] == sum(line["truncated"] for line in found) / 3
            assert task["interval"] == pytest.approx(wilson(task["accuracy"], 3))
            assert task["likelihood"] == pytest.approx(sum(line["likelihood"] for line in found) / 3)
    found = Evidence.of(run).scores["primed-retention"]
    assert (found.tasks["needle_single@512"].task, found.tasks["needle_single@512"].length) == ("needle_single", 512)
    paired = printed[str(tiny / "base")]["paired"]
    assert paired["with"] == str(run / "model") and paired["tasks"]["arithmetic"]["n"] == 3
    card = write_card(run).read_text()
    assert "### Suite: retention" in card and "This model minus another model on the same prompts" in card
    line = next(line for line in card.splitlines() if line.startswith("| needle_single 1K"))
    assert line.count("(../scores.") == 2 and line.count("n = 3") == 2 and line.count("cut off") == 2
    assert "seed 0" in card and "| 512–1,023 |" in card and "needle_single@" not in card


def test_a_stopped_evaluation_goes_on_with_what_is_not_answered(run, evaluated, hmf, asked):
    arguments = (run / "model", "--tasks", "needle_single", "--lengths", "512")
    whole = evaluated(*arguments)
    assert sorted(asked) == [0, 1, 2]
    file = run / "evaluation/primed-retention/needle_single@512.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:40])  # stopped in the middle of a line
    asked.clear()
    assert evaluated(*arguments) == whole
    assert len(asked) == 2 and sorted(file.read_text().splitlines()) == sorted(map(str.strip, lines))
    asked.clear()
    more = evaluated(*arguments, "--samples", 4)[str(run / "model")]
    assert asked == [3] and more["tasks"]["needle_single@512"]["n"] == 4
    # Further tasks come beside those that are there.
    both = evaluated(run / "model", "--tasks", "arithmetic")[str(run / "model")]
    assert set(both["tasks"]) == {"needle_single@512", "arithmetic"}


def test_a_changed_setting_is_refused_and_restart_begins_anew(run, evaluated, hmf, asked):
    arguments = (run / "model", "--tasks", "arithmetic")
    evaluated(*arguments)
    asked.clear()
    evaluated(*arguments, "--batch-size", 2)  # what may change
    assert asked == []
    changed = ("evaluate", *arguments, "--suite", "retention", "--samples", 3, "--max-new-tokens", 8, "--seed", 1)
    code, _, err = hmf(*changed)
    assert code == 2 and "seed was 0, is now 1" in err and "--restart" in err and err.count("\n") == 1
    assert evaluated(*arguments, "--seed", 1, "--restart")[str(run / "model")]["settings"]["seed"] == 1
    assert sorted(asked) == [0, 1, 2]


def test_a_refused_evaluation_leaves_nothing(run, evaluated, hmf):
    """A length that is too small is found at the first prompt; its fix, fewer tokens of an answer, then works."""
    arguments = ("--suite", "retention", "--tasks", "needle_single", "--lengths", "512")
    code, _, err = hmf("evaluate", run / "model", *arguments)
    assert code == 2 and "--lengths: 512 is too small" in err and "lower --max-new-tokens" in err
    assert not (run / "evaluation/primed-retention").exists()
    evaluated(run / "model", *arguments[2:])


def test_a_damaged_line_is_named(run, evaluated, hmf):
    arguments = (run / "model", "--tasks", "arithmetic")
    evaluated(*arguments)
    file = run / "evaluation/primed-retention/arithmetic.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for line, said in (("{}\n", "index"), ("[\n", "line 1"), ("\n", "line 1")):
        file.write_text(line + lines[0])
        code, _, err = hmf("evaluate", *arguments, "--suite", "retention", "--samples", 3, "--max-new-tokens", 8)
        assert code == 2 and f"{file}: line 1" in err and said in err and err.count("\n") == 1


def test_the_table_counts_cut_off_answers_by_themselves(tiny, hmf):
    code, out, err = hmf(
        "evaluate",
        tiny / "hybrid",
        tiny / "base",
        "--suite",
        "retention",
        "--tasks",
        TASKS,
        "--samples",
        2,
        "--lengths",
        "512",
        "--max-new-tokens",
        4,
    )
    assert code == 0 and "saved" not in err
    head = next(line for line in out.splitlines() if "cut off" in line)
    cells = [cell.strip() for cell in head.replace("┃", "│").split("│")]
    assert cells[4:8] == ["n", "correct", "wrong", "cut off"]
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if "│ needle_single 512 " in line]
    rows = [row for row in rows if row[2].startswith(str(tiny))]  # the others compare the two models
    assert len(rows) == 2
    for row in rows:
        assert row[4] == "2" and sum(map(int, row[5:8])) == 2
    assert "log p/token" in out and "256–511" in out and "on the same prompts" in out and "McNemar" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "retent"], "unknown suite 'retent'; did you mean 'retention'?"),
        (["--suite", "retention", "--tasks", "needle"], "unknown task 'needle'; did you mean"),
        (["--suite", "retention", "--tasks", "arithmetic,arithmetic"], "--tasks: arithmetic is named twice"),
        (["--tasks", "recall,arithmetic,recall"], "--tasks: recall is named twice; name each task once"),
        (["--suite", "retention", "--lengths", "4K,128K"], "--lengths: 4,096 tokens exceed the 2,048"),
        (["--suite", "retention", "--lengths", "much"], "'--lengths': 'much' is not a number of tokens"),
        (["--suite", "retention", "--length", "512"], "--length: is not for a suite"),
        (["--lengths", "1K"], "--lengths: is for a suite; add --suite retention"),
        (["--suite", "retention", "--parity"], "--parity: compares a model with a server; give its --url"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tiny, hmf, arguments, said):
    code, _, err = hmf("evaluate", tiny / "base", *arguments)
    assert code == 2 and said in err and err.count("\n") == 1


def test_weights_that_are_not_finite_are_named(tiny, hmf, tmp_path):
    broken = shutil.copytree(tiny / "base", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    suite = ("--suite", "retention", "--samples", 1, "--max-new-tokens", 8, "--tasks")
    for arguments, said in (
        (("--tasks", "", "--text-bytes", 500), f"{broken}: text: the mean loss of a token is nan nats"),
        ((*suite, "arithmetic"), f"{broken}: the log-likelihood of an answer is nan; check the weights"),
        ((*suite, "perplexity", "--lengths", 512), "retention: perplexity@512: the mean loss of a token is nan nats"),
    ):
        code, out, err = hmf("evaluate", broken, *arguments)
        assert code == 2 and said in err.splitlines()[-1] and not out


@pytest.mark.parametrize("arguments", [["--tasks", "recall"], ["--suite", "retention"]])
def test_an_output_that_cannot_be_written_is_found_first(run, hmf, monkeypatch, arguments):
    monkeypatch.setattr("hmf.evaluation.run.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (run / "file").touch()
    code, _, err = hmf("evaluate", run / "model", *arguments, "--out", run / "file/scores")
    assert code == 2 and err == f"hmf: --out: {run / 'file'}: is a file; choose another folder\n"
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, _, err = hmf("evaluate", run / "model", *arguments)
    assert code == 2 and err == f"hmf: --out: {run}: cannot be written to: no permission; choose another folder\n"


def test_the_small_tasks_are_saved_beside_the_suites(run, hmf):
    code, out, err = hmf(
        "evaluate", run / "model", "--tasks", "arithmetic", "--samples", 2, "--text-bytes", 2000, "--max-new-tokens", 4
    )
    assert code == 0 and "perplexity" in out and f"saved {run}/scores.primed-tasks.json" in err
    scores = Evidence.of(run).scores["primed-tasks"]
    assert scores.suite == "tasks" and scores.tasks["arithmetic"].n == 2 and scores.text is not None
    card = write_card(run).read_text()
    assert "(../scores.primed-tasks.json)" in card and "### Suite" not in card


def test_composed_scores_have_files_of_their_own(run, hmf):
    """No evaluation replaces the scores of another kind: neither by default nor where two have the same --name."""
    few = ("--tasks", "arithmetic", "--samples", 1, "--max-new-tokens", 2, "--text-bytes", 0)
    ways = {
        "tasks": (),
        "tasks-concatenated-fused-512": ("--compose", "concatenated,fused", "--compose-chunk", 512),
        "tasks-concatenated-fused-768": ("--compose", "concatenated,fused"),
        "tasks-sliding-dropped-768": ("--compose", "sliding,dropped"),
    }
    written = {}
    for suite, how in ways.items():
        code, _, err = hmf("evaluate", run / "model", *few, *how)
        assert code == 0 and f"saved {run}/scores.primed-{suite}.json" in err
        written[suite] = (run / f"scores.primed-{suite}.json").read_bytes()
    assert all((run / f"scores.primed-{suite}.json").read_bytes() == content for suite, content in written.items())
    found = Evidence.of(run).scores
    assert {name: scores.suite for name, scores in found.items()} == {f"primed-{suite}": suite for suite in ways}
    assert found["primed-tasks-sliding-dropped-768"].compose["keys"] == "sliding"
    card = write_card(run).read_text()
    assert "### Suite: tasks-concatenated-fused-512" in card and card.count("(../scores.primed-tasks.json)") == 1
    (run / "scores.primed-tasks-full-averaged-768.json").write_text("{")
    for name, how, what in (
        ("primed-tasks", ("--compose", "full,averaged"), "scores of tasks"),
        ("primed-tasks-concatenated-fused-512", (), "scores of tasks-concatenated-fused-512"),
        ("primed-tasks-full-averaged-768", (), "other content"),
    ):
        before = (file := run / f"scores.{name}.json").read_bytes()
        code, _, err = hmf("evaluate", run / "model", *few, *how, "--name", name)
        assert code == 2 and f"{file}: has {what}, not" in err and err.count("\n") == 1
        assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["a/b", "../scores", " ", "-x"])
def test_a_name_is_part_of_a_file_name(hmf, run, name):
    code, _, err = hmf("evaluate", run / "model", "--tasks", "", "--text-bytes", "0", f"--name={name}")
    assert code == 2 and f"--name: {name!r} cannot be part of a file name" in err


def answers(values, sha="x"):
    return [
        Answered(index=i, prompt_sha256=sha, expected="", answer="", correct=value, truncated=False, tokens=1)
        for i, value in enumerate(values)
    ]


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_test(first, second):
    n = first + second
    chances = [comb(n, k) / 2**n for k in range(n + 1)]
    tail = sum(chance for k, chance in enumerate(chances) if abs(k - n / 2) >= abs(first - n / 2))
    assert mcnemar(first, second) == pytest.approx(tail) and mcnemar(first, second) == mcnemar(second, first)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_a_pair_is_about_the_same_prompts(values):
    first, second = zip(*values, strict=True)
    pair = compare(answers(first), answers(second))
    assert pair.difference == pytest.approx((sum(first) - sum(second)) / len(values))
    assert -1 <= pair.interval[0] <= pair.difference + 1e-9 and pair.difference - 1e-9 <= pair.interval[1] <= 1
    assert compare(answers(first), answers(second, "y")) is None
    same = compare(answers(first), answers(first))
    assert (same.difference, same.p, same.interval) == (0, 1, (0, 0))


def test_a_pair_of_known_numbers():
    """McNemar's exact p of 2 and 12 discordant prompts, as in a table of the binomial; a bootstrap interval near
    the normal one."""
    pair = compare(answers([True] * 12 + [False] * 2 + [True] * 86), answers([False] * 12 + [True] * 88))
    assert (pair.n, pair.first_only, pair.second_only) == (100, 12, 2)
    assert pair.p == pytest.approx(0.01293945)
    assert pair.interval == (pytest.approx(0.03, abs=0.011), pytest.approx(0.17, abs=0.011))


def test_a_truncated_answer_is_counted_by_itself(tmp_path):
    lines = answers([True, False, False])
    lines[2] = lines[2].model_copy(update={"truncated": True})
    found = summary(lines, "x", 512)
    assert (found["accuracy"], found["truncated"], found["n"]) == (1 / 3, 1 / 3, 3)
    (tmp_path / "x.jsonl").write_text("".join(f"{line.model_dump_json()}\n" for line in reversed(lines)) + "{cut")
    assert read_answers(tmp_path / "x.jsonl") == lines
