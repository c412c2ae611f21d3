# SPDX-License-Identifier: Apache-2.0
"""Profile a decode step in vLLM by kernels, for small Hybrids with the layer shapes of Qwen3-8B.

    python3 tools/profile_step.py [--types base,gdn,gka,bmojo,mamba2] [--layers 8] [--sequences 20] [--tokens 16384]
                            [--out DIR] [--config recipes/configs/qwen3-8b]

`hmf` (any revision) must be on the path. Engines of all types start in parallel, each in its own process, and are timed
and profiled in turn under a lock. Their KV caches have a fixed size, so that no engine measures the memory of the
others. For each type, the script prints the time of a step without the profiler, kernel time by group and by kernel,
gaps, and the sequence of kernels of one mixer. DIR/TYPE.txt has the same, with one whole step.
"""

import argparse
import fcntl
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

SYMBOLS = {"gdn": "GDN", "kda": "KDA", "gka": "GKA", "bmojo": "BMF", "mamba2": "M2", "swa": "SWA"}
GROUPS = (
    ("attention (vLLM)", r"flash|fmha|reshape_and_cache|prepare_varlen|attention"),
    ("convolution", r"causal_conv1d"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|splitK|gemv|_dot_kernel"),
    (
        "recurrence",
        r"^_(decode|step|stretch|merge|gates|conv_|mamba|finish|prepare)\w*"
        r"|selective_scan|fused_recurrent|gdn|kda|delta_rule",
    ),
    ("inductor", r"^triton_"),
    ("norms, copies, sampling", r""),
)
WARM, TIMED, PROFILED = 16, 64, 24


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default="gdn,gka,bmojo,mamba2")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--cache-gib", type=float, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--config", default="recipes/configs/qwen3-8b")
    parser.add_argument("--out", default=os.environ.get("OUT", "."))
    parser.add_argument("--rows", type=int, default=28, help="kernels to print for each type")
    parser.add_argument("--serial", action="store_true", help="one engine after the other")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return child(options, Path(options.job))

    from hmf.bench import throughput

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    names, begun = options.types.split(","), time.time()
    with tempfile.TemporaryDirectory() as work, throughput._plugin() as plugin:
        running = []
        for name in names:
            folder = Path(work) / name
            job = prepare(options, name, folder)
            env = os.environ | job["environment"] | plugin
            log = (out / f"{name}.log").open("wb")
            argv = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--job", str(folder)]
            process = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            if options.serial:
                process.wait()
            running.append((name, folder, process))
        for name, folder, process in running:
            process.wait()
            if process.returncode or not (folder / "report").exists():
                print(f"== {name}: failed; the end of its log:")
                lines = (out / f"{name}.log").read_text(errors="replace").splitlines()
                print("\n".join([line[:300] for line in lines if re.search(r"Error|error:", line)][:5] + lines[-12:]))
                continue
            report = (folder / "report").read_text()
            (out / f"{name}.txt").write_text(report)
            print(report.split("-- the whole step")[0], flush=True)
    print(f"{time.time() - begun:.0f} s in all")


def prepare(options, name, folder):
    """The config of a small model in `folder`, and how its engine starts."""
    from hmf.bench import engine, throughput
    from hmf.config.pattern import Pattern
    from hmf.model.checkpoint import load_config
    from hmf.model.convert import hybrid_config

    config = load_config(options.config, weights=False)
    fields = config.to_dict() | {"num_hidden_layers": options.layers}
    fields.pop("layer_types", None)
    fields.pop("max_window_layers", None)
    config = type(config)(**fields)
    if name != "base":
        config = hybrid_config(config, Pattern.parse("-".join(["*", SYMBOLS[name]] * (options.layers // 2))))
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    steps = WARM + TIMED + PROFILED + 40
    run = throughput.Run([engine.Load(options.tokens, options.sequences)], output=steps, dtype=options.dtype)
    measured = throughput.subject(name, folder, run)
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(folder / "trace"),
        "torch_profiler_with_stack": False,
        "torch_profiler_use_gzip": False,
        "torch_profiler_dump_cuda_time_total": False,
        "ignore_frontend": True,
    }
    if on_gpu():
        profiler["torch_profiler_activities"] = ["CUDA"]
    arguments = [*measured.arguments, "--profiler-config", json.dumps(profiler)]
    if on_gpu():
        arguments += ["--kv-cache-memory-bytes", str(int(options.cache_gib * 2**30))]
        at = arguments.index("--gpu-memory-utilization")
        arguments[at + 1] = "0.2"
    lead = measured.loads[0].lead(run.batched_tokens)
    job = {"arguments": arguments, "vocabulary": config.vocab_size, "lead": lead, "environment": measured.environment}
    (folder / "job.json").write_text(json.dumps(job))
    return job


def on_gpu():
    import torch

    return torch.cuda.is_available()


def child(options, folder):
    import torch
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    job = json.loads((folder / "job.json").read_text())
    begun = time.perf_counter()
    arguments = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(job["arguments"])
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(arguments))
    started = time.perf_counter() - begun
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine, generator = llm.llm_engine, torch.Generator().manual_seed(0)
        steps = job["lead"] + WARM + TIMED + PROFILED + 30
        params = SamplingParams(
            temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        prompts = torch.randint(job["vocabulary"], (options.sequences, options.tokens), generator=generator).tolist()
        had = {str(n): 0 for n in range(len(prompts))}
        for name, prompt in zip(had, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)

        def until(count):
            while min(had.values()) < count:
                for output in engine.step():
                    had[output.request_id] += len(output.outputs[0].token_ids)

        until(1)
        at = max(had.values())
        until(at + WARM)
        clock = time.perf_counter()
        until(at + WARM + TIMED)
        step = (time.perf_counter() - clock) / TIMED
        engine.start_profile()
        until(at + WARM + TIMED + PROFILED)
        engine.stop_profile()
        engine.abort_request(list(had))
        deadline = time.time() + 60
        while not (traces := [p for p in (folder / "trace").glob("*") if "json" in p.name]) and time.time() < deadline:
            time.sleep(0.5)
    text = report(read(max(traces, key=lambda p: p.stat().st_size)), step, started, options)
    (folder / "report").write_text(f"== {folder.name}: {text}\n")
    engine.engine_core.shutdown()
    return 0


def read(trace):
    """[(start us, duration us, name)] of the kernels, in order."""
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in categories]
    if not kernels:  # on a CPU, for a test of this script
        kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
    return sorted((float(e["ts"]), float(e["dur"]), e["name"]) for e in kernels)


def short(name):
    if (match := re.search(r"(causal_conv1d\w*|selective_scan\w*)", name)) and not name.startswith("_"):
        return match[0]
    name = re.sub(r"^void ", "", name)
    return name if len(name) <= 78 else name[:60] + "..." + name[-15:]


def group_of(name):
    return next(group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE))


def report(events, step, started, options):
    counts, totals = defaultdict(int), defaultdict(float)
    for _, duration, name in events:
        counts[name] += 1
        totals[name] += duration
    once = [name for name in counts if abs(counts[name] - PROFILED) <= 3]
    if not once:
        return f"no kernel runs once a step; counts {dict(counts)}"
    anchor = max(once, key=totals.get)
    marks = [at for at, _, name in events if name == anchor]
    marks = marks[2:-2] if len(marks) > 8 else marks
    steps, period = len(marks) - 1, (marks[-1] - marks[0]) / (len(marks) - 1)
    inside = [e for e in events if marks[0] <= e[0] < marks[-1]]
    busy, end, gaps = 0.0, inside[0][0], defaultdict(lambda: [0.0, 0])
    for before, (at, duration, name) in zip([None, *inside[:-1]], inside, strict=True):
        if before is not None and at > end:
            gap = gaps[short(before[2])[:40] + " -> " + short(name)[:40]]
            gap[0] += at - end
            gap[1] += 1
        busy += max(0.0, at + duration - max(at, end))
        end = max(end, at + duration)
    by_name, number, by_group = defaultdict(float), defaultdict(int), defaultdict(float)
    for _, duration, name in inside:
        by_name[name] += duration / steps
        number[name] += 1
        by_group[group_of(name)] += duration / steps
    lines = [
        f"{options.layers} layers, {options.sequences} x {options.tokens}: step {step * 1e3:.3f} ms unprofiled, "
        f"{period / 1e3:.3f} ms profiled, kernels {busy / steps / 1e3:.3f} ms, idle "
        f"{(period - busy / steps) / 1e3:.3f} ms, {len(inside) / steps:.1f} kernels a step; "
        f"engine ready in {started:.0f} s",
        "by group, us a step: " + ", ".join(f"{g} {t:.0f}" for g, t in sorted(by_group.items(), key=lambda x: -x[1])),
        f"{'us/step':>9} {'n/step':>7} {'us each':>8}  kernel",
    ]
    for name, time_ in sorted(by_name.items(), key=lambda x: -x[1])[: options.rows]:
        lines.append(f"{time_:9.1f} {number[name] / steps:7.1f} {time_ * steps / number[name]:8.2f}  {short(name)}")
    lines.append("largest gaps, us a step (count a step):")
    for pair, (total, count) in sorted(gaps.items(), key=lambda x: -x[1][0])[:6]:
        lines.append(f"{total / steps:9.1f} ({count / steps:.1f})  {pair}")
    one = [e for e in inside if marks[steps // 2] <= e[0] < marks[steps // 2 + 1]]
    lines.append("-- two layers in the middle of a step: offset, gap before, duration us")
    lines += table(one[len(one) * 3 // 8 : len(one) * 3 // 8 + len(one) * 5 // (2 * options.layers) + 1])
    lines.append("-- the whole step")
    lines += table(one)
    return "\n".join(lines)


def table(events):
    lines, end = [], events[0][0] if events else 0
    for at, duration, name in events:
        lines.append(f"{at - events[0][0]:9.1f} {max(0.0, at - end):6.1f} {duration:8.2f}  {short(name)}")
        end = max(end, at + duration)
    return lines


if __name__ == "__main__":
    sys.exit(main())
