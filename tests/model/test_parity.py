# SPDX-License-Identifier: Apache-2.0
"""The published software's stored checkpoints: same tensors, same config, same logits.

One small case is kept beside the tests; the others come from the folder of the fixture `parity_dir`. A new case needs
no line here: wherever there is `io.safetensors` (or `io_NAME.safetensors` beside the checkpoint folder NAME), it runs.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hmf  # noqa: F401  (registers the architectures)
from hmf.layers.registry import MIXERS
from hmf.model.families import FAMILIES
from tests.numerics import assert_near

ROOT = Path(__file__).resolve().parents[2]
STORED = Path(os.environ.get("HMF_PARITY") or ROOT.parent / "shared" / "parity")  # as in the fixture `parity_dir`
OWN = ROOT / "tests" / "data" / "qwen3_gdn"


def checkpoints() -> list[Path]:
    """Every stored Hybrid, as a folder with config.json."""
    found = [path.parent for path in sorted(STORED.glob("**/config.json"))]
    return [OWN] + [
        path for path in found if json.loads((path / "config.json").read_text())["model_type"][:7] == "hybrid_"
    ]


def beside(checkpoint: Path, name: str) -> Path | None:
    """`name` in the checkpoint's folder, or as `<stem>_<folder>.<suffix>` or `<folder>_<stem>.<suffix>` next to it."""
    stem, suffix = name.split(".")
    names = (f"{stem}_{checkpoint.name}.{suffix}", f"{checkpoint.name}_{name}")
    options = [checkpoint / name, *(checkpoint.parent / other for other in names)]
    return next((path for path in options if path.is_file()), None)


def require_supported(checkpoint: Path) -> dict:
    """The stored config; skips when its family or one of its layer types has no row yet."""
    config = json.loads((checkpoint / "config.json").read_text())
    symbols = {symbol.rstrip("*") for symbol in config["hybrid_override_pattern"].split("-")} - {"", "*DA"}
    if missing := sorted(symbols - MIXERS.keys()):
        pytest.skip(f"no layer type {', '.join(missing)} in the registry")
    if (family := config["model_type"].removeprefix("hybrid_")) not in FAMILIES:
        pytest.skip(f"no family {family} in the table")
    return config


def name(path: Path) -> str:
    return "own" if path == OWN else str(path.relative_to(STORED))


every_checkpoint = pytest.mark.parametrize("checkpoint", checkpoints(), ids=name)
every_case = pytest.mark.parametrize(
    "checkpoint", [path for path in checkpoints() if beside(path, "io.safetensors")], ids=name
)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@torch.no_grad()
def test_full_forward_gives_the_stored_logits(checkpoint, dtype):
    """In either precision, to a multiple of the published software's own rounding in float32."""
    require_supported(checkpoint)
    stored = load_file(beside(checkpoint, "io.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    assert_near(model(stored["input_ids"]).logits, stored["logits_f64"], stored["logits"])


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@torch.no_grad()
def test_cached_decode_gives_the_stored_logits(checkpoint, dtype):
    """The stored prefill, then token by token, as published in float32 where a decode is stored."""
    require_supported(checkpoint)
    stored = load_file(beside(checkpoint, "io.safetensors"))
    plain = stored["logits"][:1]
    if pieces := {key.removeprefix("decode_").split("_")[0]: x for key, x in stored.items() if key[:7] == "decode_"}:
        plain = torch.cat([pieces["prefill"], pieces["logits"]], 1)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    ids, cache, pieces = stored["input_ids"][:1], None, []
    for piece in ids.split([40] + [1] * (ids.shape[1] - 40), 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_near(torch.cat(pieces, 1), stored["logits_f64"][:1], plain)


@every_checkpoint
def test_saving_gives_the_published_tensors(checkpoint, tmp_path):
    """Names, shapes and dtypes as listed, values bit for bit."""
    require_supported(checkpoint)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    lines = [f"{key} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for key, x in saved.items()]
    assert sorted(lines) == sorted(beside(checkpoint, "params.txt").read_text().splitlines())
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        changed = [key for key in stored.keys() if not torch.equal(stored.get_tensor(key), saved[key])]  # noqa: SIM118
    assert not changed


@every_checkpoint
def test_saving_gives_the_published_config(checkpoint, tmp_path):
    stored = require_supported(checkpoint)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del stored["transformers_version"]
    assert {key: saved.get(key, "absent") for key in stored} == stored
