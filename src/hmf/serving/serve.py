# SPDX-License-Identifier: Apache-2.0
"""`hmf serve`: vLLM with the right options for a checkpoint and this machine, as one line that can be copied."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hmf.bench.gpus import GIB, Device, cpu
from hmf.bench.plan import UTILISATION, Plan, Settings, as_hybrid, make_plan
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, notice
from hmf.layers.registry import MIXERS
from hmf.model.checkpoint import generation_config, has_own_head, load_config
from hmf.model.files import DTYPES, require_checkpoint, require_finite, stored_tensors
from hmf.serving.vllm.support import split_problem

CPU_SEQUENCES = 128  # at once, by vLLM's default
CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # GiB
GRACE = 60.0  # seconds that vLLM has to stop before it is killed
NO_CACHING, UTILISED, RANKS = "--no-enable-prefix-caching", "--gpu-memory-utilization", "--tensor-parallel-size"


@dataclass(frozen=True)
class Launch:
    """A command `vllm serve ...` and what it needs in the environment."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """For a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(["vllm", "serve", *self.arguments])])


def prepare(source: str | Path, extra: Sequence[str] = ()) -> Launch:
    """The command for the checkpoint at `source` on this machine; options in `extra` go before ours.

    Raises HmfError for what is no plain checkpoint, or does not fit.
    """
    config = load_config(source, weights=False)
    quantised = bool(getattr(config, "quantization_config", None))
    folder = Path(source)
    if not quantised:
        require_checkpoint(source)
        if config.tie_word_embeddings and has_own_head(folder):
            raise HmfError(
                f"{folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from the "
                "embeddings, and vLLM would drop it; set it to false"
            )
    config = servable(config, source)
    generation_config(folder, config, needed=True)  # vLLM reads it too
    caching = NO_CACHING not in extra
    share = _number(UTILISED, _value(extra, UTILISED) or str(UTILISATION), float)
    settings = Settings(prefix_caching=caching, utilisation=share)
    plan, options, environment = for_machine(config, settings, _value(extra, RANKS, "-tp"))
    if not plan.sequences(config.max_position_embeddings):
        longest = plan.longest(config.max_position_embeddings)
        if not longest:
            raise HmfError(
                f"{source}: {plan.num_blocks} cache blocks hold no sequence; give more memory, or {NO_CACHING}"
            )
        options["--max-model-len"] = str(longest)
    options |= _parsers(source)
    if not quantised:
        _tell_narrowed(folder, config, _value(extra, "--dtype") or options.get("--dtype") or "auto")
    require_finite(folder)
    given = {argument.partition("=")[0] for argument in extra}
    ours = [text for name, value in options.items() if name not in given for text in (name, value) if text is not None]
    return Launch((str(source), *ours, *extra), environment)


def _tell_narrowed(folder: Path, config: Any, option: str) -> None:
    """A notice where vLLM, with this --dtype, computes in less than what tensors are stored in."""
    name = {"half": "float16", "float": "float32"}.get(option, option)
    dtype = getattr(torch, name, None) if name != "auto" else config.dtype
    if name == "auto" and dtype in (None, torch.float32):
        dtype = torch.bfloat16  # its choice
    if not isinstance(dtype, torch.dtype):
        return  # vLLM refuses it
    kept = {parameter for mixer in MIXERS.values() for parameter in mixer.float32_parameters}
    names = [
        name
        for name, x in stored_tensors(folder).items()
        if name.rpartition(".")[2] not in kept and torch.promote_types(DTYPES.get(x.dtype, dtype), dtype) != dtype
    ]
    if names:
        fix = "" if dtype == torch.float32 else f"; to keep their digits, hmf serve {folder} -- --dtype float32"
        notice(f"{folder}: vLLM narrows {len(names)} tensors to {str(dtype)[6:]}, first {names[0]}{fix}")


def servable(config: Any, source: str | Path) -> Any:
    """`config` as the Hybrid that is planned and served; HmfError where it still holds the teacher."""
    if getattr(config, "quantization_config", None):
        config.quantization_config = None  # planned as it was before: quantised weights take less than that
    config = as_hybrid(config)
    if config.pattern.fused:
        raise HmfError(f"{source}: still holds the teacher (Stage 0 or 1); run `hmf export` on it and serve the result")
    return config


def for_machine(
    config: Any, settings: Settings, ranks: str | None = None
) -> tuple[Plan, dict[str, str | None], dict[str, str]]:
    """vLLM's options for a Hybrid `config` on this machine, with the plan they follow, and what the environment needs.

    ranks: of tensor parallelism; None is as few GPUs as hold a sequence of full length.
    """
    options: dict[str, str | None] = {}
    environment = {}
    if torch.cuda.is_available():
        plan = _plan_gpus(config, settings, ranks)
        if plan.ranks > 1:
            options[RANKS] = str(plan.ranks)
    else:
        plan = _plan_cpu(config, settings)
        if CPU_SPACE not in os.environ:
            environment[CPU_SPACE] = str(plan.cache_bytes // GIB)
        if config.dtype == torch.float32:
            options["--dtype"] = "float32"  # vLLM's own choice would narrow the weights
    options["--max-num-seqs"] = str(plan.most_requests)
    if plan.blocks.has_states:
        if settings.prefix_caching:
            options |= {"--enable-prefix-caching": None, "--mamba-cache-mode": "align"}
        options |= dict.fromkeys(("--mamba-cache-dtype", "--mamba-ssm-cache-dtype"), config.state_dtype)
    return plan, options, environment


def _parsers(source: str | Path) -> dict[str, str | None]:
    """Parsers of tool calls and of reasoning, where the chat template has their markers."""
    template = load_tokenizer(source).chat_template or ""
    if isinstance(template, list | dict):  # several by name
        template = str(template)
    options: dict[str, str | None] = {}
    if "<tool_call>" in template and "<function=" not in template:  # JSON inside, not tags
        options |= {"--enable-auto-tool-choice": None, "--tool-call-parser": "hermes"}
    if "</think>" in template:
        options["--reasoning-parser"] = "qwen3"
    return options


def _plan_gpus(config: Any, settings: Settings, ranks: str | None) -> Plan:
    """On as few of this machine's GPUs as hold a sequence of full length, or on `ranks`."""
    seen, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    device = Device(seen.name, seen.total_memory, bandwidth=0.0)
    if ranks is not None:
        number = _number(RANKS, ranks, int)
        if problem := split_problem(config, number):
            raise HmfError(f"{RANKS}: {problem}")
        return make_plan(config, device, number, settings=settings)
    tried = [number for number in (1, 2, 4, 8) if number <= count and not split_problem(config, number)]
    for number in tried:
        with suppress(HmfError):
            plan = make_plan(config, device, number, settings=settings)
            if plan.sequences(config.max_position_embeddings):
                return plan
    return make_plan(config, device, tried[-1], settings=settings)


def _plan_cpu(config: Any, settings: Settings) -> Plan:
    """With a cache of the size that the user set, or of half of what is free, and no more than all sequences need."""
    import psutil  # comes with accelerate

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    settings = replace(settings, max_num_seqs=settings.max_num_seqs or CPU_SEQUENCES)
    device = cpu(psutil.virtual_memory().available)
    plan = make_plan(config, device, dtype=dtype, settings=settings, room=device.memory)
    if given := os.environ.get(CPU_SPACE):
        return replace(plan, cache_bytes=_number(CPU_SPACE, given, int) * GIB)
    wanted = (1 + plan.max_num_seqs * plan.blocks.of_sequence(config.max_position_embeddings)) * plan.blocks.bytes
    half = (device.memory - plan.weights.total) // 2
    return replace(plan, cache_bytes=max(1, min(math.ceil(wanted / GIB), half // GIB)) * GIB)


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise HmfError(f"{name}: {text!r} is no number") from None


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """The value of an option in a list of arguments, written `--name value` or `--name=value`."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in names:
            return value if equals else next(iter(arguments[position + 1 :]), None)
    return None


def require_vllm() -> None:
    """HmfError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise HmfError(
            "vLLM is not installed: `make setup-test` installs its CPU build, pip install 'hybrid-model-factory[vllm]' "
            "the one for GPUs; `hmf chat` needs neither"
        )


def run(launch: Launch) -> int:
    """Run the server until it ends, or until Ctrl-C, SIGTERM or SIGHUP stops it; returns the exit code, 0 when stopped.

    Nothing that it started is left behind.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *launch.arguments]
    # In a process group of its own: a Ctrl-C reaches the front end alone, once, and what is left can be found.
    server = subprocess.Popen(command, env=os.environ | launch.environment, process_group=0)
    asked: list[float] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        server.send_signal(signal.SIGINT)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while (code := _wait(server, 0.5)) is None:
            if len(asked) > 1 or (asked and time.monotonic() - asked[0] > GRACE):
                break
    finally:
        end_group(server)
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if asked else code or 0


def _wait(server: subprocess.Popen, seconds: float) -> int | None:
    try:
        return server.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def end_group(server: subprocess.Popen) -> None:
    """Let what is left of the process group that `server` leads end in three seconds, then end it by force."""
    with suppress(ProcessLookupError):  # nobody is left
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        for _ in range(30):
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
