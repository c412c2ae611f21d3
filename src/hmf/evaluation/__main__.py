# SPDX-License-Identifier: Apache-2.0
"""Scores a model folder: `python -m hmf.evaluation MODEL --samples 200 --length 1024 --out scores.json`."""

import argparse
import json
import sys
from pathlib import Path

import torch

import hmf  # noqa: F401  registers the hybrid architectures
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.evaluation.run import DEFAULT_TASKS, baselines, evaluate_model
from hmf.model.checkpoint import load_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hmf.evaluation", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", nargs="*", default=list(DEFAULT_TASKS))
    parser.add_argument("--samples", type=int, default=100, help="of each task")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest conversations")
    parser.add_argument("--direct", action="store_true", help="answers without thinking")
    parser.add_argument("--max-bytes", type=int, help="held-out text; all of it when left out")
    parser.add_argument("--baselines", action="store_true", help="also score order-3 models of bytes and tokens")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the scores there as JSON")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype=torch.float32, generates=bool(options.tasks)).to(device)
    scores = evaluate_model(
        model,
        tokenizer,
        options.tasks,
        options.samples,
        options.length,
        thinking=not options.direct,
        max_bytes=options.max_bytes,
        batch_size=options.batch_size,
    )
    if options.baselines:
        scores["baselines"] = baselines(tokenizer, max_bytes=options.max_bytes)
    printed = json.dumps(scores, indent=2)
    print(printed)
    if options.out:
        options.out.write_text(printed + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except HmfError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
