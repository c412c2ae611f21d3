# SPDX-License-Identifier: Apache-2.0
"""Models and data of the Hub by name, from a small server that answers as the Hub does."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch

from hmf import hub
from hmf.errors import HmfError
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_model
from tests.training.cutting import make_tiny_stage0

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


# Names of Qwen3's shards, of Qwen3.5's, and of shards that were converted from pickled ones.
SHARDS = ("model-1-of-2.safetensors", "model.safetensors-2-of-2.safetensors", "pytorch_model-1-of-2.safetensors")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(address, folder by repository and revision, requested paths) of a server."""
    root = tmp_path_factory.mktemp("hub")
    make_tiny_stage0(root)
    model = root / "base"
    for name, content in {
        "pytorch_model.bin": "pickle",
        "modeling_own.py": "import os",
        "README.md": "# card",
        "onnx/model.safetensors": "another",
        "consolidated.safetensors": "twice",
    }.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    data = root / "texts"
    for part in ("en/a.jsonl", "en/b.jsonl", "de/a.jsonl"):
        (data / part).parent.mkdir(parents=True, exist_ok=True)
        (data / part).write_text(json.dumps({"text": part}) + "\n")
    shards = root / "shards"
    shards.mkdir()
    for name in (*SHARDS, "model.fp16.safetensors"):
        (shards / name).write_text("weights")
    repositories = {
        "models/some-org/Tiny.1": model,
        "models/some-org/Shards": shards,
        "datasets/some-org/texts": data,
    }
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status=200, content=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = unquote(urlparse(self.path).path).strip("/")
            asked.append(path)
            if path.startswith("api/"):
                kind, owner, name, what, revision, *_ = path.removeprefix("api/").split("/")
                folder = repositories.get(f"{kind}/{owner}/{name}")
                if folder is None:
                    return self.answer(404, X_Error_Code="RepoNotFound")
                if revision not in (*COMMITS, *COMMITS.values()):
                    return self.answer(404, X_Error_Code="RevisionNotFound")
                files = [(str(file.relative_to(folder)), file) for file in sorted(folder.rglob("*")) if file.is_file()]
                if what == "revision":
                    found = {"id": f"{owner}/{name}", "sha": COMMITS[revision], "siblings": []}
                else:
                    found = [
                        {"type": "file", "path": name, "size": file.stat().st_size, "oid": digest(file)}
                        for name, file in files
                    ]
                return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
            kind = "datasets" if path.startswith("datasets/") else "models"
            owner, name, _, commit, file = path.removeprefix("datasets/").split("/", 4)
            content = (repositories[f"{kind}/{owner}/{name}"] / file).read_bytes()
            tag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    def digest(file):
        return hashlib.sha1(file.read_bytes()).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", model, asked
    server.shutdown()


def ask(code: str, served, cache: Path, **environment: str) -> str:
    """What a process prints that runs `code` in an empty folder; the library reads its environment once."""
    given = {"HF_ENDPOINT": served[0], "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code = f"""
import sys
from hmf import hub
from hmf.config.data import SourceSettings
from hmf.data.sources import Source
from hmf.errors import HmfError
from hmf.folders import resolve_base
try:
    print({code})
except HmfError as error:
    print(error)
assert "torch" not in sys.modules
"""
    (cache.parent / "empty").mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cache.parent / "empty",
        env=os.environ | given | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", None, False)),
        ("Qwen/Qwen3-8B@refs/pr/1", ("Qwen/Qwen3-8B", "refs/pr/1", False)),
        ("hf://Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", None, True)),
        (str(Path("hf://Qwen/Qwen3-8B@v1")), ("Qwen/Qwen3-8B", "v1", True)),  # a Path of it
        *((path, None) for path in ("model", "./a/b", "../a", "/a/b", "a/b/c", "a/b/", "~/b", "", "a b/c", "hf://a")),
    ],
)
def test_what_is_a_name_and_what_only_a_folder(text, expected):
    found = hub.parse_model(text)
    assert (found and (found.name, found.revision, found.explicit)) == expected


def test_a_model_comes_by_name_once_and_loads_as_its_folder_does(served, tmp_path):
    _, original, asked = served
    cache = tmp_path / "cache"
    small = Path(ask("resolve_base('some-org/Tiny.1', weights=False)", served, cache))
    assert (small / "config.json").is_file() and not list(small.rglob("*.safetensors"))
    assert "the Hub's cache holds only a part of it" in ask(
        "resolve_base('some-org/Tiny.1')", served, cache, HF_HUB_OFFLINE="1"
    )
    folder = Path(ask("resolve_base('some-org/Tiny.1')", served, cache))
    assert folder == small == cache / "models--some-org--Tiny.1/snapshots" / COMMITS["main"]
    kept = {path.name for path in original.iterdir()}
    left_out = {"pytorch_model.bin", "modeling_own.py", "README.md", "onnx", "consolidated.safetensors"}
    assert {path.name for path in folder.iterdir()} == kept - left_out
    there = load_model(folder).state_dict()
    for name, tensor in load_model(original).state_dict().items():
        assert torch.equal(tensor, there[name])
    asked.clear()
    assert ask("resolve_base('some-org/Tiny.1')", served, cache, HF_HUB_OFFLINE="1") == str(folder) and not asked
    assert ask("resolve_base('some-org/Tiny.1')", served, cache) == str(folder)
    assert not [path for path in asked if "resolve" in path]
    shards = "*sorted(path.name for path in resolve_base('some-org/Shards').iterdir())"
    found = ask(f"resolve_base('hf://some-org/Tiny.1@v1').name, {shards}", served, cache)
    assert found == " ".join((COMMITS["v1"], *SHARDS))


def test_what_the_hub_does_not_have_is_one_line_that_says_both(served, tmp_path):
    cache = tmp_path / "cache"
    for code, line in (
        ("resolve_base('nobody/nothing')", "nobody/nothing: no such directory, and no model on the Hub has that name"),
        ("resolve_base('some-org/Tiny.1@v2')", "some-org/Tiny.1@v2: the model has no revision 'v2'"),
        ("hub.data_path('path', 'hf://datasets/nobody/x')", "nobody/x: no dataset on the Hub has that name"),
        ("hub.data_path('path', 'hf://some-org/texts')", "path: hf://some-org/texts: write hf://datasets/OWNER/NAME"),
    ):
        found = ask(code, served, cache)
        assert found.startswith(line) and "\n" not in found
    line = ask("resolve_base('some-org/Tiny.1')", served, cache, HF_ENDPOINT="http://127.0.0.1:9")
    assert "no such directory, and not in the Hub's cache (the Hub cannot be reached: " in line and "\n" not in line
    line = ask("resolve_base('some-org/Tiny.1')", served, cache, HF_HUB_OFFLINE="1")
    assert "no such directory, and not in the Hub's cache (HF_HUB_OFFLINE is set); correct the name" in line


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, fix in (
        ("mine/mistyped", "correct the name, or write hf://mine/mistyped for a model of the Hub"),
        ("models/Qwen3-8B", "download the model: hf download OWNER/Qwen3-8B --local-dir models/Qwen3-8B"),
        ("models/Qwen/Qwen3-8B", "download the model: hf download OWNER/Qwen3-8B --local-dir models/Qwen/Qwen3-8B"),
        ("runs/stage0", "first run the command or the recipe that writes it"),
        ("runs/sft/model", "first run the command or the recipe that writes it"),
    ):
        with pytest.raises(HmfError) as error:
            resolve_base(name)
        assert str(error.value) == f"{name}: no such directory; {fix}"
    (tmp_path / "some-org/Tiny.1").mkdir(parents=True)
    assert resolve_base("some-org/Tiny.1") == Path("some-org/Tiny.1")  # a folder that is there goes first


def test_files_of_a_data_set_come_by_a_pattern(served, tmp_path):
    cache = tmp_path / "cache"
    code = "[record.where for path in {} for record in Source(SourceSettings(path=path)).records()]"
    read = {
        "hf://datasets/some-org/texts/en/*.jsonl": ["a.jsonl:1", "b.jsonl:1"],
        "hf://datasets/some-org/texts@v1/de": ["a.jsonl:1"],
        "hf://datasets/some-org/texts/en/b.jsonl": ["b.jsonl:1"],
        "hf://datasets/some-org/texts/**/a.jsonl": ["de/a.jsonl:1", "en/a.jsonl:1"],
        "hf://datasets/some-org/texts": ["de/a.jsonl:1", "en/a.jsonl:1", "en/b.jsonl:1"],
    }
    places = ast.literal_eval(ask(code.format(list(read)), served, cache))
    assert places == [place for expected in read.values() for place in expected]
    again = ask(code.format(list(read)[:1]), served, cache, HF_HUB_OFFLINE="1")
    assert ast.literal_eval(again) == ["a.jsonl:1", "b.jsonl:1"]
