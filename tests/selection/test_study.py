# SPDX-License-Identifier: Apache-2.0
"""The selection study: the order of its runs, its file of results, and what its report makes of them."""

import json
import sys
from argparse import Namespace

import pytest

from tests.conftest import ROOT

STUDY = ROOT / "recipes/studies/selection"
TASKS = ("recall", "needle", "arithmetic", "tool_call")
KL = {"kl_text": 0.25, "kl_answers": 0.125}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import report
    import study

    yield study, report
    for name in ("study", "report", "common"):
        sys.modules.pop(name)


def primed(variant, seed, replaced, accuracy, **fields):
    """A line of results, with the same accuracy in each task."""
    line = {"kind": "prime", "variant": variant, "seed": seed, "replaced": replaced, "kl": KL, "seconds": 10}
    return (
        line
        | {"key": f"{variant}{seed}{replaced}", "scores": dict.fromkeys(TASKS, accuracy), "finished": True}
        | fields
    )


def reported(report, monkeypatch, folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder), "--out", str(folder)])
    report.main()
    return (folder / "table.md").read_text()


def cells(table, name):
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_variants(scripts, monkeypatch, tmp_path):
    """Seeds of the recipe 50, 60, 70 %, of the other 10 points more: the paired difference has no spread."""
    lines = [{"kind": "teacher", "seed": 0, "key": "teacher", "scores": dict.fromkeys(TASKS, 0.98), "finished": True}]
    for seed in range(3):
        for replaced, more in (([0, 2], -0.05), ([1, 3], 0.05)):  # their mean counts
            lines.append(primed("recipe", seed, replaced, 0.5 + seed / 10 + more))
            lines.append(primed("mse", seed, replaced, 0.6 + seed / 10 + more))
    lines += [primed("unfinished", 0, [0, 2], 0.9), primed("mse", 3, [0, 2], 0.0)]  # choices of these are missing
    table = reported(scripts[1], monkeypatch, tmp_path / "out", lines)
    assert cells(table, "teacher")[2:7] == ["98.0"] * 5
    # Student's t with 2 degrees of freedom: 4.303 * 10 / sqrt(3)
    assert cells(table, "recipe") == ["recipe", "3", *["60.0 ± 24.8"] * 5, "0.250 ± 0.000", "0.125 ± 0.000", ""]
    assert cells(table, "mse")[1:3] == ["3", "70.0 ± 24.8"] and cells(table, "mse")[-1] == "10.0 ± 0.0"
    assert "unfinished |" not in table and table.index("| mse |") < table.index("| recipe |")
    assert (tmp_path / "out/variants.png").stat().st_size > 1000
    assert not (tmp_path / "out/choices.png").exists()


def test_one_seed_has_no_interval_and_choices_alone_make_the_table_of_sizes(scripts, monkeypatch, tmp_path):
    lines = [primed("recipe", 0, [1], 0.5), primed("mse", 0, [1], 0.25)]
    table = reported(scripts[1], monkeypatch, tmp_path / "variants", lines)
    assert cells(table, "mse")[2] == "25.0" and cells(table, "mse")[-1] == "-25.0"
    lines = [primed("recipe", 0, [layer], layer / 10) for layer in range(3)]
    table = reported(scripts[1], monkeypatch, tmp_path / "choices", lines)
    assert cells(table, "1") == ["1", "0", "3", "[2]", "20.0%", "10.0%", "0.0%", "0.188"]
    assert not (tmp_path / "choices/variants.png").exists()


def test_runs_come_seed_by_seed_and_methods_before_choices(scripts):
    study = scripts[0]
    options = Namespace(recipe=str(ROOT / "recipes/quickstart/recipe.yaml"), overrides=[], methods="window,supernet")
    vars(options).update(variants=None, choices=None, replaced="1,2", sample=None, seeds="4,5")
    plan = list(study.jobs(options))
    assert [job["seed"] for job in plan[1:]] == [4] * 23 + [5] * 23
    assert [study.key(job) for job in plan[:4]] == [
        "teacher",
        "supernet-seed4",
        "window-seed4",
        "recipe-0_1-seed4",  # larger choices take longer
    ]
    assert len({study.key(job) for job in plan}) == len(plan)
    options.sample = 3
    drawn = [
        [job["replaced"] for job in study.jobs(options) if job.get("replaced") and job["seed"] == s] for s in (4, 5)
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 6 and [len(x) for x in drawn[0]] == [2, 2, 2, 1, 1, 1]
    vars(options).update(variants="all", choices="0,2;1,3")
    assert {job["variant"] for job in list(study.jobs(options))[1:]} == study.VARIANTS.keys()


def test_every_variant_makes_a_recipe_that_can_be_read(scripts):
    from hmf.config.recipes import read_recipe
    from hmf.config.runs import PrimeRecipe

    study = scripts[0]
    for changes in study.VARIANTS.values():
        read_recipe(ROOT / "recipes/quickstart/recipe.yaml", PrimeRecipe, changes)


def test_a_line_that_was_cut_off_spoils_no_other(scripts, tmp_path):
    common, file = sys.modules["common"], tmp_path / "results.jsonl"
    common.append(file, [{"key": "a", "finished": True}])
    with file.open("a") as cut:
        cut.write('{"key": "b", "fini')
    assert common.finished(file) == {"a"}
    common.append(file, [{"key": "c", "finished": True}, {"key": "d"}])
    assert common.finished(file) == {"a", "c"}
    assert [line["key"] for line in common.read_lines(file)] == ["a", "c", "d"]
