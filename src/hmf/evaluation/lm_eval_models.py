# SPDX-License-Identifier: Apache-2.0
"""Subclasses of lm-eval's models that count truncated answers and refuse prompts which lm-eval would shorten."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, listed
from hmf.evaluation.generation import generating
from hmf.evaluation.lm_eval_suites import Options
from hmf.evaluation.prompts import THINK_END
from hmf.evaluation.run import load_for_evaluation
from hmf.evaluation.server import api_key, served_name, server_root
from hmf.model.checkpoint import load_config

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the names used by tasks
DEFAULT_LIMIT = 256  # lm-eval's limit for tasks that have none
SECONDS = 3600  # timeout for one answer; a long answer from a busy server takes many minutes


def here(source: Path, chat: bool, options: Options) -> LocalModel:
    """The checkpoint at `source`, loaded in the same way as by `hmf evaluate`."""
    tokenizer = load_tokenizer(source)
    if chat and not tokenizer.chat_template:
        raise HmfError(f"{source}: the tokenizer has no chat template; --no-chat-template asks without one")
    model = load_for_evaluation(source, options.device, options.dtype).eval()
    return LocalModel(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        chat_template_args={"enable_thinking": options.thinking} if chat else None,
        think_end_token=THINK_END if chat and options.thinking else None,
    )


def served(source: Path, url: str, chat: bool, options: Options) -> ServedModel:
    """The model of the server at `url`, with the tokenizer and the context length of the checkpoint at `source`."""
    base = f"{server_root(url)}/v1"
    header = {"Authorization": f"Bearer {key}"} if (key := api_key()) else {}
    models = _models_at(url, base, header)
    name = served_name(source, url, [*models])
    tokenizer = load_tokenizer(source)
    common: dict[str, Any] = {
        "model": name,
        "num_concurrent": options.concurrency,
        "seed": options.seed,
        "timeout": SECONDS,
        "header": header | {"Content-Type": "application/json"},
        "eos_string": tokenizer.eos_token,
        "max_length": models[name] or load_config(source).max_position_embeddings,
    }
    if chat:
        end = THINK_END if options.thinking else None
        return ChatServer(options.thinking, base_url=f"{base}/chat/completions", think_end_token=end, **common)
    return CompletionsServer(
        base_url=f"{base}/completions",
        tokenizer=str(source),
        tokenizer_backend="huggingface",
        batch_size=options.batch_size,
        **common,
    )


def _models_at(url: str, base: str, header: dict[str, str]) -> dict[str, int | None]:
    """The names of the server's models, each with its context length in tokens if the server reports it."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{base}/models", headers=header), timeout=30) as answer:
            return {str(model["id"]): model.get("max_model_len") for model in json.load(answer)["data"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise HmfError(f"--url: {url}: {why}; is the server up? `hmf serve DIR` starts one") from None


class _Counted:
    """Counts, for each task, the requested answers and those truncated at the token limit."""

    asked: Counter[str]
    cut: Counter[str]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.asked, self.cut, self._task = Counter(), Counter(), ""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate for one task at a time, so that counts belong to that task."""
        answers = [""] * len(requests)
        for task in dict.fromkeys(request.task_name for request in requests):
            places = [index for index, request in enumerate(requests) if request.task_name == task]
            self._task = task
            self.asked[task] += len(places)
            self.cut[task] += 0
            for index in places:
                self._require_room(requests[index])
            made = super().generate_until([requests[index] for index in places], disable_tqdm)  # type: ignore[misc]
            for index, answer in zip(places, made, strict=True):
                answers[index] = answer
        return answers

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> Any:
        self._task = listed(dict.fromkeys(request.task_name for request in requests))
        return super().loglikelihood(requests, **kwargs)  # type: ignore[misc]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> Any:
        for _, context, continuation in requests:
            if len(context) + len(continuation) > self.max_length + 1:  # type: ignore[attr-defined]
                self._refuse(len(context), len(continuation))
        return super()._loglikelihood_tokens(requests, **kwargs)  # type: ignore[misc]

    def _require_room(self, request: Any) -> None:
        prompt, settings = request.args[:2]
        limit = next((settings[name] for name in LIMITS if name in settings), DEFAULT_LIMIT)
        tokens = len(self.tok_encode(prompt))  # type: ignore[attr-defined]
        if tokens + limit > self.max_length:  # type: ignore[attr-defined]
            self._refuse(tokens, limit)

    def _refuse(self, prompt: int, answer: int) -> None:
        raise HmfError(
            f"--tasks: {self._task}: a prompt of {prompt} tokens and an answer of {answer} do not "
            f"fit into the model's {self.max_length}; omit the task, or lower --max-new-tokens or --shots"  # type: ignore[attr-defined]
        )


class LocalModel(_Counted, HFLM):
    """A model that is loaded in this process."""

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        with generating(self.model):
            tokens: torch.Tensor = super()._model_generate(context, max_length, stop, **kwargs)
        configured = self.model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured])
        for row in tokens[:, context.shape[1] :].tolist():
            text = self.tokenizer.decode(row)
            self.cut[self._task] += ends.isdisjoint(row) and not any(end in text for end in stop)
        return tokens


class _Served(_Counted):
    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[str | None]:
        for output in outputs if isinstance(outputs, list) else [outputs]:
            self.cut[self._task] += sum(choice["finish_reason"] == "length" for choice in output["choices"])
        texts: list[str | None] = super().parse_generations(outputs=outputs, **kwargs)  # type: ignore[misc]
        return texts


class CompletionsServer(_Served, LocalCompletionsAPI):
    """The completions endpoint of a server. Prompts are sent as tokens, without a chat template."""


class ChatServer(_Served, LocalChatCompletion):
    """The chat completions endpoint. The server applies its chat template and refuses prompts that are too long."""

    def __init__(self, thinking: bool, **kwargs: Any):
        super().__init__(**kwargs)
        self.thinking = thinking

    def _require_room(self, request: Any) -> None:
        """The server counts the tokens."""

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        payload: dict[str, Any] = super()._create_payload(*args, **kwargs)
        return payload | {"chat_template_kwargs": {"enable_thinking": self.thinking}}

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> Any:
        raise HmfError(
            f"--tasks: {requests[0].task_name}: compares likelihoods, which chat completions do not provide; "
            "--no-chat-template uses completions"
        )


ServedModel = CompletionsServer | ChatServer
