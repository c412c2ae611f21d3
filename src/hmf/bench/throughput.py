# SPDX-License-Identifier: Apache-2.0
"""`hmf bench serving`: prefill and decode throughput of several models in vLLM, one engine after the other.

Every engine runs in its own process, so that its memory is freed before the next one starts. Prompts are random token
ids, the same for all models but different in each run, and prefix caching is off. After a warm-up with steps of the
same shapes:

- prefill: sequences are submitted together, and each generates one token. The results are the prompt tokens divided by
  the time to the last token, and the mean time to a token. The number of sequences is the same for all models; if each
  fills its cache, it is the number that the first model holds.
- decode: the time from the step in which the last sequence got its first token until every sequence has `output` more
  tokens. It therefore contains only full batches of decodes, without prefill and without a tail of fewer sequences. The
  requests are then aborted.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import hmf
from hmf.config.strict import parse_tokens
from hmf.errors import HmfError, unknown_name
from hmf.gpus import Device
from hmf.layers.base import heads_fit
from hmf.model.checkpoint import load_config
from hmf.model.files import INDEX, WEIGHTS, require_checkpoint
from hmf.planning import serving as planner
from hmf.planning.serving import Plan, ServingSettings, make_plan
from hmf.serving.process import end_group
from hmf.serving.serve import for_machine, servable
from hmf.serving.vllm import register
from hmf.serving.vllm.start import PREFILL

from . import engine
from .engine import Load, Measured

DTYPES = ("float32", "bfloat16", "float16")
GROUP = "vllm.general_plugins"
CACHE_OPTIONS = ("kv_cache_dtype", "mamba_ssm_cache_dtype")  # of vLLM, which an override may name beside config keys
PLANNED = 0.95  # share of the planned sequences that is used, because a plan is an estimate


def parse_loads(text: str) -> list[Load]:
    """`"16K:20,32768:max"` -> [Load(16384, 20), Load(32768, 0)]. Raises HmfError with the invalid part."""
    loads = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(0*[1-9][0-9]*[KkMm]?):(0*[1-9][0-9]*|max)\s*", part)
        if match is None:
            raise HmfError(f"--context: {part!r} is not TOKENS:SEQUENCES; write for example 16K:20,32K:max")
        loads.append(Load(parse_tokens(match[1]), 0 if match[2] == "max" else int(match[2])))
    return loads


@dataclass(frozen=True)
class Run:
    """The settings of a measurement, which are the same for all models.

    Attributes:
        output: number of timed decoded tokens of each sequence.
        repeats: number of timed runs, of which the fastest counts.
        utilisation, batched_tokens, ranks, enforce_eager: vLLM's --gpu-memory-utilization, --max-num-batched-tokens,
            --tensor-parallel-size and --enforce-eager.
    """

    loads: Sequence[Load]
    output: int = 128
    repeats: int = 1
    dtype: str = "bfloat16"
    utilisation: float = planner.UTILISATION
    batched_tokens: int = 8192
    ranks: int = 1
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise HmfError(f"--dtype: {unknown_name('dtype', self.dtype, DTYPES)}")
        if self.batched_tokens <= (most := max(load.sequences for load in self.loads)):
            raise HmfError(
                f"--batched-tokens: {self.batched_tokens} leaves no tokens for prompts while {most} sequences decode; "
                "give more"
            )

    def length(self, load: Load) -> int:
        """Tokens of the longest sequence of a load, prompt and output."""
        return load.tokens + load.lead(self.batched_tokens) + self.output


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        folder: the checkpoint, or a folder with only a config.
        loads: the run's loads, with the numbers of sequences that fit this model and, for prefill, the first model.
        plan: gives the bytes of a decode step; None with quantised weights.
        arguments, environment: those of the engine.
    """

    name: str
    folder: Path
    loads: tuple[Load, ...]
    random: bool
    vocabulary: int
    plan: Plan | None
    arguments: tuple[str, ...]
    environment: dict[str, str]

    @property
    def kind(self) -> str:
        return (planner.title(self.plan) if self.plan else "quantised") + (", random weights" if self.random else "")


def subject(
    name: str, folder: Path, run: Run, overrides: dict[str, Any] | None = None, first: Subject | None = None
) -> Subject:
    """The model at `folder`, with random weights if it has none. Raises HmfError if vLLM cannot serve it.

    overrides: vLLM's --hf-overrides, `CACHE_OPTIONS` and `PREFILL`, with valid values; first: the model that the others
    are compared with, or None for this model itself.
    """
    config = load_config(folder, weights=False)
    overrides = dict(overrides or {})
    stored = {key: overrides.pop(key) for key in CACHE_OPTIONS if key in overrides}
    additional = {key: overrides.pop(key) for key in (PREFILL,) if key in overrides}
    planned = replace(_settings(run), **stored)
    for key, value in overrides.items():
        setattr(config, key, value)  # as vLLM does
    random = not any((folder / file).exists() for file in (WEIGHTS, INDEX))
    quantised = bool(getattr(config, "quantization_config", None))
    if not random and not quantised:
        require_checkpoint(folder)
    config = servable(config, folder)
    if not heads_fit(config, run.ranks):
        heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads"
        raise HmfError(f"--tensor-parallel-size: the {heads} of {name} do not split over {run.ranks} GPUs; give fewer")
    dtype = config.dtype = getattr(torch, run.dtype)
    loads = tuple(load if load.sequences else _filled(load, name, config, run, planned) for load in run.loads)
    if first is not None:
        loads = tuple(replace(load, prefilled=base.sequences) for load, base in zip(loads, first.loads, strict=True))
    longest = max(map(run.length, loads))
    most = max(max(load.sequences, load.prefilled) for load in loads)
    if longest > config.max_position_embeddings:
        raise HmfError(
            f"--context: {longest:,} tokens (prompt and output) exceed the max_position_embeddings of {name}, "
            f"{config.max_position_embeddings:,}; give fewer"
        )
    settings = replace(planned, max_num_seqs=most)
    _, options, environment = for_machine(config, settings, run.ranks)
    options |= {
        "--model": str(folder),
        "--load-format": "dummy" if random else "auto",
        "--dtype": run.dtype,
        "--max-model-len": str(longest),
        "--max-num-batched-tokens": str(run.batched_tokens),
        "--gpu-memory-utilization": str(run.utilisation),
        "--no-enable-prefix-caching": None,
        "--skip-tokenizer-init": None,
        "--disable-log-stats": None,
        "--worker-extension-cls": f"{engine.__name__}.{engine.Inspection.__name__}",
    }
    if run.enforce_eager:
        options["--enforce-eager"] = None
    options |= {f"--{key.replace('_', '-')}": value for key, value in stored.items()}
    if additional:
        options["--additional-config"] = json.dumps(additional)
    if overrides:
        options["--hf-overrides"] = json.dumps(overrides)
    # Without a memory limit, because this plan is used only for the bytes of a step.
    plan = None if quantised else make_plan(config, Device("", 0, 0.0), run.ranks, dtype, settings, room=2**60)
    arguments = tuple(text for pair in options.items() for text in pair if text is not None)
    return Subject(name, folder, loads, random, config.vocab_size, plan, arguments, environment)


def _settings(run: Run) -> ServingSettings:
    return ServingSettings(utilisation=run.utilisation, prefix_caching=False, batched_tokens=run.batched_tokens)


def _filled(load: Load, name: str, config: Any, run: Run, settings: ServingSettings) -> Load:
    """`load` with the number of sequences whose full length fits the model's planned cache, times `PLANNED`."""
    plan, *_ = for_machine(config, settings, run.ranks)
    for sequences in range(min(plan.most_requests, run.batched_tokens // 2), 0, -1):
        filled = replace(load, sequences=sequences)
        if sequences <= PLANNED * plan.sequences(run.length(filled)):
            return filled
    raise HmfError(f"--context: {name}: no sequence of {load.tokens:,} tokens fits; give fewer tokens")


def run_all(subjects: Sequence[Subject], run: Run) -> Iterator[Measured | HmfError]:
    """Measure the models in turn, each in its own process. An error names the model that failed."""
    steps = len(subjects) * (1 + len(run.loads) * 2 * (1 + run.repeats))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs the clean-up of the engine
    try:
        with tqdm(total=steps, unit="run", disable=None) as bar, _plugin() as environment:
            for one in subjects:
                bar.set_description(f"{one.name}: starting")
                try:
                    yield _run_one(one, run, environment, bar)
                except HmfError as error:
                    yield error
    finally:
        signal.signal(signal.SIGTERM, before)


def _job(one: Subject, run: Run) -> dict[str, Any]:
    """The arguments of `measure`."""
    shared = {"loads": [asdict(load) for load in one.loads], "output": run.output, "repeats": run.repeats}
    return {"arguments": one.arguments, "vocabulary": one.vocabulary, "batched_tokens": run.batched_tokens, **shared}


def _run_one(one: Subject, run: Run, environment: dict[str, str], bar: Any) -> Measured:
    with tempfile.TemporaryDirectory(prefix="hmf-bench-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(_job(one, run)), encoding="utf-8")
        events, log = folder / "events", folder / "log"
        events.touch()
        with log.open("wb") as output, events.open(encoding="utf-8") as lines:
            process = subprocess.Popen(
                [sys.executable, "-m", engine.__name__, name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | one.environment | environment,
                process_group=0,
            )
            last: dict[str, Any] = {}
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    last = _follow(lines, one, bar) or last
            finally:
                end_group(process)
            last = _follow(lines, one, bar) or last
        if "result" in last:
            return Measured(**last["result"])
        if "error" in last:
            raise HmfError(f"{one.name}: {last['error']}")
        printed = log.read_text(encoding="utf-8", errors="replace")
        raise HmfError(f"{one.name}: vLLM stopped: {_reason(printed)}; its log is in {_kept(printed)}")


def _follow(lines: Any, one: Subject, bar: Any) -> dict[str, Any]:
    """Show the new events of a model's process. Returns the last event."""
    event: dict[str, Any] = {}
    for line in lines:
        event = json.loads(line)
        if "doing" in event:
            bar.set_description(f"{one.name}: {event['doing']}", refresh=False)
            bar.update()
    return event


def _reason(log: str) -> str:
    """The first error in a log, which is the cause of the others; else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    grave = [line for line in lines if not re.search(r"\b(WARNING|INFO|DEBUG)\b", line)]
    errors = [match[0] for line in grave if (match := re.search(r"\b[\w.]*(Error|Exception)\b: .*", line))]
    return (errors or lines[-1:] or ["it printed nothing"])[0]


def _kept(log: str) -> str:
    """The path of a new file with `log`."""
    with tempfile.NamedTemporaryFile("w", prefix="hmf-vllm-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(log)
    return file.name


@contextmanager
def _plugin() -> Iterator[dict[str, str]]:
    """The environment variables with which vLLM finds the plugin in each of its processes.

    None if the package is installed. For a source tree, PYTHONPATH with a temporary folder that has the entry point.
    """
    target = f"{register.__module__}:{register.__name__}"
    if any(point.value == target for point in importlib.metadata.entry_points(group=GROUP)):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="hmf-plugin-") as folder:
        described = Path(folder) / f"hmf_plugin-{hmf.__version__}.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: hmf-plugin\nVersion: {hmf.__version__}\n", encoding="utf-8"
        )
        (described / "entry_points.txt").write_text(f"[{GROUP}]\nhmf = {target}\n", encoding="utf-8")
        sources = str(Path(hmf.__file__).parent.parent)
        yield {"PYTHONPATH": os.pathsep.join(filter(None, [folder, sources, os.environ.get("PYTHONPATH")]))}
