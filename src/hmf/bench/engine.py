# SPDX-License-Identifier: Apache-2.0
"""The process of one model in `hmf bench serving`: starts vLLM's engine and times the loads of a job."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hmf.errors import HmfError
from hmf.planning.serving import short

COPIED = 2**30  # bytes of a copy that measures bandwidth
WARM_TOKENS = 4  # decoded by a warm-up
WARM_LENGTH = 256  # of the prompts of the full batch that decodes in a warm-up


@dataclass(frozen=True)
class Load:
    """`sequences` that decode at once, with prompts of `tokens` tokens. 0 sequences: as many as fit into the cache.

    prefilled: the number of sequences that are submitted to time the prefill. 0: the same number.
    """

    tokens: int
    sequences: int
    prefilled: int = 0

    def lead(self, batched_tokens: int) -> int:
        """An upper bound of the tokens that the first sequence has when the last one gets its first token."""
        return 2 * math.ceil(self.tokens * self.sequences / (batched_tokens - self.sequences)) + 8


@dataclass(frozen=True)
class Measured:
    """The results of one model.

    Attributes:
        prefill, decode: seconds of every timed run for each load.
        capacity: vLLM's KV cache size in tokens.
        copy_rate: bytes/s read and written by a copy on the GPU; None on a CPU.
        start: seconds until the engine was ready.
        cuda_graphs, backends: the worker's choices.
        ttft: mean seconds to the first token of each prefill.
    """

    prefill: list[list[float]]
    decode: list[list[float]]
    capacity: int
    copy_rate: float | None
    start: float
    cuda_graphs: str
    backends: str
    ttft: list[list[float]]


class Inspection:
    """An extension of vLLM's worker that reports the worker's choices."""

    vllm_config: Any
    model_runner: Any

    def hmf_choices(self) -> list[str]:
        """[CUDA graph mode, attention and state backends]"""
        mode = getattr(self.vllm_config.compilation_config.cudagraph_mode, "name", "NONE")
        groups = [group for row in getattr(self.model_runner, "attn_groups", ()) for group in row]
        return [mode, ", ".join(sorted({group.backend.get_name() for group in groups}))]


def measure(job: dict[str, Any], progress: Callable[[str], None]) -> Measured:
    """Start the engine of a job and time its loads; `progress` is called after the start and after each run."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    started = time.perf_counter()
    arguments = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(job["arguments"])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(arguments))
    started = time.perf_counter() - started
    progress("warming up")
    generator = torch.Generator().manual_seed(0)
    prefill, decode, ttft = list[list[float]](), list[list[float]](), list[list[float]]()
    for load in (Load(**fields) for fields in job["loads"]):
        lead, times = load.lead(job["batched_tokens"]), []

        def timed(sequences: int, length: int, tokens: int, lead: int = lead) -> tuple[float, float, float]:
            prompts = torch.randint(job["vocabulary"], (sequences, length), generator=generator).tolist()
            seconds = _generate(llm.llm_engine, prompts, tokens, lead)
            progress(f"{short(length)} x {sequences}")
            return seconds

        # The shapes of the timed runs: steps full of long prompts, and a full batch that decodes.
        some = 1 + math.ceil(2 * job["batched_tokens"] / load.tokens)
        timed(min(some, load.sequences), load.tokens, min(WARM_TOKENS, job["output"]))
        timed(load.sequences, min(load.tokens, WARM_LENGTH), min(WARM_TOKENS, job["output"]))
        for _ in range(job["repeats"]):
            first = timed(load.prefilled or load.sequences, load.tokens, 0)
            second = timed(load.sequences, load.tokens, job["output"])
            times.append((first[0], second[1], first[2]))
        for results, part in zip((prefill, decode, ttft), zip(*times, strict=True), strict=True):
            results.append(list(part))
    graphs, backends = llm.collective_rpc(Inspection.hmf_choices.__name__)[0]
    capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    llm.llm_engine.engine_core.shutdown()
    return Measured(prefill, decode, capacity, _copy_rate(), started, graphs, backends, ttft)


def _generate(engine: Any, prompts: list[list[int]], tokens: int, lead: int) -> tuple[float, float, float]:
    """Seconds until all sequences have their first token, from then until all have `tokens` more, and the mean time to
    a first token."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0,
        max_tokens=1 + lead + tokens if tokens else 1,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    begun = time.perf_counter()
    had = {f"{begun}-{index}": 0 for index in range(len(prompts))}
    for name, prompt in zip(had, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    first, before, waited = 0.0, dict(had), 0.0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not had[output.request_id] and output.outputs[0].token_ids:
                waited += time.perf_counter() - begun
            had[output.request_id] += len(output.outputs[0].token_ids)
        if not first and all(had.values()):
            first, before = time.perf_counter(), dict(had)
        if first and min(had[name] - before[name] for name in had) >= tokens:
            rest = time.perf_counter() - first
            engine.abort_request(list(had))
            if max(had[name] - before[name] for name in had) <= tokens + 1:
                return first - begun, rest, waited / len(had)
            break
    raise HmfError(
        f"--context: the cache cannot hold {len(prompts)} sequences of {len(prompts[0]):,} tokens at once; "
        "give fewer, or raise --gpu-memory-utilization"
    )


def _copy_rate() -> float | None:
    """Bytes/s, read plus written, of the fastest of several large copies on the GPU; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for mark in marks:
        target.copy_(source)
        mark.record()
    torch.cuda.synchronize()
    return 2 * COPIED / (min(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1e3)


def _main(folder: Path) -> int:
    """The process of one model: reads job.json in `folder` and appends lines of JSON to the file `events`."""

    def report(**event: Any) -> None:
        with (folder / "events").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    try:
        report(result=asdict(measure(job, lambda text: report(doing=text))))
    except HmfError as error:
        report(error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
