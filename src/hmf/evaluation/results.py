# SPDX-License-Identifier: Apache-2.0
"""The results files of an evaluation: `scores.NAME.json` and `evaluation/NAME/TASK@LENGTH.jsonl`.

The file of scores has the figures of tables and cards. A .jsonl file has one line per prompt, which allows paired
comparisons of two models.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import hmf
from hmf.config.strict import parse_json
from hmf.errors import HmfError
from hmf.folders import reason, shown

SMALL = "tasks"  # name of the suite of the tasks in hmf.data.tasks
SERVED = "-server"  # part of a NAME whose answers come from a server
ANSWERS = "evaluation"  # folder of the .jsonl files, beside the files of scores
EXCERPT = 4000  # characters of a prompt that are stored with its answer
Z95 = 1.959964  # quantile of the normal distribution for a two-sided 95% interval
Share = Annotated[float, Field(ge=0, le=1)]


def wilson(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a binomial share out of `n` (Wilson 1927, JASA 22:209-212), 95% by default."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def perplexity_of(nats: float, tokens: int, title: str) -> float:
    """The perplexity of `tokens` tokens with this summed loss. HmfError, which begins with `title`, if it has no finite
    value, as with weights that are not finite."""
    with suppress(OverflowError):
        if math.isfinite(value := math.exp(nats / tokens)):
            return value
    raise HmfError(
        f"{title}: the mean loss of a token is {nats / tokens:.4g} nats, which is no finite perplexity; check the "
        "weights of the model"
    )


class Result(BaseModel):
    """A section of a results file. It may have other keys, for other readers."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())


class TaskResult(Result):
    """A task at one length. `accuracy` is the share of all `n` prompts; a truncated answer is incorrect."""

    task: str | None = None  # None: the task in the section's key
    length: int | None = None  # tokens of prompt and longest answer; None for a task that has no length
    accuracy: Share
    n: Annotated[int, Field(ge=1)]
    truncated: Share | None = None  # share of answers that were cut off
    interval: tuple[float, float] = Field(default_factory=lambda values: wilson(values["accuracy"], values["n"]))
    likelihood: float | None = None  # mean log-probability of a token of the expected answers; None: not measured

    @property
    def cut_off(self) -> int | None:
        """The number of truncated answers."""
        return None if self.truncated is None else round(self.truncated * self.n)


class TextResult(Result):
    perplexity: Annotated[float, Field(gt=0)]
    tokens: Annotated[int, Field(ge=1)]


class PositionResult(Result):
    """Perplexity of the tokens that follow `start` to `end` - 1 other tokens."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=1)]
    perplexity: Annotated[float, Field(gt=0)]
    tokens: Annotated[int, Field(ge=1)]


class ParityResult(Result):
    """The distance of a server's log-probabilities from those of Hugging Face's model, in nats per token."""

    passed: bool
    bound: Annotated[float, Field(ge=0)]  # upper bound of both prompt_kl and generated_kl
    prompt_kl: Annotated[float, Field(ge=0)]
    generated_kl: Annotated[float, Field(ge=0)]
    max_kl: Annotated[float, Field(ge=0)]
    prompt_tokens: Annotated[int, Field(ge=1)]
    generated_tokens: Annotated[int, Field(ge=1)]
    top_k: Annotated[int, Field(ge=1)]
    url: str | None = None


class Scores(Result):
    """A file scores.NAME.json. NAME is WHO, or WHO-SUITE, or WHO-server-SUITE; see `who`."""

    tasks: dict[str, TaskResult]  # by TASK, or TASK@LENGTH
    text: TextResult | None = None
    length: int | None = None
    suite: str | None = None
    settings: dict[str, Any] = {}  # seed, sampling, thinking, batch, dtype, device, url
    versions: dict[str, str] = {}  # by package
    model: dict[str, Any] = {}  # path, config_sha256
    positions: list[PositionResult] = []
    parity: ParityResult | None = None
    not_measured: dict[str, str] = {}  # the reason, by task


def who(name: str, scores: Scores) -> str:
    """The model that the file scores.`name`.json describes: the name without the suite and without "-server"."""
    return name.removesuffix(f"-{scores.suite}").removesuffix(SERVED) if scores.suite else name


class Answered(Result):
    """A line of evaluation/NAME/TASK@LENGTH.jsonl."""

    index: Annotated[int, Field(ge=0)]
    prompt_sha256: str
    expected: str
    answer: str
    correct: bool
    truncated: bool
    tokens: Annotated[int, Field(ge=0)]  # generated
    prompt: str | None = None  # see `excerpt`
    likelihood: float | None = None  # mean log-probability of a token of the expected answer


def excerpt(prompt: str) -> str:
    """The part of a prompt that results files store. The middle of a long prompt is omitted."""
    if len(prompt) <= EXCERPT:
        return prompt
    half = EXCERPT // 2
    return f"{prompt[:half]}\n[... {len(prompt) - 2 * half:,} characters are left out ...]\n{prompt[-half:]}"


def read_answers(file: Path) -> list[Answered]:
    """The answers in a file, sorted by index. An incomplete last line, from an interrupted run, is ignored.

    Raises HmfError with the file and the line for a line that is not an answer.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise HmfError(f"{file}: cannot be read: {why}; remove it") from None
    by_index = {}
    for number, line in enumerate(lines, 1):
        try:
            answered = Answered.model_validate(parse_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise HmfError(f"{file}: line {number}: {where}: {problem['msg']}; remove the file") from None
        except ValueError as error:
            raise HmfError(f"{file}: line {number}: {error}; remove the file") from None
        by_index[answered.index] = answered
    return [by_index[index] for index in sorted(by_index)]


def answers_of(run: Path, name: str) -> dict[str, list[Answered]]:
    """The answers behind scores.`name`.json, by TASK@LENGTH; empty if none are stored."""
    return {file.stem: read_answers(file) for file in sorted((run / ANSWERS / name).glob("*.jsonl"))}


def summary(answered: Sequence[Answered], task: str, length: int | None = None) -> dict[str, Any]:
    """The fields of a `TaskResult`, from the answers to a task's prompts."""
    n = len(answered)
    accuracy = sum(one.correct for one in answered) / n
    likelihoods = [one.likelihood for one in answered if one.likelihood is not None]
    return {
        "task": task,
        "length": length,
        "accuracy": accuracy,
        "n": n,
        "truncated": sum(one.truncated for one in answered) / n,
        "interval": wilson(accuracy, n),
        "likelihood": sum(likelihoods) / len(likelihoods) if likelihoods else None,
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that answers depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"hmf": hmf.__version__, **packages, "python": platform.python_version()}


def describe(folder: Path) -> dict[str, str]:
    """Path and hashes of a checkpoint. The hash of the weights covers the size, start and end of each file."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            digest.update(f"{file.name} {size}".encode())
            for place in (0, max(0, size - (1 << 20))):
                stream.seek(place)
                digest.update(stream.read(1 << 20))
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {"path": shown(folder), "config_sha256": config, "weights_ends_sha256": digest.hexdigest()}
