# SPDX-License-Identifier: Apache-2.0
"""Suites against an OpenAI-compatible server: a small one that answers with the model itself, and can be made to fail.

It speaks as vLLM does where log-probabilities are asked for.
"""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from hmf.config.strict import parse_sealed
from hmf.errors import HmfError
from hmf.evaluation import server as client
from hmf.evaluation.parity import divergence
from hmf.evaluation.prompts import Prompter
from hmf.evaluation.results import read_answers
from hmf.evaluation.retention import TASKS
from hmf.model.checkpoint import load_model
from hmf.report.card import write_card
from hmf.serving.chat import ServerChat


class Stub:
    """Greedy answers of `model`. `fails` gives a status in place of an answer; `logprobs`: whether it offers them."""

    def __init__(self, model, tokenizer, name):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.requests: list[dict] = []
        self.fails = lambda request: None
        self.logprobs = True
        self.lock, self.at_once = threading.Lock(), Counter()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                found = {"id": stub.name, "object": "model", "max_model_len": 1500}
                self.reply(200, {"object": "list", "data": [found]} if "models" in self.path else {"version": "1.2.3"})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    stub.at_once["now"] += 1
                    stub.at_once["most"] = max(stub.at_once["most"], stub.at_once["now"])
                    stub.requests.append({"path": self.path, **request})
                time.sleep(0.05)
                status = stub.fails(request)
                with stub.lock:
                    stub.at_once["now"] -= 1
                    answer = {"error": {"message": f"status {status}"}} if status else stub.answer(self.path, request)
                self.reply(status or 200, answer)

            def reply(self, status, content):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @torch.inference_mode()
    def answer(self, path, request):
        if "chat" in path:
            text = self.tokenizer.apply_chat_template(
                request["messages"],
                request.get("tools"),
                tokenize=False,
                add_generation_prompt=True,
                **request["chat_template_kwargs"],
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = request["prompt"]
        end = None if request.get("ignore_eos") else self.tokenizer.eos_token_id
        row = torch.tensor([ids])
        made = self.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=request["max_tokens"],
            do_sample=False,
            eos_token_id=end,
            pad_token_id=self.tokenizer.pad_token_id,
        )[0, len(ids) :].tolist()
        finish = "stop" if end in made else "length"
        text = self.tokenizer.decode([token for token in made if token != end])
        choice = {"index": 0, "finish_reason": finish, "text": text}
        if "chat" in path:
            choice["message"] = {"role": "assistant", "content": text}
        if "prompt_logprobs" in request and self.logprobs:
            logits = self.model(torch.tensor([[*ids, *made]])).logits[0].log_softmax(-1)
            tops = [self.top(each, request["prompt_logprobs"]) for each in logits]
            before = [
                {str(token): {"logprob": value} for token, value in ({given: float(row[given])} | top).items()}
                for row, top, given in zip(logits, tops, ids[1:], strict=False)
            ]
            choice["prompt_logprobs"] = [None, *before]
            after = tops[len(ids) - 1 : -1]
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in made],
                "top_logprobs": [{f"token_id:{token}": value for token, value in top.items()} for top in after],
            }
        usage = {"completion_tokens": len(made), "prompt_tokens": len(ids), "total_tokens": len(ids) + len(made)}
        return {
            "id": "1",
            "object": "text_completion",
            "created": 0,
            "model": self.name,
            "choices": [choice],
            "usage": usage,
        }

    def top(self, row, count):
        values, tokens = row.topk(max(1, count))
        return dict(zip(tokens.tolist(), values.tolist(), strict=True))


@pytest.fixture
def stub(tiny, tokenizer):
    model = load_model(tiny / "hybrid", dtype=torch.float32).eval()
    server = Stub(model, tokenizer, "our-model")
    yield server
    server.http.shutdown()


@pytest.fixture
def served(stub, monkeypatch):
    monkeypatch.setattr(client, "RETRIES", 2)
    return stub


def test_answers_are_those_of_the_model_here(run, served, evaluated):
    arguments = (run / "model", "--tasks", "needle_single,tool_schema,instructions", "--lengths", "512")
    here = evaluated(*arguments)[str(run / "model")]
    there = evaluated(*arguments, "--url", served.url)[str(run / "model")]
    assert there["versions"]["vllm"] == "1.2.3" and there["settings"]["url"] == served.url
    for key, task in here["tasks"].items():
        assert there["tasks"][key] == task | {"likelihood": None}
        local, remote = (
            read_answers(run / f"evaluation/{name}-retention/{key}.jsonl") for name in ("primed", "primed-server")
        )
        assert [one.model_copy(update={"likelihood": None}) for one in local] == remote
    assert served.at_once["most"] > 1
    assert all(request["model"] == "our-model" and request["temperature"] == 0 for request in served.requests)


def test_chat_gets_the_same_messages(run, served, evaluated):
    arguments = (run / "model", "--tasks", "needle_single,tool_schema", "--lengths", "512", "--url", served.url)
    one = evaluated(*arguments)[str(run / "model")]["tasks"]
    two = evaluated(*arguments, "--endpoint", "chat", "--name", "chat")[str(run / "model")]["tasks"]
    assert one == two and {request["path"] for request in served.requests} == {
        "/v1/completions",
        "/v1/chat/completions",
    }


def test_reasoning_and_calls_that_the_server_has_parsed_are_read(run, served, evaluated, tokenizer, monkeypatch):
    asked = Prompter(tokenizer, 0, True, 8, 2048, "it has").prompts(TASKS["tool_schema"], None, 3)
    calls = {
        one.messages[0]["content"]: json.loads(one.problem.answer[len("<tool_call>") : -len("</tool_call>")])
        for one in asked
    }

    def parsed(path, request):
        call = calls[request["messages"][0]["content"]]
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        message = {
            "role": "assistant",
            "content": None,
            "reasoning": "I call it.",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        }
        choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": served.name, "choices": [choice]}

    monkeypatch.setattr(served, "answer", parsed)
    found = evaluated(run / "model", "--tasks", "tool_schema", "--url", served.url, "--endpoint", "chat")
    assert found[str(run / "model")]["tasks"]["tool_schema"]["accuracy"] == 1


def test_parity_passes_for_the_same_model_and_not_for_another(run, served, evaluated, hmf):
    arguments = ("evaluate", run / "model", "--lengths", "512", "--max-new-tokens", 8, "--url", served.url, "--parity")
    code, out, err = hmf(*arguments)
    assert code == 0 and "parity of Hugging Face and the server: passed" in out, err
    scores = parse_sealed((run / "scores.primed-server-retention.json").read_text())
    found = scores["parity"]
    assert found["passed"] and found["bound"] == 0.01 and found["generated_tokens"] == 8 * 32
    assert found["max_kl"] < 1e-4 and found["same_likeliest"] == 1
    code, out, err = hmf(*arguments, "--parity-bound", 0)  # the least bound: only equal numbers pass
    assert (
        code == (0 if found["prompt_kl"] == found["generated_kl"] == 0 else 1) and "bound of both means 0 nats" in out
    )
    with torch.no_grad():
        served.model.lm_head.weight.mul_(1.5)
    code, out, err = hmf(*arguments)
    assert code == 1 and "server: NOT passed" in out, err
    assert err.splitlines()[-1].startswith(f"hmf: {run / 'model'}: parity with {served.url} is not passed; ")
    found = parse_sealed((run / "scores.primed-server-retention.json").read_text())["parity"]
    assert not found["passed"] and found["prompt_kl"] > 0.01 < found["generated_kl"]
    assert "NOT passed. KL divergence per token" in write_card(run).read_text()


def test_without_log_probabilities_it_is_not_measured_by_name(run, served, evaluated, hmf):
    arguments = (run / "model", "--tasks", "perplexity", "--lengths", "512")
    here = evaluated(*arguments)[str(run / "model")]["positions"]
    there = evaluated(*arguments, "--url", served.url)[str(run / "model")]["positions"]
    assert [place["perplexity"] for place in there] == pytest.approx([place["perplexity"] for place in here], rel=1e-3)
    served.logprobs = False
    found = evaluated(*arguments, "--url", served.url, "--name", "other")[str(run / "model")]
    assert "not return log-probabilities of prompts" in found["not_measured"]["perplexity"] and "positions" not in found
    code, _, err = hmf(
        "evaluate", run / "model", "--url", served.url, "--parity", "--lengths", "512", "--max-new-tokens", 8
    )
    assert code == 2 and "not return log-probabilities of prompts" in err and err.count("\n") == 1


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_named(run, served, evaluated, hmf):
    arguments = (run / "model", "--tasks", "instructions", "--url", served.url)
    seen = Counter()

    def busy(request):
        seen[str(request["prompt"])] += 1
        return 503 if seen[str(request["prompt"])] == 1 else None

    served.fails = busy
    assert evaluated(*arguments)[str(run / "model")]["tasks"]["instructions"]["n"] == 3
    command = ("evaluate", *arguments, "--suite", "retention", "--max-new-tokens", 8, "--samples", 6)
    for status, said in ((400, "status 400"), (401, "VLLM_API_KEY"), (404, "--endpoint chat")):
        served.fails = lambda request, status=status: status
        code, _, err = hmf(*command)
        lines = err.splitlines()
        assert code == 2 and served.url in lines[-1] and said in lines[-1] and len(lines) == 1
    # What had been answered is not asked again.
    served.fails = lambda request: None
    served.requests.clear()
    evaluated(*arguments, "--samples", 6)
    assert len(served.requests) == 3


def test_chat_gives_the_fix_that_fits_the_servers_error(stub):
    chat = ServerChat("our-model", stub.url)
    for status, said in ((400, "status 400$"), (401, "set VLLM_API_KEY to the server's key$")):
        stub.fails = lambda request, status=status: status
        with pytest.raises(HmfError, match=said):
            list(chat.answer("Hi"))
    stub.http.shutdown()
    stub.http.server_close()
    with pytest.raises(HmfError, match="check that the server is running"):
        list(chat.answer("Hi"))


def test_a_server_that_is_away_and_a_length_beyond_its_own(tiny, served, hmf):
    code, _, err = hmf("evaluate", tiny / "base", "--suite", "retention", "--url", "http://127.0.0.1:9")
    assert code == 2 and "http://127.0.0.1:9" in err and "is the server up?" in err and err.count("\n") == 1
    code, _, err = hmf("evaluate", tiny / "base", "--suite", "retention", "--url", served.url, "--lengths", "2K")
    assert code == 2 and "2,048 tokens exceed the 1,500 that the server at" in err


def test_divergence_is_kullback_and_leiblers_over_the_candidates_and_the_rest():
    reference = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64).log()
    theirs = {0: torch.tensor(0.4).log().item(), 1: torch.tensor(0.4).log().item()}
    wanted = sum(p * torch.log(torch.tensor(p / q)).item() for p, q in ((0.5, 0.4), (0.3, 0.4), (0.2, 0.2)))
    assert divergence(reference, theirs) == pytest.approx(wanted, rel=1e-5)
    assert divergence(reference, {0: reference[0].item(), 1: reference[1].item()}) == pytest.approx(0, abs=1e-12)
