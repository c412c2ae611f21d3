# SPDX-License-Identifier: Apache-2.0
"""Recipes with keys taken away, renamed, retyped and driven to extremes, and text that is no YAML."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.campaign import call, examples, require_promised
from tests.faults.damage import VALUES, YAML_TEXTS, change_bytes, change_tree

pytestmark = pytest.mark.faults

STEPS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
}
TEXT = {"text": "$CORPUS", "sequence_length": 32, "text_share": 1.0, "tasks": {}}
FILTERS = {"min_tokens": 1, "max_tokens": 900, "repetition": {"top_ngram": {2: 0.9}}}
RECIPES = {
    "prime": {
        "base": "$BASE",
        "output": "$OUT",
        "seed": 0,
        "hybrid": {"mixer": "gdn", "layers": [1], "conv_start": "identity", "options": {"gdn": {"conv_size": 3}}},
        "distill": {
            "data": TEXT,
            "training": STEPS,
            "objective": {"layerwise_steps": 1, "pre_lm_head": {0: 1.0, 2: 0.5}, "kl": 0.5, "kl_top_k": 4},
        },
        "evaluate": {"tasks": [], "samples": 1, "length": 96, "text_bytes": 300},
    },
    "distill": {
        "model": "$STAGE0",
        "output": "$OUT",
        "seed": 0,
        "data": TEXT,
        "objective": {"layers": "mixer"},
        "training": STEPS | {"precision": "bfloat16", "gradient_checkpointing": True, "weight_decay": 0.1},
    },
    "finetune": {
        "method": "cpt",
        "model": "$HYBRID",
        "output": "$OUT",
        "data": TEXT,
        "trainable": {"mixers": 1e-3},
        "rope": {"theta": 2e4, "max_position_embeddings": 256, "scaling": {"rope_type": "yarn", "factor": 2.0}},
        "lora": {"rank": 2, "alpha": 4.0, "learning_rate": 1e-3},
        "dtype": "bfloat16",
        "training": {key: value for key, value in STEPS.items() if key != "learning_rate"},
    },
    "finetune dpo": {
        "method": "dpo",
        "model": "$HYBRID",
        "output": "$OUT",
        "trainable": {"all": 1e-3},
        "pairs": {"path": "$PAIRS", "sequence_length": 64, "beta": 0.1},
        "training": {key: value for key, value in STEPS.items() if key != "learning_rate"},
    },
    "data prepare": {
        "output": "$OUT",
        "tokenizer": "$BASE",
        "sequence_length": 32,
        "seed": 1,
        "tokens": 300,
        "turns": "last",
        "sources": [
            {"path": "$CORPUS", "weight": 1, "format": "text", "filters": FILTERS},
            {"name": "talk", "path": "$CHAT", "weight": 1, "messages_field": "messages"},
        ],
        "max_truncated_share": 1.0,
        "packing_window": 8,
        "shard_documents": 3,
    },
}
NAMES = [
    "base",
    "output",
    "seed",
    "model",
    "data",
    "prepared",
    "path",
    "dataset",
    "weight",
    "tasks",
    "lora",
    "pairs",
    "ratio",
    "pattern",
    "on_policy",
    "gpus",
    "strategy",
    "sequence_parallel",
    "report_to",
    "x",
    "",
]
SAID = [*VALUES, 16, 17, 2**24, 10**9, "1e3", "2020-01-01", "h200x8", "fsdp2", "deepspeed", "wandb", "stdlib", "*-GDN"]


def write_inputs(home: Path) -> None:
    """A chat and pairs of preferences as JSON lines."""
    talk = [{"role": "user", "content": "one 1"}, {"role": "assistant", "content": "two 2"}]
    (home / "chat.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    (home / "pairs.jsonl").write_text('{"prompt": "one 1", "chosen": "two 2", "rejected": "six 6"}\n' * 3)


def filled(tree, names: dict[str, str]):
    """A copy of a recipe with the places in it."""
    if isinstance(tree, dict):
        return {key: filled(value, names) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled(item, names) for item in tree]
    return names.get(tree, tree) if isinstance(tree, str) else tree


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", RECIPES)
def test_damaged(kind, models, campaign):
    @examples(20)
    @given(st.data())
    def attempt(data):
        with tempfile.TemporaryDirectory() as folder:
            home, output = Path(folder) / "in", Path(folder) / "out/result"
            home.mkdir()
            output.parent.mkdir()
            write_inputs(home)
            recipe = filled(
                RECIPES[kind],
                {
                    "$BASE": str(models / "base"),
                    "$STAGE0": str(models / "stage0"),
                    "$HYBRID": str(models / "hybrid"),
                    "$CORPUS": str(models / "corpus"),
                    "$PAIRS": str(home / "pairs.jsonl"),
                    "$CHAT": str(home / "chat.jsonl"),
                    "$OUT": str(output),
                },
            )
            act = data.draw(st.sampled_from(["tree"] * 8 + ["text", "bytes"]))
            file = home / "recipe.yaml"
            done = change_tree(data.draw, recipe, SAID, NAMES) if act == "tree" else act
            file.write_text(yaml.safe_dump(recipe, sort_keys=False))
            if act == "text":
                file.write_text(done := data.draw(st.sampled_from(YAML_TEXTS)))
            elif act == "bytes":
                file.write_bytes(change_bytes(data.draw, file.read_bytes()))
            more = ("--workers", "1") if kind == "data prepare" else ()
            arguments = kind.removesuffix(" dpo").split()
            somewhere = Path(folder) / "a/b/c"  # for an output that is changed
            somewhere.mkdir(parents=True)
            with contextlib.chdir(somewhere):
                kept = act not in ("text", "bytes") and recipe.get("output") == str(output)
                written = output if kept else None
                campaign.run(*arguments, file, *more, inputs=home, output=written, damage=done[:300])

    attempt()


def test_tokens_that_no_source_can_give(models, tmp_path):
    home, output = tmp_path / "in", tmp_path / "out/result"
    home.mkdir()
    output.parent.mkdir()
    (home / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "output": str(output),
                "tokenizer": str(models / "base"),
                "sequence_length": 32,
                "tokens": 10**16,
                "sources": [{"path": str(models / "corpus"), "weight": 1}],
            }
        )
    )
    require_promised(call("data", "prepare", home / "recipe.yaml", "--workers", "1", seconds=3))
