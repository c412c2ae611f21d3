# SPDX-License-Identifier: Apache-2.0
"""The results files of an evaluation: `scores.NAME.json`, and one line a prompt in `evaluation/NAME/TASK@LENGTH.jsonl`.

A file of scores holds what tables and cards show. The lines of the prompts are what two models are compared by.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import hmf
from hmf.config.strict import parse_json
from hmf.errors import HmfError
from hmf.folders import reason, shown

SMALL = "tasks"  # as a suite: the tasks of hmf.data.tasks
SERVED = "-server"  # in names, of what a server answered
ANSWERS = "evaluation"  # folder of the prompts' lines, beside the files of scores
EXCERPT = 4000  # characters of a prompt that are kept beside its answer
Z95 = 1.959964  # of a normal distribution, two-sided 95%
Share = Annotated[float, Field(ge=0, le=1)]


def wilson(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a binomial share out of `n` (Wilson 1927, JASA 22:209-212), 95% by default."""
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


class Result(BaseModel):
    """A section of a results file. Keys that only other readers need may stand beside these."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())


class TaskResult(Result):
    """A task at one length. `accuracy` is of all `n` prompts: a truncated answer is not a correct one."""

    task: str | None = None  # left out: the key's
    length: int | None = None  # tokens of prompt and longest answer; None for a task that has no length
    accuracy: Share
    n: Annotated[int, Field(ge=1)]
    truncated: Share | None = None  # share of answers that were cut off
    interval: tuple[float, float] = Field(default_factory=lambda given: wilson(given["accuracy"], given["n"]))
    likelihood: float | None = None  # mean log-probability of a token of the expected answers; None: not measured

    @property
    def cut_off(self) -> int | None:
        """How many answers were truncated."""
        return None if self.truncated is None else round(self.truncated * self.n)


class TextResult(Result):
    perplexity: Annotated[float, Field(gt=0)]
    tokens: Annotated[int, Field(ge=1)]


class PositionResult(Result):
    """Perplexity of the tokens that have `start` to `end` - 1 tokens before them."""

    start: Annotated[int, Field(ge=0)]
    end: Annotated[int, Field(ge=1)]
    perplexity: Annotated[float, Field(gt=0)]
    tokens: Annotated[int, Field(ge=1)]


class ParityResult(Result):
    """How far a server's log-probabilities are from those of Hugging Face's model, in nats a token."""

    passed: bool
    bound: Annotated[float, Field(ge=0)]  # of the mean KL divergence of prompts' tokens, and of generated ones
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
    versions: dict[str, str] = {}  # of the packages
    model: dict[str, Any] = {}  # path, config_sha256
    positions: list[PositionResult] = []
    parity: ParityResult | None = None
    not_measured: dict[str, str] = {}  # why, by task


def who(name: str, scores: Scores) -> str:
    """The model that the file scores.`name`.json is about: its name without the suite's, and without the server's."""
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
    prompt: str | None = None  # without its middle if it is long, see `excerpt`
    likelihood: float | None = None  # mean log-probability of a token of the expected answer


def excerpt(prompt: str) -> str:
    """The prompt as results keep it: a long one without its middle."""
    if len(prompt) <= EXCERPT:
        return prompt
    half = EXCERPT // 2
    return f"{prompt[:half]}\n[... {len(prompt) - 2 * half:,} characters are left out ...]\n{prompt[-half:]}"


def read_answers(file: Path) -> list[Answered]:
    """The lines of a file, in the order of their index. An unfinished last line, of a run that was cut off, is left.

    HmfError names the file and the line that is no answer.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is not UTF-8"
        raise HmfError(f"{file}: cannot be read: {why}; remove it") from None
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            answered = Answered.model_validate(parse_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise HmfError(f"{file}: line {number}: {where}: {problem['msg']}; remove the file") from None
        except (ValueError, json.JSONDecodeError) as error:
            raise HmfError(f"{file}: line {number}: {error}; remove the file") from None
        found[answered.index] = answered
    return [found[index] for index in sorted(found)]


def answers_of(run: Path, name: str) -> dict[str, list[Answered]]:
    """By TASK@LENGTH, the answers behind scores.`name`.json; nothing where there are none."""
    return {file.stem: read_answers(file) for file in sorted((run / ANSWERS / name).glob("*.jsonl"))}


def summary(answered: Sequence[Answered], task: str, length: int | None = None) -> dict[str, Any]:
    """What `TaskResult` reads, from the lines of a task's prompts."""
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
    """Of Python and the packages that answers depend on."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"hmf": hmf.__version__, **packages, "python": platform.python_version()}


def describe(folder: Path) -> dict[str, str]:
    """Path and hashes of a checkpoint: of its config, and of the ends of its weights' files, which change with them."""
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
