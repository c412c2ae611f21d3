# SPDX-License-Identifier: Apache-2.0
"""`hmf serve`: runs vLLM with options for the checkpoint and this machine, as a command line that can be copied."""

from __future__ import annotations

import errno
import functools
import importlib.util
import ipaddress
import math
import os
import re
import shlex
import socket
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hmf.config.pattern import is_fused
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError, notice
from hmf.gpus import GIB, Device, cpu
from hmf.layers.own import own_layers
from hmf.layers.registry import MIXERS
from hmf.model.checkpoint import generation_config, has_own_head, load_config
from hmf.model.files import DTYPES, require_checkpoint, require_finite, stored_tensors
from hmf.planning.serving import KV_DTYPES, STATE_DTYPES, UTILISATION, Plan, ServingSettings, as_hybrid, make_plan
from hmf.serving.vllm.start import Start
from hmf.serving.vllm.support import STILL_FUSED, require_served, require_stock, split_problem

CPU_SEQUENCES = 128  # vLLM's default of concurrent sequences on a CPU
CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB
API_KEY = "VLLM_API_KEY"  # vLLM reads it
LOOPBACK, PORT = "127.0.0.1", 8000
UTILISED, RANKS = "--gpu-memory-utilization", "--tensor-parallel-size"


@dataclass(frozen=True)
class Launch:
    """A command `vllm serve ...`, its environment variables, its host and port, and a line about who can access it."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    secrets: frozenset[str] = frozenset()  # API keys among the arguments
    access: str = ""
    address: tuple[str, int] | None = None  # None: a Unix socket

    def require_port(self) -> None:
        """HmfError if the server cannot listen at its address, for example because another program does."""
        if self.address is None:
            return
        host, port = self.address
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
                probe.bind(self.address)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "ports are numbers up to 65535"
            is_host = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
            fix = "correct the host: -- --host ADDRESS" if is_host else "choose another port: -- --port NUMBER"
            raise HmfError(f"{host or '0.0.0.0'}:{port}: {reason}; {fix}") from None

    @property
    def line(self) -> str:
        """The command line for a shell, without the secrets."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(["vllm", "serve", *map(self._shown, self.arguments)])])

    def _shown(self, argument: str) -> str:
        if argument in self.secrets:
            return "..."
        name, _, value = argument.partition("=")  # the first one: a key may have others
        return f"{name}=..." if value in self.secrets else argument


def prepare(source: str | Path, extra: Sequence[str] = ()) -> Launch:
    """The command for the checkpoint at `source` on this machine; vLLM's options in `extra` override the chosen ones.

    Raises HmfError for an invalid checkpoint, for one that the plugin refuses with these options, and if it does not
    fit into memory.
    """
    config = load_config(source, weights=False)
    quantization = getattr(config, "quantization_config", None)
    quantised, is_hybrid = bool(quantization), config.model_type.startswith("hybrid_")
    folder = Path(source)
    if not quantised:
        require_checkpoint(source)
        if getattr(config, "tie_word_embeddings", False) and has_own_head(folder):
            raise HmfError(
                f"{folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight differs from the "
                "embeddings, and vLLM would drop it; set it to false"
            )
    architectures = config.architectures  # of the base, which `servable` makes a Hybrid
    config = servable(config, source)
    generation_config(folder, config, needed=True)  # vLLM reads it too
    user_options = given_options(source, extra)
    for key, value in (user_options.get("hf_overrides") or {}).items():
        setattr(config, key, value)  # as vLLM does
    architectures = (user_options.get("hf_overrides") or {}).get("architectures", architectures)
    served = f"{config.family.hybrid_prefix if is_hybrid else config.family.prefix}ForCausalLM"
    if served not in (architectures or ()):  # vLLM then serves embeddings, or nothing
        raise HmfError(
            f"{folder / 'config.json'}: architectures: {architectures!r}: vLLM serves the class that is named there, "
            f"and only {served} generates text; write [{served!r}] if that is what this checkpoint is"
        )
    start = Start.given(config, not torch.cuda.is_available(), quantization, user_options)
    (require_served if is_hybrid else require_stock)(source, start)  # vLLM serves a base without the plugin
    settings = ServingSettings(
        prefix_caching=user_options.get("enable_prefix_caching") is not False,
        utilisation=user_options.get("gpu_memory_utilization", UTILISATION),
        kv_cache_dtype=_known(user_options.get("kv_cache_dtype"), KV_DTYPES),
        mamba_ssm_cache_dtype=_known(user_options.get("mamba_ssm_cache_dtype"), STATE_DTYPES),
    )
    plan, options, environment = for_machine(config, settings, user_options.get("tensor_parallel_size"))
    # vLLM's own classes serve a base with recurrent layers; on a CPU they take bfloat16 alone, which is vLLM's default.
    bfloat16_only = not is_hybrid and bool(own_layers(config)) and not torch.cuda.is_available()
    if bfloat16_only:
        options.pop("--dtype", None)
    if not plan.sequences(config.max_position_embeddings):
        longest = plan.longest(config.max_position_embeddings)
        if not longest:
            raise HmfError(
                f"{source}: the {plan.num_blocks} cache blocks are too few for a sequence; give more memory, or "
                "--no-enable-prefix-caching"
            )
        options["--max-model-len"] = str(longest)
    if user_options.get("uds") is None:
        options["--host"] = LOOPBACK
    options |= parsers(source, user_options)
    if not quantised:
        dtype = user_options.get("dtype") or options.get("--dtype") or "auto"
        _notice_narrowed(folder, config, dtype, can_widen=not bfloat16_only)
    require_finite(folder)
    chosen = [
        text
        for name, value in options.items()
        if name.removeprefix("--").replace("-", "_") not in user_options
        for text in (name, value)
        if text is not None
    ]
    keys = frozenset(key for key in user_options.get("api_key") or () if key)
    return Launch((str(source), *chosen, *extra), environment, keys, access(user_options), address(user_options))


def _known(value: str | None, dtypes: Mapping[str, torch.dtype | None]) -> str:
    """The dtype of a cache for the plan: `value` if the planner knows its size, else "auto", which plans for more
    bytes."""
    return value if value is not None and value in dtypes else "auto"


def given_options(source: str | Path, extra: Sequence[str]) -> dict[str, Any]:
    """The options in the command line `extra`, by the names of vLLM's settings, as vLLM's own parser reads them.

    Raises HmfError if the parser rejects them.
    """
    if not extra:
        return {}
    require_vllm()
    parser = _parser()
    not_given = object()
    values = Namespace(**{action.dest: not_given for action in parser._actions})
    try:
        values = parser.parse_args([str(source), *extra], values)
    except ArgumentProblem as problem:
        raise HmfError(f"after --: {problem}; `vllm serve --help=all` lists the options") from None
    return {name: value for name, value in vars(values).items() if value is not not_given and name != "model_tag"}


class ArgumentProblem(Exception):
    """An error that vLLM's option parser reports."""


@functools.cache
def _parser() -> ArgumentParser:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise ArgumentProblem(" ".join(message.split()))

    return make_arg_parser(Parser(prog="vllm serve"))


def address(given: dict[str, Any]) -> tuple[str, int] | None:
    """Host and port of a server with these options. None if it listens on a Unix socket."""
    if given.get("uds") is not None:
        return None
    return given.get("host") or ("" if "host" in given else LOOPBACK), given.get("port", PORT)


def access(given: dict[str, Any]) -> str:
    """One line that says where a server with these options listens, and who can use it."""
    if (place := address(given)) is None:
        return f"The server listens on the socket {given['uds']}."
    host, port = place
    shown = f"[{host}]" if ":" in host else host or "0.0.0.0"
    scheme = "https" if given.get("ssl_keyfile") else "http"
    line = f"The server listens on {scheme}://{shown}:{port}"
    if _is_loopback(host):
        return f"{line}, for this machine only; `-- --host 0.0.0.0` opens it to others, with a key in {API_KEY}."
    if given.get("api_key") or os.environ.get(API_KEY):
        return f"{line}, for clients with the API key."
    return f"{line}: everyone who reaches this machine can use it; set {API_KEY} in the environment to require a key."


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _notice_narrowed(folder: Path, config: Any, option: str, can_widen: bool) -> None:
    """Print a notice if vLLM, with this --dtype, casts tensors to a dtype that cannot hold their values.

    can_widen: whether vLLM can compute in float32, which the notice then names.
    """
    name = {"half": "float16", "float": "float32"}.get(option, option)
    dtype = getattr(torch, name, None) if name != "auto" else config.dtype
    if name == "auto" and dtype in (None, torch.float32):
        dtype = torch.bfloat16  # vLLM's choice
    if not isinstance(dtype, torch.dtype):
        return  # vLLM rejects it
    kept = {parameter for mixer in MIXERS.values() for parameter in mixer.float32_parameters}
    names = [
        name
        for name, x in stored_tensors(folder).items()
        if name.rpartition(".")[2] not in kept and torch.promote_types(DTYPES.get(x.dtype, dtype), dtype) != dtype
    ]
    if names:
        widen = can_widen and dtype != torch.float32
        fix = f"; to keep their precision, hmf serve {folder} -- --dtype float32" if widen else ""
        notice(f"{folder}: vLLM casts {len(names)} tensors to {str(dtype)[6:]}, such as {names[0]}{fix}")


def servable(config: Any, source: str | Path) -> Any:
    """`config` as a Hybrid's config for planning and serving; HmfError for a fused checkpoint."""
    if getattr(config, "quantization_config", None):
        config.quantization_config = None  # planned with unquantised weights, which is an upper bound
    config = as_hybrid(config)
    if is_fused(config):
        raise HmfError(f"{source}: {STILL_FUSED}")
    return config


def for_machine(
    config: Any, settings: ServingSettings, ranks: int | None = None
) -> tuple[Plan, dict[str, str | None], dict[str, str]]:
    """(plan, vLLM's options, environment variables) for a Hybrid `config` on this machine.

    ranks: of tensor parallelism; None chooses the fewest GPUs that hold a sequence of full length.
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
            options["--dtype"] = "float32"  # vLLM's default is a narrower dtype
    options["--max-num-seqs"] = str(plan.most_requests)
    if plan.blocks.has_states:
        options |= state_options(config, settings.prefix_caching)
    return plan, options, environment


def state_options(config: Any, prefix_caching: bool = True) -> dict[str, str | None]:
    """vLLM's options for recurrent states."""
    caching = {"--enable-prefix-caching": None, "--mamba-cache-mode": "align"} if prefix_caching else {}
    return caching | dict.fromkeys(("--mamba-cache-dtype", "--mamba-ssm-cache-dtype"), config.state_dtype)


# vLLM's parser by a marker of the template's calls: XML, JSON between tags, and the JSON of Llama 3, for which the
# template asks. The first one counts.
TOOL_PARSERS = {
    "<function=": "qwen3_coder",
    "<tool_call>": "hermes",
    **dict.fromkeys(("<|python_tag|>", '{"name": function name, "parameters":'), "llama3_json"),
}


def parsers(source: str | Path, given: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    """vLLM's options for parsers of tool calls and reasoning, if the chat template has their markers.

    The template is that of the `given` options, or else the checkpoint's. A notice says that there is none for its tool
    calls, unless `tool_call_parser` is given.
    """
    given, template = given or {}, load_tokenizer(source).chat_template or ""
    if own := given.get("chat_template"):  # a file, or the template itself
        template = own
        with suppress(OSError, UnicodeError):
            template = Path(own).read_text(encoding="utf-8")
    if isinstance(template, list | dict):  # several named templates
        template = str(template)
    options: dict[str, str | None] = {}
    if parser := next((parser for marker, parser in TOOL_PARSERS.items() if marker in template), None):
        options |= {"--enable-auto-tool-choice": None, "--tool-call-parser": parser}
    elif "tool_call_parser" not in given and re.search(r"\btool_calls\b", template):
        notice(
            f"{source}: the chat template's tool calls have no parser that hmf knows, so they stay text in content; "
            "give vLLM's with -- --enable-auto-tool-choice --tool-call-parser NAME"
        )
    if "</think>" in template:
        options["--reasoning-parser"] = "qwen3"
    return options


def _plan_gpus(config: Any, settings: ServingSettings, ranks: int | None) -> Plan:
    """A plan on the fewest GPUs of this machine that hold a sequence of full length, or on `ranks` GPUs."""
    properties, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
    device = Device(properties.name, properties.total_memory, bandwidth=0.0)
    if ranks is not None:
        if problem := split_problem(config, ranks):
            raise HmfError(f"{RANKS}: {problem}")
        return make_plan(config, device, ranks, settings=settings)
    candidates = [number for number in (1, 2, 4, 8) if number <= count and not split_problem(config, number)]
    for number in candidates:
        with suppress(HmfError):
            plan = make_plan(config, device, number, settings=settings)
            if plan.sequences(config.max_position_embeddings):
                return plan
    return make_plan(config, device, candidates[-1], settings=settings)


def _plan_cpu(config: Any, settings: ServingSettings) -> Plan:
    """A plan with the cache size that the user set; by default half of the free memory, at most what sequences need."""
    import psutil  # comes with accelerate

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    settings = replace(settings, max_num_seqs=settings.max_num_seqs or CPU_SEQUENCES)
    device = cpu(psutil.virtual_memory().available)
    plan = make_plan(config, device, dtype=dtype, settings=settings, room=device.memory)
    if gibibytes := os.environ.get(CPU_SPACE):
        return replace(plan, cache_bytes=_gibibytes(gibibytes))
    blocks = 1 + plan.max_num_seqs * plan.blocks.of_sequence(config.max_position_embeddings)
    half = (device.memory - plan.weights.total) // 2
    return replace(plan, cache_bytes=max(1, min(math.ceil(blocks * plan.blocks.bytes / GIB), half // GIB)) * GIB)


def _gibibytes(text: str) -> int:
    try:
        return int(text) * GIB
    except ValueError:
        raise HmfError(f"{CPU_SPACE}: {text!r} is not a whole number of GiB; correct it or unset it") from None


def require_vllm() -> None:
    """HmfError if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise HmfError(
            "vLLM is not installed: `make setup-serve` installs the build for this machine in a clone, "
            "pip install 'hybrid-model-factory[vllm]' that for GPUs; `hmf chat` works without vLLM"
        )
