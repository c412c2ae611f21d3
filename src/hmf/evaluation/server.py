# SPDX-License-Identifier: Apache-2.0
"""Answers and log-probabilities from an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from hmf.errors import HmfError
from hmf.evaluation.local import Sampling
from hmf.evaluation.prompts import THINK_END, THINK_START, Answer, Prompt

Endpoint = Literal["completions", "chat"]
RETRIES = 5  # retries of a request without an answer, or one that the server was too busy for
SECONDS = 3600.0  # timeout for one answer; a long prompt on a busy server takes many minutes


def server_root(url: str) -> str:
    """The address of a server without "/v1". HmfError for an address without http:// or https://."""
    if not url.startswith(("http://", "https://")):
        raise HmfError(
            f"--url: {url!r} does not start with http:// or https://; write for example http://localhost:8000"
        )
    return url.rstrip("/").removesuffix("/v1")


def api_key() -> str | None:
    """The key for a server, from the environment."""
    return os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")


def served_name(source: str | Path, url: str, names: Sequence[str]) -> str:
    """The name of `source` among those of the models at `url`, or the only name. HmfError if there are only others."""
    if str(source) not in names and len(names) != 1:
        raise HmfError(f"--url: {url} does not serve {source}; it serves {', '.join(names) or 'nothing'}")
    return str(source) if str(source) in names else names[0]


class NotOffered(HmfError):
    """The server does not return log-probabilities of prompts."""


class Server:
    """A server at `url` that serves `source`, or that serves only one model, under any name.

    Attributes:
        name: the model's name on the server.
        context: the model's context length in tokens, or None if the server does not report it.
    Raises:
        HmfError: no server answers, it serves other models, or the openai client is missing.
    """

    def __init__(self, url: str, source: str | Path, endpoint: Endpoint, sampling: Sampling, concurrency: int):
        try:
            import openai
        except ImportError:
            raise HmfError("--url: needs the openai client; pip install openai") from None
        self._openai = openai
        self.url, self.endpoint, self.sampling, self.concurrency = url, endpoint, sampling, concurrency
        self.client = openai.OpenAI(
            base_url=f"{server_root(url)}/v1", api_key=api_key() or "none", max_retries=RETRIES, timeout=SECONDS
        )
        try:
            served = list(self.client.with_options(max_retries=0, timeout=30.0).models.list())
        except openai.OpenAIError as error:
            raise self._error(error, "is the server up? `hmf serve DIR` starts one") from None
        self.name = served_name(source, url, [model.id for model in served])
        chosen = next(model for model in served if model.id == self.name)
        self.context: int | None = getattr(chosen, "max_model_len", None)

    def version(self) -> str | None:
        """The version of vLLM, or None if the server is not vLLM."""
        place = f"{server_root(self.url)}/version"
        with suppress(OSError, ValueError), urllib.request.urlopen(place, timeout=10) as answer:
            content = json.load(answer)
            return str(content["version"]) if isinstance(content, dict) and "version" in content else None
        return None

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Answer, float | None]]:
        """Yield prompts with their answers in the order in which answers arrive. Likelihoods are None."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            waiting = {pool.submit(self._answer, prompt): prompt for prompt in prompts}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result(), None
            finally:
                for future in waiting:
                    future.cancel()

    def _answer(self, prompt: Prompt) -> Answer:
        request: dict[str, Any] = {
            "model": self.name,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
        }
        extra: dict[str, Any] = {"skip_special_tokens": False}
        if self.sampling.drawn:
            request["seed"] = self.sampling.seed + prompt.index
            extra["top_k"] = 0  # sample from all tokens, even if the model's generation config sets top_k
        if prompt.stop:
            request["stop"] = [prompt.stop]
        if self.endpoint == "chat":
            return self._chat_answer(prompt, request)
        made = self._request(
            self.client.completions.create, prompt=prompt.ids, max_tokens=prompt.limit, extra_body=extra, **request
        )
        choice = self._choice(made)
        used = made.usage.completion_tokens if made.usage else 0
        return Answer(choice.text or "", choice.finish_reason == "length", used)

    def _chat_answer(self, prompt: Prompt, request: dict[str, Any]) -> Answer:
        extra: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": prompt.thinking}}
        if self.sampling.drawn:
            extra["top_k"] = 0
        if prompt.tools:
            request["tools"] = prompt.tools
        made = self._request(
            self.client.chat.completions.create,
            messages=prompt.messages,
            max_tokens=prompt.limit,
            extra_body=extra,
            **request,
        )
        choice = self._choice(made)
        message = choice.message
        thought = getattr(message, "reasoning", None) or getattr(message, "reasoning_content", None)
        parts = [f"{THINK_START}{thought}{THINK_END}"] if thought else []
        parts += [message.content] if message.content else []
        for call in message.tool_calls or ():
            try:
                arguments = json.loads(call.function.arguments)
            except (ValueError, RecursionError):
                arguments = call.function.arguments
            body = json.dumps({"name": call.function.name, "arguments": arguments})
            parts.append(f"<tool_call>\n{body}\n</tool_call>")
        used = made.usage.completion_tokens if made.usage else 0
        return Answer("\n".join(parts), choice.finish_reason == "length", used)

    def _choice(self, made: Any) -> Any:
        if not made.choices:
            raise HmfError(f"--url: {self.url}: the answer holds no choices; is it an OpenAI-compatible server?")
        return made.choices[0]

    def token_log_probabilities(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of each token except the first, given the tokens before it.

        Raises NotOffered if the server does not return log-probabilities of prompts.
        """
        by_position = self.scored(ids, top_k=0, generate=1)[0]
        return [candidates[token] for candidates, token in zip(by_position, ids[1:], strict=True)]

    def scored(
        self, ids: Sequence[int], top_k: int, generate: int
    ) -> tuple[list[dict[int, float]], list[int], list[dict[int, float]]]:
        """Log-probabilities for a prompt and for tokens that the server generates greedily after it.

        Returns:
            For each token of the prompt except the first: log-probabilities, by token, of it and of the `top_k`
            likeliest tokens. Then the generated tokens, and their log-probabilities in the same form; both are empty
            if `top_k` is 0.
        Raises:
            NotOffered: the server does not support vLLM's `prompt_logprobs`.
        """
        made = self._request(
            self.client.completions.create,
            model=self.name,
            prompt=list(ids),
            max_tokens=generate,
            temperature=0.0,
            logprobs=top_k or None,
            extra_body={"prompt_logprobs": top_k, "return_tokens_as_token_ids": True, "ignore_eos": True},
        )
        choice = self._choice(made)
        prompt = getattr(choice, "prompt_logprobs", None)
        missing = NotOffered(f"{self.url} does not return log-probabilities of prompts (vLLM's prompt_logprobs)")
        if not isinstance(prompt, list) or len(prompt) != len(ids):
            raise missing
        try:
            before = [{int(token): float(one["logprob"]) for token, one in each.items()} for each in prompt[1:]]
            if not top_k:
                return before, [], []
            tops = choice.logprobs.top_logprobs
            generated = [_token(name) for name in choice.logprobs.tokens]
            after = [{_token(name): float(value) for name, value in each.items()} for each in tops]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise missing from None
        return before, generated, after

    def _request(self, call: Any, **arguments: Any) -> Any:
        try:
            return call(**arguments)
        except self._openai.OpenAIError as error:
            raise self._error(error, "answers so far are kept; repeat the command to continue") from None

    def _error(self, error: Exception, hint: str) -> HmfError:
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            hint = "set VLLM_API_KEY to the server's key"
        elif status == 404 and self.endpoint == "completions":
            hint = "if it has no /v1/completions, give --endpoint chat"
        what = " ".join(str(error).split()).rstrip(".")
        return HmfError(f"--url: {self.url}: {what:.300}; {hint}")


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))
