# SPDX-License-Identifier: Apache-2.0
"""The report of a run: a page without a network, in which every number is in a file that it names."""

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmf.config.runs import PrimeRecipe
from hmf.config.strict import seal_json
from hmf.errors import HmfError
from hmf.pipeline import prime
from hmf.priming.export import export
from hmf.report import charts
from hmf.report.page import write_report
from tests.test_card import PRIMED, ROW, TEACHER, command
from tests.training import cutting
from tests.training.cutting import finetune_recipe, make_tiny_stage0

VOID = {"meta", "br", "link", "img", "input", "hr", "base"}
LOG = [
    *(
        {
            "step": step,
            "loss": 2 / step,
            "loss_a": 1 / step,
            "error_layer_0": 0.5 / step,
            "error_layer_1": 0.7 / step,
            "grad_norm": 3.0 / step,
        }
        for step in (1, 2, 3)
    ),
    *(
        {
            "step": step,
            "loss": 3 / step,
            "loss_b": 1 / step,
            "error_layer_0": 0.4 / step,
            "error_layer_1": 0.6 / step,
            "grad_norm": 3.0 / step,
        }
        for step in (4, 5)
    ),
    {"step": 5, "train_runtime": 147.3, "train_loss": 1.0, "total_flos": 7.0},
]
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> </pre>{{ 7*7 }} &amp; \"'>"


class Page(HTMLParser):
    """Elements and texts of a page. Fails where an element is not closed, or one that is not open is."""

    def __init__(self, file: Path):
        super().__init__()
        self.file, self.open, self.elements, self.rows, self.text = file, [], [], [], ""
        self.feed(file.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.rows and self.open[-1:] and {"td", "th"} & set(self.open[-3:]):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def row(self, *first):
        return [row for row in self.rows if row[: len(first)] == list(first)][-1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    export(make_tiny_stage0(folder), folder / "hybrid")
    return folder


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder of `hmf prime` with a finished model, two files of scores and a log."""
    folder = tmp_path / "run"
    shutil.copytree(tiny / "hybrid", folder / "model")
    recipe = {
        "base": str(tiny / "base"),
        "output": str(folder),
        "seed": 3,
        "hybrid": {"pattern": "*-GDN"},
        "distill": {
            "training": {"max_steps": 5, "per_device_train_batch_size": 3},
            "data": {"sequence_length": 96},
        },
        "evaluate": {"tasks": ["recall"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "scores.teacher.json").write_text(seal_json(TEACHER | {"seconds": 7.1}))
    (folder / "scores.primed.json").write_text(seal_json(PRIMED))
    (folder / "stage1.log.json").write_text(json.dumps(LOG))
    (folder / "times.json").write_text(seal_json({"stage0": 1.25, "export": 3725.0}))
    return folder


def answers(run, name, key, lines):
    """Write the answers behind a task; a line is (prompt, expected, answer, correct)."""
    file = run / "evaluation" / name / f"{key}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    fields = ("prompt", "expected", "answer", "correct")
    rows = [
        {"index": index, **dict(zip(fields, line, strict=True)), "truncated": False, "tokens": 3}
        for index, line in enumerate(lines)
    ]
    for row in rows:
        row["prompt_sha256"] = hashlib.sha256(row["prompt"].encode()).hexdigest()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_score_has_its_interval_and_links_to_its_file(run):
    page = Page(write_report(run))
    assert page.file == run / "report.html"
    assert page.row("recall", "teacher") == ["recall", "teacher", "75.0%", "59.8–85.8%", "", "40", "2", "128"]
    assert page.row("recall", "this model")[2:6] == ["50.0%", "35.2–64.8%", "-25.0", "40"]
    assert page.row("needle", "teacher")[2] == "not measured"
    assert page.row("needle", "this model")[3:7] == ["72.2–100.0%", "", "10", "not measured"]
    assert page.row("Perplexity of held-out text")[1:] == ["12.35", "13.50"]
    targets = {attributes["href"] for attributes in page.all("a") if not attributes["href"].startswith("#")}
    assert {"scores.teacher.json", "scores.primed.json", "stage1.log.json", "recipe.yaml", "times.json"} <= targets
    assert all((run / unquote(target)).is_file() for target in targets)


def test_steps_have_their_times_and_what_was_not_kept_is_not_measured(run):
    page = Page(write_report(run))
    assert page.row("Stage 0")[-1] == "1.2 s" and page.row("Export")[-1] == "1 h 02 min"
    assert page.row("Stage 1, distillation")[1:] == ["5 optimiser steps", "2 min 27 s"]
    assert page.row("Evaluation", "teacher: 1 task, 40 prompts")[-1] == "7.1 s"
    assert page.row("Evaluation", "primed: 2 tasks, 50 prompts")[-1] == "not measured"
    (run / "times.json").unlink()
    assert Page(write_report(run)).row("Export")[-1] == "not measured"


def test_curves_have_their_numbers_in_a_table_and_mark_a_new_objective(run):
    page = Page(write_report(run))
    assert ["4", "0.75", "", "0.25"] in page.rows and ["2", "1", "0.5", ""] in page.rows
    assert ["3", "0.6667", "0.3333", ""] in page.rows  # the last one before the change
    assert "The dashed line at 3: from here on the loss is the sum of b" in page.text
    assert ["5", "0.08", "0.12"] in page.rows and ["5", "0.6"] in page.rows  # errors of two layers; gradient norm
    assert ["1", "replaced", "0.12"] in page.rows and "train_loss" not in page.text


def test_layers_are_shown_with_the_scores_that_chose_them(run):
    assert "Scores that chose the layers" not in Page(write_report(run)).text
    chosen = {"method": "kl", "scores": [0.9, 0.125], "stability": {"kept": [0.95, 0.05]}, "seconds": 61.0}
    (run / "selection.json").write_text(seal_json(chosen))
    page = Page(write_report(run))
    assert page.row("1", "Gated DeltaNet") == ["1", "Gated DeltaNet", "0.125", "5%", "0.12"]
    assert page.row("0", "Attention")[2] == "0.9" and page.row("Selection of layers")[1:] == ["by kl", "1 min 01 s"]
    assert [attributes["title"] for attributes in page.all("abbr")] == ["Attention", "Gated DeltaNet"]


def test_a_suite_is_shown_by_length_with_the_intervals_of_its_file(run):
    for who, share in (("teacher", 1.0), ("primed", 0.5)):
        tasks = {
            f"needle_single@{length}": {
                "task": "needle_single",
                "length": length,
                "accuracy": share,
                "n": 20,
                "truncated": 0.1,
            }
            for length in (4096, 131072)
        }
        content = {
            "tasks": tasks,
            "suite": "retention",
            "settings": {"seed": 11},
            "versions": {"torch": "9.9"},
            "positions": [{"start": 0, "end": 64, "perplexity": 8.5, "tokens": 9}],
        }
        (run / f"scores.{who}-retention.json").write_text(seal_json(content))
    page = Page(write_report(run))
    assert page.row("needle_single@4096", "this model")[2:] == ["50.0%", "29.9–70.1%", "-50.0", "20", "2", "4,096"]
    assert "Suite retention" in page.text and "needle_single by length" in page.text
    assert ["4K", "100", "50"] in page.rows and ["128K", "100", "50"] in page.rows and ["32", "8.5", "8.5"] in page.rows
    assert page.row("scores.primed-retention.json", "11") == ["scores.primed-retention.json", "11", "torch 9.9"]


def test_planned_figures_are_called_computed_and_measured_ones_name_their_hardware(run):
    assert "Throughput and time to first token: not measured" in Page(write_report(run)).text
    rows = [{"model": "Base", **ROW}, {"model": "Ours", **ROW, "decode_tokens_per_second": 2468.0, "decode_ratio": 2.0}]
    given = {"rows": rows, "hardware": {"cuda:0": "Some GPU"}, "options": [], "versions": {"vllm": "0.1"}}
    (run / "serving.json").write_text(json.dumps(given))
    page = Page(write_report(run, gpu="l4"))
    assert (
        "Computed, not measured" in page.text
        and "Decode throughput, l4" in page.text
        and "On cuda:0: Some GPU" in page.text
    )
    assert page.row("Ours", "64") == ["Ours", "64", "3", "2,468.0", "2.00×", "250.0", "1.00×"]
    assert page.row("serving.json", "none: random data")[2] == "vllm 0.1"


def test_samples_stand_side_by_side_and_those_that_differ_come_first(run):
    assert "Answers to single prompts: not measured" in Page(write_report(run)).text
    lines = [(f"question {index}", f"right {index}", f"right {index}", True) for index in range(5)]
    answers(run, "teacher", "recall", lines)
    answers(run, "primed", "recall", [*lines[:3], ("question 3", "right 3", "something else", False), lines[4]])
    page = Page(write_report(run))
    assert page.row("recall", "4") == ["recall", "4", "1", "0", "0"]
    found = re.findall(r"recall, prompt \d", page.text)
    assert found == ["recall, prompt 3", "recall, prompt 0"]
    assert "question 3" in page.text and "something else" in page.text and "question 4" not in page.text


def test_scores_of_a_finetuned_model_are_this_models(run):
    (run / "scores.primed.json").rename(run / "scores.model.json")
    assert Page(write_report(run)).row("recall", "this model")[2:6] == ["50.0%", "35.2–64.8%", "-25.0", "40"]


def test_answers_to_other_prompts_are_not_paired(run):
    answers(run, "teacher", "recall", [("one", "a", "a", True)])
    answers(run, "primed", "recall", [("two", "b", "b", True)])
    assert "only the teacher" not in Page(write_report(run)).text


def plain(page, tags=("script", "img", "iframe", "object", "link", "base", "form")):
    """Whether a page loads and runs nothing."""
    urls = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "srcset", "poster")
    ]
    loads = re.search(r"@import|url\((?!#)", page.file.read_text())
    handlers = [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    return not (any(page.all(tag) for tag in tags) or any(":" in url for url in urls) or loads or handlers)


def test_texts_of_others_are_escaped(run):
    answers(run, "teacher", "recall", [(HOSTILE, HOSTILE, HOSTILE, True)])
    page = Page(write_report(run))
    assert page.text.count(HOSTILE) == 3 and plain(page)
    assert "default-src 'none'" in page.file.read_text()


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), name=st.text("<>&'\"/#? a", min_size=1)
)
def test_no_text_of_a_file_becomes_an_element(run, text, name):
    (run / "scores.primed.json").write_text(seal_json(PRIMED | {"tasks": {f"x{name}": PRIMED["tasks"]["recall"]}}))
    answers(run, "teacher", "recall", [(text, text, text, True)])
    page = Page(write_report(run))
    assert plain(page) and page.row(f"x{name}".strip(), "this model")
    assert text in page.text.replace("\r", "\n") or text in page.text


def test_the_page_has_what_a_reader_without_sight_needs(run):
    page = Page(write_report(run))
    assert (
        page.all("html")[0]["lang"] == "en"
        and len(page.all("h1")) == len(page.all("main")) == len(page.all("nav")) == 1
    )
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    asked = {part for _, attributes in page.elements for part in attributes.get("aria-labelledby", "").split()}
    inside = {attributes["href"][1:] for attributes in page.all("a") if attributes["href"].startswith("#")}
    assert asked | inside <= set(names)
    assert page.all("svg") and all(svg["role"] == "img" and svg["aria-labelledby"] for svg in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("figure"))
    assert all("scope" in cell for cell in page.all("th")) and len(page.all("table")) <= len(page.all("thead"))


def test_an_unfinished_run_and_a_run_without_results_have_a_report(run, tmp_path):
    shutil.rmtree(run / "model")
    for file in (*run.glob("scores.*"), run / "stage1.log.json"):
        file.unlink()
    page = Page(write_report(run))
    assert "Scores: not measured" in page.text and "The run folder has no checkpoint yet" in page.text
    assert page.row("Training")[-1] == "not measured" and "base:" in page.text
    (tmp_path / "other").mkdir()
    with pytest.raises(HmfError, match="has no model/config.json"):
        write_report(tmp_path / "other")


def test_a_finetuned_model_names_the_run_before(run, tiny, tmp_path):
    tuned = tmp_path / "tuned"
    shutil.copytree(run / "model", tuned / "model")
    recipe = finetune_recipe(tiny / "hybrid", tuned).model_dump(mode="json", exclude_none=True)
    recipe |= {"model": str(run / "model"), "training": {"max_steps": 1, "per_device_train_batch_size": 2}}
    (tuned / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tuned / "stage2.log.json").write_text(json.dumps([{"step": 1, "loss": 2.0}, {"step": 1, "train_runtime": 3.0}]))
    page = Page(write_report(tuned))
    assert page.row("Stage 2, cpt")[1:] == ["1 optimiser steps", "3.0 s"]
    assert page.row("Stage 1, distillation")[1] == f"in the run folder {run}"


def test_prime_ends_with_a_report_and_a_failed_one_costs_nothing(tiny, tmp_path, monkeypatch, capsys):
    recipe = PrimeRecipe.model_validate(
        {
            "base": str(tiny / "base"),
            "output": str(tmp_path / "run"),
            "hybrid": {"pattern": "*-GDN"},
            "distill": cutting.settings(tiny / "stage0").model_dump(mode="json"),
            "evaluate": {"text_bytes": 500, "length": 96},
        }
    )
    lines = []
    prime(recipe, "base: x", say=lines.append)
    page = Page(tmp_path / "run" / "report.html")
    assert any(str(page.file) in line for line in lines)
    assert page.row("Stage 0")[-1].endswith(" s") and page.row("Export")[-1].endswith(" s")

    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr("hmf.pipeline.write_report", fail)
    assert prime(recipe, "base: x", say=lines.append).keys() == {"teacher", "stage 0", "primed"}
    assert "the report was not written: no ink" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.primed.json", "{", "has no valid scores"),
        ("stage1.log.json", "[{}]", "is not a training log"),
        ("stage1.log.json", "[", "line 1"),
        ("times.json", seal_json({"export": 1.0}).replace("1.0", "2.0"), "it was changed after it was written"),
        ("times.json", '{"export": "long"}', "has no seconds"),
        ("selection.json", '{"scores": [1]}', "one number for each of 2 layers"),
        ("evaluation/teacher/recall.jsonl", '{"index": 0}\n', "line 1: prompt_sha256: Field required"),
        ("recipe.yaml", "base: [", "not valid YAML"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name(run, name, content, message, monkeypatch, capsys):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(content)
    code, _, err = command(monkeypatch, capsys, "report", run)
    assert code == 2 and err.count("\n") == 1 and name in err and message in err and not (run / "report.html").exists()


def test_a_page_that_somebody_else_wrote_is_kept(run, monkeypatch, capsys):
    file = run / "report.html"
    file.write_text("<p>mine")
    code, _, err = command(monkeypatch, capsys, "report", run)
    assert code == 2 and "--force" in err and err.count("\n") == 1 and file.read_text() == "<p>mine"
    assert command(monkeypatch, capsys, "report", run, "--force")[0] == 0 and "mine" not in file.read_text()
    code, out, _ = command(monkeypatch, capsys, "report", run, "--gpu", "l4")  # our own is written again
    assert code == 0 and out == f"saved {file}\n"


def test_two_reports_of_the_same_folder_are_the_same(run):
    assert write_report(run).read_text() == write_report(run).read_text()


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_number_of_a_table_is_the_number_to_its_last_digit(value):
    text = charts.number(value).replace(",", "")
    found = float(text.removesuffix("M")) * (1e6 if text.endswith("M") else 1)
    assert found == pytest.approx(value, rel=1e-3)


@pytest.fixture(scope="module")
def chromium():
    """Chromium of the machine, driven by playwright."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright, which `make test` does not install")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs chromium on the path")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_a_browser_shows_it_without_errors_or_a_sideways_scroll(chromium, run, scheme, width):
    answers(run, "teacher", "recall", [("long " * 300, "right", "x" * 500, True)])
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(write_report(run).as_uri())
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    page.close()
    assert not messages and len(requests) == 1 and wide <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(chromium, run, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    answers(run, "teacher", "recall", [("question", "right", "wrong", False)])
    page = chromium.new_context(color_scheme=scheme, bypass_csp=True).new_page()  # axe is a script
    page.goto(write_report(run).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = axe.Axe().run(page).response["violations"]
    page.close()
    assert not [(rule["id"], node["html"]) for rule in found for node in rule["nodes"]]
