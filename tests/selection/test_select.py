# SPDX-License-Identifier: Apache-2.0
"""`hmf select` and `hybrid.layers: auto`: what is chosen, written, read again and refused."""

import json
import re
import shlex
import shutil
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hmf.cli import app
from hmf.config.data import DataRecipe
from hmf.config.pattern import Pattern
from hmf.config.recipes import load_recipe
from hmf.config.runs import HybridSettings, ObjectiveSettings, PrimeRecipe
from hmf.data.mixture import mixture
from hmf.data.prepare import prepare
from hmf.data.prepared import PreparedDataset
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_model
from hmf.model.convert import drop_teacher, hybridise
from hmf.pipeline import prime
from hmf.priming.objectives import LayerwiseObjective
from hmf.priming.stage0 import initialise
from hmf.selection.run import read_scores
from hmf.selection.scores import Scorer, means
from hmf.selection.supernet import SubsetLoss, fused_everywhere
from hmf.training.losses import CrossEntropy
from hmf.training.trainer import HybridTrainer
from tests.conftest import ROOT
from tests.model.test_families import stock_model
from tests.numerics import assert_near

TEXT = str(ROOT / "docs")  # small: the standard library takes seconds to encode
SMALL = {
    "hybrid": {"mixer": "gdn", "layers": "auto", "ratio": 0.5, "conv_start": "identity"},
    "select": {"layerwise_steps": 2, "subset_steps": 2, "rows": 2},
    "distill": {
        "data": {"text": TEXT, "sequence_length": 96, "text_share": 0.5, "tasks": {"recall": 1}},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
    },
    "evaluate": {"samples": 1, "text_bytes": 500, "length": 96},
}


TALK = {"text": TEXT, "sequence_length": 128, "text_share": 0, "tasks": {"recall": 1}}


def written(folder, **sections):
    """A recipe file with sections changed, and its recipe."""
    content = {"base": "teacher", "output": str(folder / "run"), **SMALL}
    content |= {name: content.get(name, {}) | values for name, values in sections.items()}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(*arguments):
    result = CliRunner().invoke(app, ["select", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module", params=[1, 4])
def one_attention(request, tmp_path_factory):
    """The embedded teacher with the attention of all layers but one silent, and the index of that layer."""
    folder = tmp_path_factory.mktemp("silent") / "base"
    shutil.copytree(resolve_base("teacher"), folder)
    weights = load_file(folder / "model.safetensors")
    for name, x in weights.items():
        if name.endswith("o_proj.weight") and f".{request.param}." not in name:
            x.zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder, request.param


@pytest.mark.parametrize("method", ["kl", "greedy", "supernet"])
def test_the_one_attention_that_matters_is_kept(one_attention, tmp_path, method):
    base, needed = one_attention
    recipe = written(tmp_path, select={"layerwise_steps": 0, "subset_steps": 0})
    output = command(base, "--keep", 1, "--method", method, "--recipe", recipe, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/selection.json").read_text())
    assert (found["method"], found["kept"], found["stability"]["same_choice"]) == (method, [needed], 1.0)
    assert max(range(6), key=lambda layer: found["scores"][layer]) == needed
    assert found["pattern"].split("-")[needed] == "*" and found["pattern"] in output
    assert "hybrid.layers=" + json.dumps(found["replaced"], separators=(",", ":")) in output
    assert (tmp_path / "out/selection.png").stat().st_size > 1000


def test_window_ranks_by_the_loss_of_a_layer_with_a_window(tmp_path):
    """Beside the loss of models in which this one layer is a sliding window."""
    recipe = written(tmp_path, select={"window_size": 16}, distill={**SMALL["distill"], "data": TALK})
    command("teacher", "--keep", 4, "--method", "window", "--recipe", recipe, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/selection.json").read_text())
    settings = load_recipe(recipe, PrimeRecipe)
    tokenizer = load_tokenizer(resolve_base("teacher"))
    rows = mixture(settings.distill.data, tokenizer, 2, 2**31)
    batch = {name: torch.stack([row[name] for row in (rows[0], rows[1])]) for name in rows[0]}
    whole = batch["labels"].clone()
    for row, starts in enumerate(batch["position_ids"] == 0):  # a document without a prompt is text, and does not count
        for start, stop in pairwise([*starts.nonzero()[:, 0].tolist(), whole.shape[1]]):
            if (whole[row, start:stop] == -100).sum() == 1:
                batch["labels"][row, start:stop] = -100
    losses = []
    for layer in range(6):
        pattern = Pattern.generate(6, "swa", layers=[layer])
        model = hybridise(
            load_model(resolve_base("teacher"), dtype=torch.float32), pattern, {"swa_config": {"window_size": 16}}
        )
        initialise(model)
        with torch.no_grad():
            losses.append(drop_teacher(model).eval()(**batch, objective=CrossEntropy())["loss"])
    order = sorted(range(6), key=lambda layer: found["scores"][layer])
    assert order == sorted(range(6), key=lambda layer: losses[layer]) and sorted(order[2:]) == found["kept"]
    first = torch.tensor(found["scores"]) - found["scores"][0]
    assert_near(first, torch.stack(losses).double() - losses[0], torch.stack(losses) - losses[0])


def test_uniform_is_the_even_spread(tmp_path):
    recipe = written(tmp_path)
    command("teacher", "--ratio", 0.5, "--method", "uniform", "--recipe", recipe, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out/selection.json").read_text())
    assert found["pattern"] == str(HybridSettings(ratio=0.5).layer_pattern(6))


class Stopped(Exception):
    pass


@pytest.mark.usefixtures("blank_pictures")
def test_a_selection_that_was_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch):
    content = [written(tmp_path), "--keep", 3, "--set", "distill.training.save_steps=2"]
    command("teacher", "--recipe", *content, "--out", tmp_path / "whole")
    real = HybridTrainer.compute_loss

    def stop_later(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HybridTrainer, "compute_loss", stop_later)
        with pytest.raises(Stopped):
            command("teacher", "--recipe", *content, "--out", tmp_path / "cut")
    command("teacher", "--recipe", *content, "--out", tmp_path / "cut")
    whole, cut = (json.loads((tmp_path / name / "selection.json").read_text()) for name in ("whole", "cut"))
    timed = {"seconds", "seal", "cost"}
    assert {k: v for k, v in whole.items() if k not in timed} == {k: v for k, v in cut.items() if k not in timed}
    assert whole["cost"]["training_tokens"] == 4 * 2 * 96
    with pytest.raises(HmfError, match="another recipe"):
        command("teacher", "--recipe", *content[:2], 2, *content[3:], "--out", tmp_path / "cut")


@pytest.mark.usefixtures("blank_pictures")
def test_prime_chooses_and_keeps_its_choice(tmp_path, monkeypatch):
    path = written(tmp_path)
    recipe, lines = load_recipe(path, PrimeRecipe), []
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(HmfError, match="without torchrun"):
            prime(recipe, "text", say=lines.append)
    prime(recipe, "text", say=lines.append)
    found = json.loads((tmp_path / "run/selection.json").read_text())
    stored = json.loads((tmp_path / "run/model/config.json").read_text())
    assert stored["hybrid_override_pattern"] == found["pattern"] and len(found["kept"]) == 3
    assert "chose the replaced layers" in (tmp_path / "run/model/README.md").read_text()


def test_subsets_are_a_function_of_seed_and_step():
    loss = SubsetLoss(ObjectiveSettings(layerwise_steps=2), layers=5, seed=3)
    drawn = [loss.at(step, lambda objective, rows: (1.0,) * 5) for step in range(300)]
    assert all(isinstance(objective, LayerwiseObjective) for objective in drawn[:2])
    subsets = [objective.replaced for objective in drawn[2:]]
    again = SubsetLoss(ObjectiveSettings(), layers=5, seed=3)
    assert subsets == [again.at(step, None).replaced for step in range(2, 300)]
    assert subsets != [SubsetLoss(ObjectiveSettings(), 5, 4).at(step, None).replaced for step in range(2, 300)]
    assert {len(subset) for subset in subsets} == {1, 2, 3, 4, 5} and frozenset().union(*subsets) == set(range(5))


def test_only_the_mixers_of_the_subset_learn(tiny_qwen3_dir):
    model = fused_everywhere(tiny_qwen3_dir, "gdn")
    loss = SubsetLoss(ObjectiveSettings(kl=1), layers=4)
    objective = next(o for o in (loss.at(step, None) for step in range(99)) if len(o.replaced) == 2)
    model(input_ids=torch.arange(3, 40)[None], objective=objective)["loss"].backward()
    learned = {int(name.split(".")[2]) for name, x in model.named_parameters() if x.grad is not None and x.grad.any()}
    assert learned == objective.replaced


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "[3, 1.5, 2]"),
        ("b.json", '{"0": 3, "2": 2, "1": 1.5}'),
        ("c.json", '{"scores": [3, 1.5, 2], "model": "x"}'),
        ("d.json", '{"scores": {"0": 3, "1": 1.5, "2": 2}}'),
        ("e.csv", "layer,score\n0,3\n1,1.5\n2, 2\n"),
        ("bom.csv", "\ufefflayer,score\n0,3\n1,1.5\n2,2\n"),
        ("f.csv", "score,layer\r\n3,0\r\n2,2\r\n1.5,1\r\n"),
    ],
)
def test_files_of_scores(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="", encoding="utf-8")
    assert read_scores(tmp_path / name, 3) == [3, 1.5, 2]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.json", "[3, 1.5]", r"no score for the layers \[2\]"),
        ("a.json", "[3, 1, 2, 4]", "layer 3"),
        ("a.json", '{"0": 1, "00": 2}', "layer 0"),
        ("a.json", '{"0": 1, "x": 2}', "'x'"),
        ("a.json", '{"0": 1, "1": null}', "None"),
        ("a.json", "[1, true, 2]", "True"),
        ("a.json", "[1, NaN, 2]", "nan"),
        ("a.json", "7", "has no scores"),
        ("a.json", "{", "not valid JSON"),
        ("a.csv", "layer;score\n0;1\n", "must be layer,score"),
        ("a.csv", "layer,score\n0\n", "two values"),
        ("a.csv", "layer,score\n0,1,2\n", "two values"),
        ("a.csv", "", "must be layer,score"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_files_of_scores_that_are_refused(tmp_path, name, text, why):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(HmfError, match=why) as error:
        read_scores(tmp_path / name, 3)
    assert str(error.value).startswith(str(tmp_path / name))


def test_scores_of_a_file_choose_the_layers_and_the_next_command_primes_them(tmp_path):
    (tmp_path / "scores.csv").write_text("layer,score\n" + "".join(f"{i},{i % 4}\n" for i in range(6)))
    recipe = written(tmp_path)
    given = [f"select.scores={tmp_path / 'scores.csv'}", "hybrid.mixer=gka"]
    printed = command(
        "teacher",
        "--keep",
        2,
        "--method",
        "scores",
        "--recipe",
        recipe,
        "--out",
        tmp_path / "out",
        *(part for value in given for part in ("--set", value)),
    )
    assert json.loads((tmp_path / "out/selection.json").read_text())["pattern"] == "GKA-GKA-*-*-GKA-GKA"
    words = shlex.split(printed.partition("; next: ")[2])
    assert words[1:3] == ["prime", str(recipe)] and set(words[3::2]) == {"--set"}
    primed = load_recipe(recipe, PrimeRecipe, words[4::2])
    assert (primed.base, primed.hybrid.mixer, primed.hybrid.layers) == ("teacher", "gka", [0, 1, 4, 5])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "exactly one of --keep and --ratio"),
        (["--keep", 2, "--ratio", 0.5], "exactly one of --keep and --ratio"),
        (["--keep", 6], "not below 6"),
        (["--keep", 2, "--method", "scores"], "scores"),
        (["--keep", 2, "--method", "magic"], "--method: unknown method"),
        (["--keep", 2, "--mixer", "rnn"], "rnn"),
        (["--keep", 2, "--recipe", "nowhere"], "no such recipe"),
        (["--keep", 2, "--set", "hybrid.ratio=0.9"], "hybrid.ratio follow"),
        (["--ratio", 0.5, "--set", "hybrid={mixer: gdn, layers: [0]}"], "hybrid.layers and"),
    ],
)
def test_what_select_refuses(tmp_path, arguments, why):
    with pytest.raises(HmfError, match=why):
        command("teacher", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prepared_rows_are_scored_from_the_end_of_the_set(tmp_path):
    """Training begins with the first row whatever the seed is."""
    base = resolve_base("teacher")
    given = {"output": tmp_path / "rows", "tokenizer": str(base), "sequence_length": 96, "tokens": 8 * 96}
    prepare(DataRecipe.model_validate(given | {"sources": [{"path": str(ROOT / "docs/layers.md"), "weight": 1}]}), base)
    rows = PreparedDataset(tmp_path / "rows")
    data = {**SMALL["distill"], "data": {"prepared": str(tmp_path / "rows")}}
    recipe = written(tmp_path, distill=data, select={"layerwise_steps": 0, "rows": 3})
    arguments = ("--keep", 5, "--method", "kl", "--recipe", recipe, "--out", tmp_path / "out")
    command("teacher", *arguments)
    found = json.loads((tmp_path / "out/selection.json").read_text())["one_at_a_time"]["measures"]
    scorer = Scorer(fused_everywhere(base, "gdn", conv_start="identity"), [rows[len(rows) - at] for at in (3, 2, 1)], 2)
    with pytest.raises(HmfError, match="select.rows: .*rows has 8 rows, fewer than 9; lower it"):
        command("teacher", *arguments[:-1], tmp_path / "more", "--set", "select.rows=9")
    fit = ("--set", "hybrid.start=calibrated", "--set", "hybrid.calibration={rows: 9}")
    with pytest.raises(HmfError, match="calibration.rows: .*rows has 8 rows, fewer than 9; lower it"):
        command("teacher", *arguments[:-1], tmp_path / "more", *fit)
    assert len(rows) == 8 and found == [means(sums) for sums in scorer([frozenset([layer]) for layer in range(6)])]


def test_window_needs_answers(tmp_path):
    recipe = written(tmp_path, distill={**SMALL["distill"], "data": {"text": TEXT, "sequence_length": 96}})
    with pytest.raises(HmfError, match="the data has no answers"):
        command("teacher", "--keep", 2, "--method", "window", "--recipe", recipe, "--out", tmp_path / "out")


def test_a_window_that_holds_every_document_ranks_nothing(tmp_path):
    recipe = written(tmp_path, distill={**SMALL["distill"], "data": TALK})
    arguments = ("teacher", "--keep", 4, "--method", "window", "--recipe", recipe, "--out", tmp_path / "out")
    with pytest.raises(HmfError, match=r"select\.window_size: 128 tokens .* changes nothing") as error:
        command(*arguments)
    longest = int(re.search(r"has (\d+) before", str(error.value))[1])
    with pytest.raises(HmfError, match=f"{longest} tokens hold"):
        command(*arguments, "--set", f"select.window_size={longest}")
    command(*arguments, "--set", f"select.window_size={longest // 2}", "--out", tmp_path / "shorter")
    assert any(json.loads((tmp_path / "shorter/selection.json").read_text())["scores"])


def test_auto_needs_a_ratio_and_no_pattern(tmp_path):
    for wrong in ({"ratio": None}, {"pattern": "*-*-*-*-*-GDN"}, {"layers": "best"}):
        with pytest.raises(HmfError, match="hybrid"):
            load_recipe(written(tmp_path, hybrid=wrong), PrimeRecipe)
    with pytest.raises(HmfError, match="auto"):
        load_recipe(written(tmp_path), PrimeRecipe).hybrid.layer_pattern(6)


@pytest.mark.parametrize("method", ["uniform", "supernet"])
def test_a_base_with_recurrent_layers_of_its_own_is_refused(tmp_path, method):
    stock_model("qwen3_5_text", "listed").save_pretrained(tmp_path / "base")
    with pytest.raises(HmfError, match=r"base: layers \[0, 2\] are recurrent in the base itself"):
        command(tmp_path / "base", "--keep", "2", "--method", method, "--out", tmp_path / "out")
    assert not (tmp_path / "out/selection.json").exists()
