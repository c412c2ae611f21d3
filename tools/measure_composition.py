# SPDX-License-Identifier: Apache-2.0
"""Evaluate generated tasks beyond the trained length, with and without state composition (docs/composition.md).

    .venv/bin/python tools/measure_composition.py runs/quickstart/model [--lengths 2048,4096] [--tasks recall,needle]
                     [--samples 10] [--seeds 0,1,2] [--chunk 768] [--only concatenated,fused --only ordinary]

The table has one row for each way of processing prompts, and one column for each task and length. A cell has the
percentage of correct answers over all seeds, its 95% Wilson interval, and the correct answers of each seed. The prompts
are the same in every row.
"""

import argparse
import itertools
from typing import get_args

import torch

from hmf.bench import machine
from hmf.data import tasks
from hmf.data.tokenizer import load_tokenizer
from hmf.evaluation.chunks import Composition, Keys, States
from hmf.evaluation.generation import generate_answers
from hmf.evaluation.results import wilson
from hmf.folders import resolve_base
from hmf.model.checkpoint import load_model

ORDINARY = "ordinary"
EVERY = [ORDINARY, *(",".join(names) for names in itertools.product(get_args(Keys), get_args(States)))]


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", type=numbers, default=[2048, 4096])
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=["recall", "needle"])
    parser.add_argument("--samples", type=int, default=10, help="prompts of each task, length and seed")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--chunk", type=int, default=Composition.chunk)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--only", action="append", choices=EVERY, help="a way to run, repeatable; default: every way")
    options = parser.parse_args()

    place = resolve_base(options.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model = load_tokenizer(place), load_model(place, generates=True).eval().to(device)
    if device == "cpu":
        model = model.float()
    columns = list(itertools.product(options.tasks, options.lengths))
    samples = {
        (task, length): [
            tasks.sample(task, seed * options.samples + number, tokenizer, length, split="heldout")
            for seed in options.seeds
            for number in range(options.samples)
        ]
        for task, length in columns
    }
    print("| prompts | " + " | ".join(f"{task} {length:,}" for task, length in columns) + " |")
    print("|---" * (len(columns) + 1) + "|", flush=True)
    for way in options.only or EVERY:
        compose = None if way == ORDINARY else Composition.parse(way, chunk=options.chunk)
        cells = []
        for column in columns:
            asked, title = samples[column], f"{way}: {column[0]} {column[1]}"
            answers = generate_answers(model, tokenizer, asked, options.batch_size, 64, title, compose)
            right = [sample.is_correct(answer.text) for sample, answer in zip(asked, answers, strict=True)]
            cells.append(cell(right, options.samples))
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{len(options.seeds)} x {options.samples} prompts a cell, chunks of up to {options.chunk} tokens.")
    print("\n".join(machine.lines()))


def cell(right: list[bool], samples: int) -> str:
    share = sum(right) / len(right)
    low, high = wilson(share, len(right))
    seeds = "/".join(str(sum(right[at : at + samples])) for at in range(0, len(right), samples))
    return f"{share:.0%} ({low:.0%} to {high:.0%}; {seeds})"


if __name__ == "__main__":
    main()
