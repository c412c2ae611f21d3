# SPDX-License-Identifier: Apache-2.0
"""The card of a run: every number is in a results file that it links to, and what is missing is named as missing."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from hmf.cli import main
from hmf.config.layers import LAYER_KINDS
from hmf.config.strict import seal_json
from hmf.errors import HmfError
from hmf.evaluation.results import wilson
from hmf.model.checkpoint import load_model
from hmf.priming.export import export
from hmf.report.card import write_card
from hmf.report.push import push_files
from hmf.report.references import citation, reference
from tests.conftest import ROOT
from tests.training.cutting import finetune_recipe, make_tiny_stage0

LINK = re.compile(r"\[([^\]]+)\]\(([^)#][^)]*)\)")
TEACHER = {
    "text": {"perplexity": 12.345, "tokens": 4321},
    "tasks": {"recall": {"accuracy": 0.75, "n": 40, "truncated": 0.05}},
    "length": 128,
}
PRIMED = {
    "text": {"perplexity": 13.5, "tokens": 4321},
    "tasks": {"recall": {"accuracy": 0.5, "n": 40, "truncated": 0.0}, "needle": {"accuracy": 1.0, "n": 10}},
}
ROW = {
    "context": 64,
    "sequences": 3,
    "filled": False,
    "decode_tokens_per_second": 1234.0,
    "mean_ttft": 0.25,
    "decode_ratio": 1.0,
    "ttft_ratio": 1.0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    export(make_tiny_stage0(folder), folder / "hybrid")
    return folder


@pytest.fixture
def run(tiny, tmp_path):
    """A run folder of `hmf prime` with a finished model and two files of scores."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    for file in (tiny / "hybrid").iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    recipe = {
        "base": str(tiny / "base"),
        "output": str(folder),
        "hybrid": {"pattern": "*-GDN"},
        "distill": {"training": {"max_steps": 7, "per_device_train_batch_size": 3}, "data": {"sequence_length": 96}},
        "evaluate": {"tasks": ["recall", "needle"]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "scores.teacher.json").write_text(seal_json(TEACHER))
    (folder / "scores.primed.json").write_text(seal_json(PRIMED))
    return folder


def row(text: str, first: str) -> list[str]:
    """Cells of the table row that begins with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hmf", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_every_score_links_to_the_file_that_holds_it(run):
    file = write_card(run)
    text = file.read_text()
    assert file == run / "model/README.md"
    assert row(text, "base (the base")[1:] == [
        "[12.35](../scores.teacher.json) (4,321 tokens)",
        "[75.0](../scores.teacher.json) (n = 40; 59.8–85.8; 2 cut off)",
        "not measured",
    ]
    assert row(text, "**GDN-primed-base**")[1:] == [
        "[13.50](../scores.primed.json) (4,321 tokens)",
        "[50.0](../scores.primed.json) (n = 40; 35.2–64.8; 0 cut off)",
        "[100.0](../scores.primed.json) (n = 10; 72.2–100.0)",
    ]
    assert all((file.parent / target).exists() for _, target in LINK.findall(text) if "://" not in target)


def test_facts_are_those_of_the_config_and_the_recipe(run, tiny):
    (tiny / "base/README.md").write_text("---\nlicense: mit\n---\n")
    try:
        card = ModelCard.load(write_card(run))
    finally:
        (tiny / "base/README.md").unlink()
    found = card.data.to_dict()
    assert (found["license"], found["library_name"]) == ("mit", "transformers") and "base_model" not in found
    parameters = f"{load_model(run / 'model').num_parameters():,}"
    text = card.text
    assert row(text, "Parameters") == ["Parameters", parameters]
    assert row(text, "Number of Layers")[1] == "2 (1 Attention + 1 GDN)"
    assert row(text, "Attention Heads")[1] == "2 (Q) / 1 (KV)" and row(text, "Context Length")[1] == "128 tokens"
    assert "*-GDN\n" in text and "7 optimiser steps of 3 rows" in text and "sequence_length: 96" in text
    assert "--mamba-cache-dtype float32" in text and f'name = "{run / "model"}"' in text
    assert "states the licence mit" in text and "2412.06464" in text


def test_a_licence_file_is_linked_and_no_licence_is_not_stated(run):
    assert "licence is not stated" in write_card(run).read_text()
    (run / "model/LICENSE.txt").write_text("Do as you like.")
    card = ModelCard.load(write_card(run))
    assert (card.data.license, card.data.license_link) == ("other", "LICENSE.txt") and "(LICENSE.txt)" in card.text


def test_a_base_of_the_hub_is_named_and_a_path_is_not(run):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for base, name in (
        ("Some-Org/Model@main", "Some-Org/Model"),
        ("hf://Some-Org/Model", "Some-Org/Model"),
        ("/cache/models--Some-Org--Model/snapshots/abc", "Some-Org/Model"),
        ("models/Model", None),
        ("/a/Model", None),
    ):
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"base": base}))
        card = ModelCard.load(write_card(run))
        assert card.data.base_model == name
        assert card.text.strip().startswith("# GDN-primed-Model\n")


def test_without_results_everything_reads_not_measured(run):
    for file in run.glob("scores.*"):
        file.unlink()
    text = write_card(run).read_text()
    assert row(text, "**GDN-primed-base**")[1:] == row(text, "base (the base")[1:] == ["not measured"] * 3
    assert "Throughput and time to first token: not measured" in text and "planned from the config" in text


def test_measured_serving_is_shown_with_the_hardware_that_the_file_names(run):
    rows = [{"model": "Base", **ROW}, {"model": "Ours", **ROW, "decode_tokens_per_second": 2468.0, "decode_ratio": 2.0}]
    hardware = {"cpu": "a CPU", "cuda:0": "Some GPU, 80 GiB", "cuda:1": "Some GPU, 80 GiB"}
    options = [["--tensor-parallel-size", "2"]] * 2
    (run / "serving.json").write_text(json.dumps({"rows": rows, "hardware": hardware, "options": options}))
    text = write_card(run).read_text()
    assert "2× Some GPU (TP=2)" in text and "2,468 (2.00×)" in text and "[serving.json](../serving.json)" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores.primed.json", seal_json(PRIMED).replace("13.5", "1.5"), "changed after it was written"),
        ("scores.primed.json", "{", "has no valid scores"),
        ("scores.other.json", '{"tasks": {"recall": {"accuracy": 97, "n": 4}}}', "tasks.recall.accuracy"),
        ("scores.other.json", '{"tasks": {"recall": {"accuracy": 0.5}}}', "tasks.recall.n"),
        ("scores.other.json", '{"model": {}}', "tasks"),
        ("serving.json", '{"rows": [], "hardware": {}, "options": []}', "rows"),
        ("recipe.yaml", "base: [", "not valid YAML"),
    ],
)
def test_a_damaged_file_is_refused_by_name_and_no_card_is_written(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(HmfError, match=re.escape(name)) as error:
        write_card(run)
    assert message in str(error.value) and not (run / "model/README.md").exists()


def test_a_sibling_is_a_row(run):
    (run / "scores.GKA.json").write_text((run / "scores.primed.json").read_text())
    assert row(write_card(run).read_text(), "GKA")[1] == "[13.50](../scores.GKA.json) (4,321 tokens)"


def test_a_finetuned_model_names_the_whole_chain(run, tiny, tmp_path):
    tuned = tmp_path / "tuned"
    (run / "model").rename(tmp_path / "kept")
    tuned.mkdir()
    (tmp_path / "kept").rename(tuned / "model")
    recipe = finetune_recipe(tiny / "hybrid", tuned).model_dump(mode="json", exclude_none=True)
    recipe |= {"model": str(run / "model"), "training": {"max_steps": 3, "per_device_train_batch_size": 2}}
    (tuned / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = write_card(tuned).read_text()
    assert text.index("Stage 1, distillation**: 7") < text.index("Stage 2, cpt**: 3")
    assert "# GDN-primed-base" in text and "not measured" in text


def test_a_finetune_recipe_may_ask_for_an_evaluation(tiny, tmp_path, monkeypatch, capsys):
    recipe = finetune_recipe(tiny / "hybrid", tmp_path / "tuned").model_dump(mode="json", exclude_none=True)
    recipe["training"] = {"max_steps": 1, "per_device_train_batch_size": 1}
    recipe["evaluate"] = {"tasks": ["chat"], "samples": 2, "length": 96, "max_new_tokens": 2, "text_bytes": 500}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(recipe | {"evaluate": {"tasks": ["chatt"]}}))
    code, _, err = command(monkeypatch, capsys, "finetune", tmp_path / "wrong.yaml")
    assert code == 2 and "evaluate.tasks: unknown task 'chatt'" in err and not (tmp_path / "tuned").exists()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = command(monkeypatch, capsys, "finetune", tmp_path / "recipe.yaml")
    assert code == 0 and "perplexity" in out, err
    text = write_card(tmp_path / "tuned").read_text()
    for first, file in (("**", "scores.model.json"), ("The model before Stage 2", "scores.before.json")):
        cells = row(text, first)
        assert f"(../{file})" in cells[1] and "n = 2" in cells[2] and f"(../{file})" in cells[2]
    scores = json.loads((tmp_path / "tuned/scores.model.json").read_text())
    assert scores["settings"]["samples"] == 2 and "torch" in scores["versions"] and scores["model"]["config_sha256"]


def test_settings_that_a_file_of_scores_does_not_have_are_left_out(run):
    task = {"accuracy": 0.5, "n": 4, "interval": [0.1, 0.9], "truncated": 0.0}
    settings = {"sampling": {"temperature": 0.0}, "seed": 3}  # of the small tasks with --compose
    scores = {"suite": "tasks-sliding-fused-64", "tasks": {"recall": task}, "settings": settings}
    (run / "scores.primed-tasks-sliding-fused-64.json").write_text(json.dumps(scores))
    text = write_card(run).read_text()
    assert "temperature 0, top-p 1, seed 3" in text and "None" not in text


@pytest.mark.parametrize("own", ["# Mine\n", "---\nlicense: mit\n---\n", "---\na: [\n---\n", b"\xff\xfe"])
def test_a_card_that_somebody_else_wrote_is_kept(run, own, monkeypatch, capsys):
    own = own if isinstance(own, bytes) else own.encode()
    card = run / "model/README.md"
    card.write_bytes(own)
    code, _, err = command(monkeypatch, capsys, "card", run)
    assert code == 2 and err.count("\n") == 1 and "--force" in err and card.read_bytes() == own
    assert push_files(run, "me/it")["README.md"] == card
    assert command(monkeypatch, capsys, "card", run, "--force")[0] == 0 and card.read_bytes() != own
    assert command(monkeypatch, capsys, "card", run / "model")[0] == 0  # our own is written again


def test_dry_run_names_files_and_sizes_and_changes_nothing(run, monkeypatch, capsys):
    before = sorted(run.rglob("*"))
    code, out, _ = command(monkeypatch, capsys, "push", run, "--repo", "me/it", "--dry-run")
    assert code == 0 and sorted(run.rglob("*")) == before and "nothing was uploaded" in out
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+) bytes  (.*)$", out, re.M)}
    files = push_files(run, "me/it")
    card = files["README.md"].decode()
    assert listed["README.md"] == len(files["README.md"])
    weights = (run / "model/model.safetensors").stat().st_size
    assert listed["model.safetensors"] == weights and listed.keys() == files.keys()
    assert {target for _, target in LINK.findall(card) if "://" not in target} <= files.keys()
    assert "vllm serve me/it" in card and str(run) not in card.partition("## Training data")[0]


@pytest.mark.parametrize("repo", ["it", "me/it/there", "me//it", "-me/it", "me/..", "../it", "src/hmf", "tests/"])
def test_what_is_no_repository_is_refused(run, repo, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, _, err = command(monkeypatch, capsys, "push", run, "--repo", repo, "--dry-run")
    assert code == 2 and err.count("\n") == 1 and "--repo" in err


def test_push_without_a_network_is_one_line(run, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, "push", run, "--repo", "me/it")
    assert code == 2 and err.count("\n") == 1 and "HF_HUB_OFFLINE" in err


def test_no_run_no_model_and_no_hybrid(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for name, source in (("fused", "stage0"), ("plain", "base")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(tiny / source)
    for name, message in (
        ("empty", "has no model"),
        ("fused", "holds the teacher"),
        ("plain", "is the config of a Transformer"),
    ):
        code, _, err = command(monkeypatch, capsys, "card", tmp_path / name)
        assert code == 2 and message in err and err.count("\n") == 1


def test_every_layer_type_has_a_name_and_its_paper_is_cited():
    text = citation(list(LAYER_KINDS.values()))
    papers = {kind.name: reference(kind) for kind in LAYER_KINDS.values()}
    assert [name for name, (_, paper) in papers.items() if paper is None] == ["swa"]
    assert all(f"@misc{{{name},\n" in text for name, (_, paper) in papers.items() if paper)


@given(st.integers(1, 10_000), st.data())
def test_the_interval_holds_the_values_at_which_the_score_test_is_at_its_limit(n, data):
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson(share, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=1e-6)


def test_push_sends_files_and_card_in_one_commit(run):
    """To a small server that answers as the Hub does; the library reads its environment once, so in a process."""
    received: dict[str, bytes] = {}
    asked: list[tuple[str, str]] = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, self.headers.get("Authorization")))
            home = f"http://{self.headers['Host']}/me/it"
            found: dict = {"url": home}
            if self.path.endswith("/preupload/main"):
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                found = {"files": [{"path": name, **modes} for name in names]}
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                found = {"commitUrl": f"{home}/commit/{'a' * 40}", "commitOid": "a" * 40}
            self.send_response(403 if b"theirs" in body or "theirs" in self.path else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = f"{{'README.md': b'card', 'results/a.yaml': Path({str(run / 'recipe.yaml')!r})}}"
    code = f"from pathlib import Path; from hmf import hub; print(hub.upload('me/it', {files}))"
    address = f"http://127.0.0.1:{server.server_port}"
    given = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
    denied = subprocess.run(
        [sys.executable, "-m", "hmf.cli", "push", run, "--repo", "theirs/it"],
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{address}/me/it"
    assert (
        denied.returncode == 2
        and denied.stderr.count("\n") == 1
        and "the Hub did not accept the upload" in denied.stderr
    )
    assert received == {"README.md": b"card", "results/a.yaml": (run / "recipe.yaml").read_bytes()}
    assert [path for path, _ in asked if path.endswith("/commit/main")] == ["/api/models/me/it/commit/main"]
    assert {token for _, token in asked} == {"Bearer hf_secret"}
