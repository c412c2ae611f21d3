# SPDX-License-Identifier: Apache-2.0
"""A tiny Stage-1 run that can be cut off wherever it touches its folder.

A run touches its folder when it opens a file to write, renames, removes or makes something; files that compiled code
writes (weights, optimiser) are also cut in the middle, by halving them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from hmf.config.pattern import Pattern
from hmf.config.runs import DistillSettings, FinetuneRecipe
from hmf.data.tokenizer import train_tokenizer
from hmf.priming.export import export
from hmf.priming.stage0 import make_stage0
from hmf.training.distill import distill
from hmf.training.finetune import finetune

TEXTS = [
    " ".join(f"{word} {number}" for number in range(40)) for word in ("one", "two", "three", "four", "five", "six")
]


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_stage0(
    folder: Path,
    template: str = "{{ messages[0].content }}",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A fused checkpoint of 2 layers of width 32 with a tokenizer of 300 entries, and a corpus beside it."""
    (folder / "corpus").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        (folder / "corpus" / f"{number}.txt").write_text(text)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder / "base")
    train_tokenizer(TEXTS, 300, template, 128).save_pretrained(folder / "base")
    make_stage0(folder / "base", Pattern.parse("*-GDN"), folder / "stage0")
    return folder / "stage0"


def settings(stage0: Path, **training: Any) -> DistillSettings:
    return DistillSettings.model_validate(
        {
            "data": {"text": str(stage0.parent / "corpus"), "sequence_length": 32},
            "objective": {"layers": "mixer"},
            "training": {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 3e-3, "save_steps": 1}
            | training,
        }
    )


def make_tiny_hybrid(folder: Path, template: str = CHAT_TEMPLATE, **options: Any) -> Path:
    """The plain Hybrid of that checkpoint."""
    export(make_tiny_stage0(folder, template, **options), folder / "hybrid")
    return folder / "hybrid"


def finetune_recipe(hybrid: Path, run: Path, **changes: Any) -> FinetuneRecipe:
    """Three steps of continued pretraining of mixers and norms."""
    return FinetuneRecipe.model_validate(
        {
            "method": "cpt",
            "model": str(hybrid),
            "output": str(run),
            "data": {"text": str(hybrid.parent / "corpus"), "sequence_length": 32},
            "trainable": {"mixers": 3e-3, "norms": 1e-3},
            "training": {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1},
        }
        | changes
    )


def result(
    run: Path, stage: str = "stage1", saved: str = "stage1"
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Final weights, and the log without what depends on the clock."""
    log = json.loads((run / f"{stage}.log.json").read_text())
    timed = ("_runtime", "_samples_per_second", "_steps_per_second")
    log = [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in log]
    return load_file(run / saved / "model.safetensors"), log


def figures(entry: dict[str, float], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those of the named figures that an entry of a log has, to be compared."""
    return {name: torch.tensor(entry[name]) for name in names if name in entry}


def same(ours: Path, wanted: Path) -> bool:
    """Whether two runs ended with the same bits in all weights and in the log."""
    (weights, log), (right, right_log) = result(ours), result(wanted)
    return log == right_log and weights.keys() == right.keys() and all(torch.equal(weights[k], right[k]) for k in right)


def on_touch(run: Path, act: Callable[[Path | None], None]) -> None:
    """From now on call `act` before this process touches `run`, and after a compiled write, then with the file."""
    busy = False

    def touch(written: Path | None = None) -> None:
        nonlocal busy
        if not busy:
            busy = True
            act(written)
            busy = False

    def ours(path: Any) -> bool:
        return str(path).startswith(str(run))

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writes and ours(path):
                touch()
        elif event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            in_open_folder = event == "os.remove" and args[1] != -1  # as rmtree does it
            if ours(args[0]) or in_open_folder:
                touch()

    def then_touch(write: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            done = write(*args, **kwargs)
            touch(Path(args[place]))
            return done

        return wrapped

    sys.addaudithook(audit)
    torch.save = then_touch(torch.save, 1)
    transformers.modeling_utils.safe_save_file = then_touch(transformers.modeling_utils.safe_save_file, 1)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def record_states(stage0: Path, run: Path, states: Path) -> None:
    """Run to the end, and copy the folder as it is before each touch (a compiled write: with half the file)."""
    count = 0

    def copy(written: Path | None) -> None:
        nonlocal count
        if run.is_dir():
            shutil.copytree(run, states / f"{count:03d}")
            if written is not None and written.is_relative_to(run):
                halve(states / f"{count:03d}" / written.relative_to(run))
        count += 1

    states.mkdir()
    on_touch(run, copy)
    distill(stage0, run, settings(stage0))


def kill_on_touch(run: Path, kill_at: int) -> None:
    """Kill this process without notice when it touches the folder the `kill_at`-th time."""
    count = 0

    def kill(written: Path | None) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            if written is not None:
                halve(written)
            os.kill(os.getpid(), signal.SIGKILL)

    on_touch(run, kill)


def train(stage0: Path, run: Path, kill_at: int | None = None, environment: dict[str, str] | None = None) -> None:
    """Run, and be killed at a touch of the folder."""
    os.environ.update(environment or {})
    if kill_at is not None:
        kill_on_touch(run, kill_at)
    distill(stage0, run, settings(stage0))


def train_stage2(recipe: FinetuneRecipe, kill_at: int) -> None:
    """Run Stage 2, and be killed at a touch of its folder."""
    kill_on_touch(recipe.output, kill_at)
    finetune(recipe)


def start(target: Callable[..., None], *args: Any) -> multiprocessing.process.BaseProcess:
    """`target` in a process of its own; all are forked from one that has the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hmf.training.finetune", "hmf.priming.stage0"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def in_processes(
    target: Callable[..., None], args: tuple[Any, ...], count: int, extra: dict[int, tuple[Any, ...]] | None = None
) -> list[int | None]:
    """`target(*args, *extra[rank], environment)` in `count` gloo processes; when one fails, the others are ended, as
    torchrun does. Returns the exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(count):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(start(target, *args, *(extra or {}).get(rank, ()), environment))
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.1)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
    return [process.exitcode for process in processes]


def train_on_two(stage0: Path, run: Path, kill: tuple[int, int] | None = None) -> list[int | None]:
    """A run on two processes, one killed at `kill`, (rank, touch). Returns the exit codes."""
    extra = {rank: (kill[1] if kill and kill[0] == rank else None,) for rank in (0, 1)}
    return in_processes(train, (stage0, run), 2, extra)
