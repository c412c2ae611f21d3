# SPDX-License-Identifier: Apache-2.0
"""Results files of lm-eval and NeMo Evaluator become scores; what is wrong with one is said in one line."""

import copy
import json
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf.cli import main
from hmf.config.strict import parse_sealed, seal_json
from hmf.errors import HmfError
from hmf.evaluation import nemo
from hmf.evaluation.harness import read_results, write_scores
from hmf.evaluation.results import Scores, wilson
from hmf.report.evidence import Evidence

LM_EVAL = {  # the keys that are read of a file of lm-eval 0.4.13
    "results": {
        "arc_easy": {
            "name": "arc_easy",
            "alias": "arc_easy",
            "sample_len": 40,
            "acc,none": 0.5,
            "acc_stderr,none": 0.08,
            "acc_norm,none": 0.6,
            "acc_norm_stderr,none": 0.08,
        },
        "gsm8k": {
            "exact_match,strict-match": 0.2,
            "exact_match_stderr,strict-match": 0.1,
            "exact_match,flexible-extract": 0.3,
            "exact_match_stderr,flexible-extract": 0.1,
        },
        "wikitext": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A", "acc_of_mine,none": 0.5},
        "squadv2": {"exact,none": 0.7, "exact_stderr,none": "N/A"},
        "ruler_vt": {"4096,none": 0.75, "4096_stderr,none": "N/A", "8192,none": 0.25, "16384,none": -1},
        "two": {"acc,none": 0.6, "acc_stderr,none": 0.05, "alias": "two"},
    },
    "groups": {"two": {"acc,none": 0.6, "acc_stderr,none": 0.05}},
    "group_subtasks": {"two": ["arc_easy", "gsm8k"]},
    "configs": {"ruler_vt": {"metadata": {"version": 1.0, "max_seq_lengths": [4096, 8192]}}},
    "versions": {"arc_easy": 1.0},
    "n-shot": {"arc_easy": 0},
    "higher_is_better": {"arc_easy": {"acc": True, "acc_norm": True}},
    "n-samples": {
        "arc_easy": {"original": 2376, "effective": 40},
        "gsm8k": {"original": 10, "effective": 10},
        "wikitext": {"original": 5, "effective": 5},
        "squadv2": {"original": 5, "effective": 5},
        "ruler_vt": {"original": 100, "effective": 100},
    },
    "config": {"model": "hf", "limit": None, "random_seed": 3, "gen_kwargs": {"temperature": 1.0}},
    "lm_eval_version": "0.4.13",
    "transformers_version": "5.17.0",
}
CATEGORY = {"pass@1": {"num_entries": 10, "avg_tokens": 7, "accuracy": 50.0}}
SKILLS = {  # metrics.json of NeMo-Skills
    "gpqa": {
        "pass@1": {"num_entries": 198, "symbolic_correct": 50.0, "no_answer": 3.0},
        "pass@1[avg-of-8]": {"num_entries": 198, "symbolic_correct": 57.77},
        "pass@8": {"num_entries": 198, "symbolic_correct": 80.0},
    },
    "bfcl_v4": {"overall_accuracy": {"accuracy": 40.0, "num_entries": 220}},
    "bfcl_v4.web_search_base": {"pass@1": {"num_entries": 100, "accuracy": 0.0}},
    "bfcl_v4.format_sensitivity": {"pass@1": {"num_entries": 5200, "accuracy": 0.0}},
    **{f"bfcl_v4.{name}": CATEGORY for name in nemo.CATEGORIES},
    "new_benchmark": {"pass@1": {"num_entries": 4, "accuracy": 25.0}},
}


def results_yml(found: dict, kind: str = "ns_gpqa") -> dict:
    """The same numbers as NeMo Evaluator writes them."""
    renamed = {
        task: {
            "metrics": {
                metric.replace("@", "_at_").replace("[", "_").replace("]", ""): {
                    "scores": {score: {"value": value, "stats": {}} for score, value in scores.items()}
                }
                for metric, scores in metrics.items()
            }
        }
        for task, metrics in found.items()
    }
    return {
        "command": "ns eval",
        "config": {"type": kind, "params": {"temperature": 0.6, "max_new_tokens": 65536}},
        "target": {"api_endpoint": {"model_id": "m"}},
        "results": {"tasks": renamed, "groups": {}},
        "metadata": {"versioning": {"nemo_evaluator": "0.2.8"}},
    }


def save(folder, content, name="results.json"):
    text = yaml.safe_dump(content) if name.endswith("yml") else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


def test_the_known_metric_of_each_task_is_a_row_and_the_others_stand_beside_it(tmp_path, capsys):
    file = write_scores(tmp_path, "primed", "short", [save(tmp_path, LM_EVAL)])
    content = parse_sealed(file.read_text())
    scores = Scores.model_validate(content)
    assert file.name == "scores.primed-short.json" and scores.suite == "short"
    rows = scores.tasks
    assert rows.keys() == {"arc_easy", "gsm8k", "ruler_vt@4096", "ruler_vt@8192", "two"}
    assert (rows["arc_easy"].accuracy, rows["arc_easy"].n) == (0.6, 40)  # acc_norm, by custom
    assert rows["arc_easy"].interval == pytest.approx(wilson(0.6, 40)) and rows["arc_easy"].truncated is None
    found = content["tasks"]["gsm8k"]
    assert (found["metric"], found["filter"], found["accuracy"]) == ("exact_match", "flexible-extract", 0.3)
    assert found["others"] == {"exact_match,strict-match": 0.2} and found["stderr"] == 0.1
    assert (rows["ruler_vt@8192"].length, rows["ruler_vt@8192"].accuracy, rows["ruler_vt@8192"].n) == (8192, 0.25, 50)
    assert rows["two"].n == 10 + 40 - 10  # of the tasks that have this metric
    assert rows["two"].interval == pytest.approx((0.6 - 1.959964 * 0.05, 0.6 + 1.959964 * 0.05))
    assert content["measures"].keys() == {"wikitext", "squadv2"}  # squadv2's is a percentage: 0.7 is no share
    assert content["measures"]["wikitext"]["word_perplexity,none"] == 12.5
    assert "wikitext, squadv2" in capsys.readouterr().err
    source = found["source"]
    assert (tmp_path / source).read_text() == (tmp_path / "results.json").read_text()
    assert scores.settings[source] == {"model": "hf", "random_seed": 3, "gen_kwargs": {"temperature": 1.0}}
    assert scores.versions == {"lm_eval": "0.4.13", "transformers": "5.17.0"}


@pytest.mark.parametrize("name", ["metrics.json", "results.yml"])
def test_nemo_skills_percentages_are_shares_of_the_most_answers(tmp_path, name):
    content = SKILLS if name == "metrics.json" else results_yml(SKILLS)
    reading = read_results(save(tmp_path, content, name))
    gpqa = reading.tasks["gpqa"]
    assert (gpqa["accuracy"], gpqa["n"], gpqa["repeats"]) == (pytest.approx(0.5777), 198, 8)
    assert gpqa["metric"].endswith("/symbolic_correct") and len(gpqa["others"]) == 3
    assert reading.tasks.keys() == {"gpqa", "bfcl_v4"} and reading.measures.keys() == {"new_benchmark"}
    if name == "results.yml":
        assert reading.settings["temperature"] == 0.6 and reading.versions == {"nemo_evaluator": "0.2.8"}


entries = st.tuples(st.integers(1, 2000), st.floats(0, 100))


@settings(deadline=None, max_examples=40)
@given(st.lists(entries, min_size=len(nemo.CATEGORIES), max_size=len(nemo.CATEGORIES)), st.sampled_from("._"), entries)
def test_bfcl_v4_weighs_categories_by_entries_and_leaves_web_search_out(tmp_path_factory, counts, dot, web):
    categories = dict(zip((*nemo.CATEGORIES, "web_search_base"), (*counts, web), strict=True))
    found = {
        f"bfcl_v4{dot}{name}": {"pass@1": {"num_entries": n, "accuracy": share}}
        for name, (n, share) in categories.items()
    }
    row = read_results(save(tmp_path_factory.mktemp("bfcl"), found, "metrics.json")).tasks["bfcl_v4"]
    assert row["n"] == sum(n for n, _ in counts)
    assert row["accuracy"] == pytest.approx(sum(n * share for n, share in counts) / row["n"] / 100)
    assert len(row["others"]) == len(categories)  # nothing is dropped


def test_results_of_other_harnesses_of_nemo_evaluator_are_kept_as_they_are(tmp_path):
    found = results_yml({"mmlu": {"score": {"micro": 0.5}}}, kind="mmlu")
    found["results"]["groups"] = {"all": {"groups": {"part": found["results"]["tasks"]["mmlu"]}, "metrics": {}}}
    reading = read_results(save(tmp_path, found, "results.yml"))
    assert not reading.tasks and reading.measures["part"]["metrics"] == {"score": {"micro": 0.5}}


def cut(content: dict, *keys):
    """Without the value at the path `keys`."""
    content = copy.deepcopy(content)
    place = content
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return content


def put(content: dict, value, *keys):
    content = copy.deepcopy(content)
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return content


WRONG = {
    "a task without its number of prompts": (cut(LM_EVAL, "n-samples", "arc_easy"), "n-samples.arc_easy: is missing"),
    "no numbers of prompts": (cut(LM_EVAL, "n-samples"), "n-samples: Field required"),
    "no version": (cut(LM_EVAL, "lm_eval_version"), "lm_eval_version: Field required"),
    "no results": (put(LM_EVAL, {}, "results"), "results: Dictionary should have at least 1 item"),
    "no metric": (put(LM_EVAL, {"arc_easy": {"alias": "a"}}, "results"), "results: has no metric"),
    "not a number": (put(LM_EVAL, float("nan"), "results", "gsm8k", "exact_match,strict-match"), "nan is not a number"),
    "a switch": (put(LM_EVAL, True, "results", "gsm8k", "exact_match,strict-match"), "True is not a number"),
    "a percentage": (
        put(LM_EVAL, 61.5, "results", "gsm8k", "exact_match,flexible-extract"),
        "gsm8k.exact_match,flexible-extract: 61.5 is not a share from 0 to 1",
    ),
    "text": (put(LM_EVAL, "high", "results", "gsm8k", "exact_match,strict-match"), "'high' is not a number"),
    "a limit over two lengths": (
        put(LM_EVAL, 9, "config", "limit"),
        "config.limit: it is unknown how many of 100 prompts",
    ),
    "no prompts": (put(LM_EVAL, 0, "n-samples", "arc_easy", "effective"), "n-samples.arc_easy.effective: Input should"),
    "results.yml without its end": (cut(results_yml(SKILLS), "target"), "target: is missing"),
    "a metric without scores": (
        put(results_yml(SKILLS), {"value": 1}, "results", "tasks", "gpqa", "metrics", "pass_at_1"),
        "results.tasks.gpqa.metrics.pass_at_1: each score needs a value",
    ),
    "another file": ({"tasks": {}}, "has no key results"),
    "an empty one": ({}, "has no key results"),
    "a list": ([1], "is not a mapping"),
    "a category that was not run": (cut(SKILLS, "bfcl_v4.memory_kv"), "bfcl_v4.memory_kv: is missing (1 of 20"),
    "categories with other numbers of answers": (
        put(SKILLS, {"pass@1[avg-of-2]": CATEGORY["pass@1"]}, "bfcl_v4.multiple"),
        "differs between categories (1 and 2)",
    ),
    "no count": (cut(SKILLS, "gpqa", "pass@1[avg-of-8]", "num_entries"), "num_entries: is missing; give NeMo-Skills'"),
    "no score": (cut(SKILLS, "gpqa", "pass@1[avg-of-8]", "symbolic_correct"), "symbolic_correct: is missing"),
    "more than all": (put(SKILLS, 101, "gpqa", "pass@1[avg-of-8]", "symbolic_correct"), "101.0 is not a percentage"),
    "no pass@1": (put(SKILLS, {"pass@8": {"symbolic_correct": 1}}, "gpqa"), "has no metric pass@1; it has pass@8"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_named_with_its_key_in_one_line_and_leaves_no_scores(tmp_path, content, message):
    file = save(tmp_path, content)
    with pytest.raises(HmfError) as error:
        write_scores(tmp_path, "primed", "s", [file])
    assert str(error.value).startswith(f"{file}: ") and message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["results.json", "results.yml"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_half_a_file_is_refused_unless_all_results_are_in_it(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("half")
    file = save(folder, LM_EVAL if name.endswith("json") else results_yml({"gpqa": SKILLS["gpqa"]}), name)
    whole, text = read_results(file), file.read_text()
    file.write_text(text[: data.draw(st.integers(0, len(text) - 2))])
    message = ""
    try:
        reading = read_results(file)
    except HmfError as error:
        message = str(error)
    if message:
        assert message.startswith(f"{file}: ") and "\n" not in message
    else:  # YAML that ends in the middle of its last key, which is not results
        assert name.endswith("yml") and reading.tasks == whole.tasks


def test_rows_are_added_and_replaced_by_key_and_the_same_row_twice_is_refused(tmp_path):
    first = save(tmp_path, LM_EVAL, "first.json")
    only = {"results": {"gsm8k": LM_EVAL["results"]["gsm8k"]}, "group_subtasks": {}}
    second = save(tmp_path, put(LM_EVAL | only, 0.9, "results", "gsm8k", "exact_match,flexible-extract"), "second.json")
    with pytest.raises(HmfError, match=r"second.json: gsm8k: is also in .*first.json"):
        write_scores(tmp_path, "primed", "s", [first, second])
    write_scores(tmp_path, "primed", "s", [first])
    content = parse_sealed(write_scores(tmp_path, "primed", "s", [second]).read_text())
    assert content["tasks"]["gsm8k"]["accuracy"] == 0.9 and content["tasks"]["arc_easy"]["accuracy"] == 0.6
    assert len({row["source"] for row in content["tasks"].values()}) == len(content["settings"]) == 2
    (tmp_path / "scores.primed-s.json").write_text("{}")
    with pytest.raises(HmfError, match=r"scores.primed-s.json: is not a file of scores"):
        write_scores(tmp_path, "primed", "s", [second])
    own = {"suite": "retention", "tasks": {"needle@4096": {"task": "needle", "accuracy": 0.5, "n": 10}}}
    (tmp_path / "scores.primed-retention.json").write_text(text := seal_json(own))
    with pytest.raises(HmfError, match="has scores of `hmf evaluate`; give another --suite or --name"):
        write_scores(tmp_path, "primed", "retention", [second])
    assert (tmp_path / "scores.primed-retention.json").read_text() == text


def test_cards_link_to_the_harness_file_and_to_no_file_elsewhere(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    file = write_scores(tmp_path, "primed", "s", [save(tmp_path, LM_EVAL)])
    evidence = Evidence.of(tmp_path)
    row = evidence.scores["primed-s"].tasks["gsm8k"]
    source = evidence.source(row)
    assert source and {file, tmp_path / source} <= set(evidence.files)
    assert evidence.source(row.model_copy(update={"source": "../x"})) is None
    (tmp_path / source).unlink()
    assert evidence.source(row) is None


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hmf", "harness", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_the_command_prints_what_it_read(tmp_path, monkeypatch, capsys):
    file = save(tmp_path, LM_EVAL)
    code, out, _ = command(monkeypatch, capsys, "read", file, "--suite", "s", "--run", tmp_path, "--name", "teacher")
    assert code == 0 and f"saved {tmp_path}/scores.teacher-s.json" in out
    assert "gsm8k           30.0  (10.8-60.3, n = 10)  exact_match, flexible-extract" in out
    for wrong, message in (
        (("read", file, "--suite", "a/b", "--run", tmp_path), "suite: 'a/b' cannot be part of a file name"),
        (("read", file, "--suite", "s", "--run", tmp_path / "no"), "no such folder"),
        (("read", tmp_path / "no.json", "--suite", "s", "--run", tmp_path), "no.json: no such file"),
        (("lm-eval", "teacher", "--tasks", ",", "--run", tmp_path), "--tasks: names none"),
        (("lm-eval", "teacher", "--tasks", "short", "--lengths", "4X", "--run", tmp_path), "--lengths: '4X'"),
    ):
        code, _, err = command(monkeypatch, capsys, *wrong)
        assert code == 2 and message in err and err.count("\n") == 1


def test_the_nemo_configuration_is_that_of_the_card(tmp_path, monkeypatch, capsys):
    _, out, _ = command(monkeypatch, capsys, "nemo", "my/model", "--url", "http://host:8000/v1/", "--run", tmp_path)
    assert "target.api_endpoint.url=http://host:8000/v1/chat/completions" in out and "model_id=my/model" in out
    content = yaml.safe_load((nemo.ASSETS / nemo.CONFIG).read_text())
    assert f"--config {(nemo.ASSETS / nemo.CONFIG)} " in out
    common = content["evaluation"]["nemo_evaluator_config"]["config"]["params"]
    assert common["max_new_tokens"] == 64 * 1024 and round(common["temperature"], 3) == round(common["top_p"], 3) == 1.0
    tasks = {task["name"]: task["nemo_evaluator_config"]["config"]["params"] for task in content["evaluation"]["tasks"]}
    assert [name.removeprefix("nemo_skills.ns_") for name in tasks] == [
        "aime2024",
        "aime2025",
        "gpqa",
        "livecodebench_v5",
        "bfcl_v3",
        "bfcl_v4",
        "ifbench",
        "scicode",
    ]
    for name, params in tasks.items():
        sampling = (params.get("temperature"), params.get("top_p"))
        assert sampling == ((0.6, 0.95) if "bfcl" in name else (None, None))


def test_the_launcher_takes_the_configuration():
    launcher = pytest.importorskip("nemo_evaluator_launcher.common.config_models", reason="needs the launcher of NeMo")
    from nemo_evaluator.api.api_dataclasses import ConfigParams

    evaluation = launcher.EvaluationModel(**yaml.safe_load((nemo.ASSETS / nemo.CONFIG).read_text())["evaluation"])
    for task in evaluation.tasks:
        common = evaluation.nemo_evaluator_config["config"]["params"]
        ConfigParams(**{**common, **task.nemo_evaluator_config["config"]["params"]})
