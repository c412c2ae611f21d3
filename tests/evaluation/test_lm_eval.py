# SPDX-License-Identifier: Apache-2.0
"""The real lm-eval, on stand-ins of its tasks' formats: on a Hybrid here, and against a server."""

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from hmf.cli import main
from hmf.config.strict import parse_sealed
from hmf.folders import ASSETS
from hmf.priming.export import export
from tests.training.cutting import make_tiny_stage0

pytest.importorskip("lm_eval", reason="needs lm-eval, which `make test` installs")
from hmf.evaluation.lm_eval_suites import SUITES

TEACHER = ASSETS / "teacher"
QUESTIONS = [{"question": f"What is {i} + {i}?" + " Now." * i, "answer": str(2 * i)} for i in range(7)]
CHOICES = [
    {"question": f"Is {i} even?" + " Now." * (i % 4), "choices": ["yes", "no"], "label": i % 2} for i in range(9)
]
RULER = """
def process_results(doc, results):
    return {"4096": -1.0, str(doc["max_length"]): float(doc["answer"] in results[0])}

def mean(values):
    kept = [value for value in values if value != -1]
    return sum(kept) / len(kept) if kept else -1
"""


def task(folder, name, rows, **keys):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **keys,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content).replace("'!function", "!function").replace("$'", ""))


def generated(folder, name, **keys):
    mean = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    task(
        folder,
        name,
        QUESTIONS,
        **{
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
            "metric_list": [mean],
            "filter_list": [
                {"name": "strict-match", "filter": [{"function": "take_first"}]},
                {
                    "name": "flexible-extract",
                    "filter": [
                        {"function": "regex", "group_select": -1, "regex_pattern": r"(\d+)"},
                        {"function": "take_first"},
                    ],
                },
            ],
            **keys,
        },
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Stand-ins: likelihoods of choices, generated answers, a group of both, and the suites' names."""
    folder = tmp_path_factory.mktemp("tasks")
    acc = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task(
        folder,
        "choice",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{label}}",
        metric_list=acc,
    )
    task(
        folder,
        "missing",
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        dataset_path="no/such",
        doc_to_choice="{{choices}}",
        doc_to_target="{{label}}",
        metric_list=acc,
        dataset_kwargs={},
    )
    for name in ("sums", *SUITES["reasoning"].tasks):
        generated(folder, name)
    (folder / "rules.py").write_text(RULER)
    rows = [row | {"max_length": length} for length in (4096, 8192) for row in QUESTIONS[:4]]
    lengths = [
        {"metric": n, "aggregation": "!function rules.mean$", "higher_is_better": True} for n in ("4096", "8192")
    ]
    task(
        folder,
        "needles",
        rows,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        process_results="!function rules.process_results$",
        metric_list=lengths,
    )
    mean = [{"metric": "acc", "weight_by_size": True}]
    for name, parts in (("both", ["choice", "sums"]), ("ruler", ["needles"])):
        group = {"group": name, "task": parts, "aggregate_metric_list": mean if name == "both" else []}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    export(make_tiny_stage0(folder), folder / "model")
    return folder / "model"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    # Asks the machine's tools for seconds, for each task.
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


@pytest.fixture
def run(tmp_path, tasks, monkeypatch, capsys):
    """Runs `hmf harness lm-eval MODEL OPTIONS`; gives the exit code, the scores or None, and what was printed."""

    def call(model, chosen, *options, name="primed"):
        words = [
            "hmf",
            "harness",
            "lm-eval",
            model,
            "--tasks",
            chosen,
            "--run",
            tmp_path,
            "--name",
            name,
            "--task-folder",
            tasks,
            *options,
        ]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stop:
            main()
        file = max(tmp_path.glob(f"scores.{name}-*.json"), default=None)
        captured = capsys.readouterr()
        return stop.value.code or 0, file and parse_sealed(file.read_text()), captured.out + captured.err

    return call


def test_a_hybrid_is_scored_alike_in_any_batch_and_its_truncated_answers_are_counted(run, hybrid, tmp_path):
    code, scores, out = run(hybrid, "both", "--batch-size", "1", "--seed", "5", name="one")
    assert code == 0, out
    _, batched, _ = run(hybrid, "both", "--batch-size", "4", "--seed", "5", name="many")
    rows = scores["tasks"]
    assert rows.keys() == {"choice", "sums", "both"}
    for key, row in batched["tasks"].items():
        assert {**row, "source": ""} == {**rows[key], "source": ""}  # padded on the left, and not: the same
    source = rows["sums"]["source"]
    file = json.loads((tmp_path / source).read_text())
    assert rows["choice"]["n"] == 9 and rows["choice"]["accuracy"] == file["results"]["choice"]["acc,none"]
    assert rows["choice"]["stderr"] == file["results"]["choice"]["acc_stderr,none"]
    assert rows["choice"]["truncated"] is None and 0 < rows["sums"]["truncated"] <= 1
    assert (rows["sums"]["metric"], rows["sums"]["filter"]) == ("exact_match", "strict-match")
    settings = scores["settings"][source]
    assert settings["torch_seed"] == settings["fewshot_seed"] == 5 and settings["checkpoint"] == str(hybrid)
    assert scores["versions"].keys() == {"lm_eval", "transformers"}


def test_an_answer_that_ends_by_itself_or_at_a_stop_is_not_truncated(run):
    # One token of any kind ends at the most allowed; with 100, the embedded teacher ends its turn.
    _, short, out = run(TEACHER, "sums", "--max-new-tokens", "1", "--chat-template", "--no-thinking", name="short")
    assert short["tasks"]["sums"]["truncated"] == 1.0, out
    _, long, _ = run(TEACHER, "sums", "--max-new-tokens", "100", "--chat-template", "--no-thinking", name="long")
    assert long["tasks"]["sums"]["truncated"] < 1.0


def test_a_suite_runs_task_by_task_and_lengths_are_rows(run, tmp_path):
    code, scores, out = run(TEACHER, "reasoning", "--max-new-tokens", "5")
    assert code == 0 and scores["tasks"].keys() == set(SUITES["reasoning"].tasks), out
    assert (tmp_path / "scores.primed-lm-eval-reasoning.json").is_file() and len(scores["settings"]) == 6
    row = scores["tasks"]["gsm8k_cot_zeroshot"]
    settings = scores["settings"][row["source"]]
    assert row["filter"] == "flexible-extract" and settings["chat_template_applied"] and settings["thinking"]
    assert settings["gen_kwargs"] == {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_gen_toks": 5,
        "until": [],
    }
    _, scores, out = run(TEACHER, "long", "--lengths", "4K,8K", "--max-new-tokens", "5", name="teacher")
    rows = scores["tasks"]
    assert {key: (row["n"], row["length"]) for key, row in rows.items()} == {
        "needles@4096": (4, 4096),
        "needles@8192": (4, 8192),
    }, out


class Server(BaseHTTPRequestHandler):
    """Completions of "2 4", with likelihoods that fall with a token's number; every second answer is cut off."""

    def do_GET(self):
        self.reply({"data": [{"id": "served", "max_model_len": 100}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        ended = "length" if len(self.server.seen) % 2 else "stop"
        if self.path.endswith("/chat/completions"):
            message = {"content": "2 4"}
            return self.reply({"choices": [{"index": 0, "message": message, "finish_reason": ended}]})
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for index, ids in enumerate(prompts):
            scores = [-math.log(2 + token) for token in ids] + [0.0]
            tops = [{"x": score} for score in scores]
            logprobs = {"token_logprobs": scores, "top_logprobs": tops} if body.get("echo") else None
            choices.append({"index": index, "text": "2 4", "finish_reason": ended, "logprobs": logprobs})
        return self.reply({"choices": choices})

    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.seen = []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        found.url = f"http://127.0.0.1:{found.server_port}"
        yield found
        found.shutdown()


def test_a_server_is_asked_by_chat_or_by_completions(run, server, tmp_path):
    code, scores, out = run(
        TEACHER, "sums", "--url", server.url, "--chat-template", "--no-thinking", "--temperature", "0.5"
    )
    assert code == 0, out
    row = scores["tasks"]["sums"]
    assert (row["accuracy"], row["others"]) == (0.0, {"exact_match,flexible-extract": pytest.approx(1 / 7)})
    assert row["truncated"] == pytest.approx(4 / 7)
    path, key, body = server.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer a-secret"
    assert body["model"] == "served" and body["temperature"] == 0.5 and body["max_tokens"] == 6
    assert body["chat_template_kwargs"] == {"enable_thinking": False} and body["messages"][0]["role"] == "user"
    assert all("a-secret" not in file.read_text() for file in tmp_path.glob("*.json"))

    _, scores, out = run(TEACHER, "both", "--url", f"{server.url}/v1", "--batch-size", "2", name="teacher")
    assert scores["tasks"]["choice"]["n"] == 9 and scores["tasks"]["sums"]["truncated"] is not None, out
    assert {path for path, _, body in server.seen if "messages" not in body} == {"/v1/completions"}


def test_what_cannot_be_asked_is_refused_in_one_line(run, server, hybrid, tmp_path):
    server_options = ("--url", server.url)
    for model, chosen, options, message in (
        (TEACHER, "chice", (), "unknown task 'chice'; did you mean 'choice'?"),
        (TEACHER, "short", (), "unknown task 'arc_easy'"),  # the folder has no such stand-in
        (TEACHER, "missing", (), "--tasks: missing: lm-eval stopped: "),
        (
            TEACHER,
            "choice",
            (*server_options, "--chat-template"),
            "compares likelihoods, which chat completions do not",
        ),
        (TEACHER, "sums", (*server_options, "--max-new-tokens", "99"), "do not fit into the model's 99"),
        (TEACHER, "choice", (*server_options, "--shots", "8"), "--tasks: choice: a prompt of 120 tokens"),
        (hybrid, "sums", ("--max-new-tokens", "1M"), "and an answer of 1048576 do not fit into the model's 128"),
        (TEACHER, "long", ("--lengths", "4K,5K"), "--lengths: 5120: RULER's tasks have 4096, "),
        (TEACHER, "long", ("--lengths", "4K,8K", "--limit", "1"), "--limit: selects the first prompts"),
        (TEACHER, "sums", ("--url", "http://127.0.0.1:9"), "is the server up?"),
    ):
        code, scores, out = run(model, chosen, *options)
        lines = [line for line in out.splitlines() if line.startswith("hmf: ")]
        assert code == 2 and scores is None and len(lines) == 1 and message in lines[0], (chosen, options, out)
        assert "Traceback" not in out
    code, scores, out = run(TEACHER, "sums,missing")
    assert code == 2 and scores["tasks"].keys() == {"sums"} and "; the tasks before it are in" in out


@pytest.mark.slow
def test_the_suites_are_tasks_of_lm_eval():
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert [task for suite in SUITES.values() for task in suite.tasks if task not in known] == []
