# SPDX-License-Identifier: Apache-2.0
"""The published software's stored checkpoints: same tensors, same config, same logits.

Small cases are kept in `tests/data`; where the full ones are found (`tests.parity`), they run too. A new full case
needs no line here: it runs wherever there is `io.safetensors` (or `io_NAME.safetensors` beside the checkpoint folder
NAME).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hmf  # noqa: F401  (registers the architectures)
from hmf.layers.registry import MIXERS
from hmf.model.families import FAMILIES
from tests.data.shrink import LAST_LAYER, last_layer, whole
from tests.numerics import assert_near
from tests.parity import FULL, SMALL, full_case, small_case

SMALL_CASES = ("qwen3_gdn", *LAST_LAYER)


def checkpoints(*files: str) -> list:
    """Every stored Hybrid with these files, as a folder with config.json: the small ones, and full ones if any."""
    configs = {path.parent: json.loads(path.read_text()) for path in sorted(FULL.glob("**/config.json"))}
    hybrids = [path for path, config in configs.items() if config["model_type"].startswith("hybrid_")]
    names = [str(path.relative_to(FULL)) for path in hybrids if all(beside(path, name) for name in files)]
    return [*map(small_case, SMALL_CASES), *map(full_case, names or ["*"])]


def beside(checkpoint: Path, name: str) -> Path | None:
    """`name` in the checkpoint's folder, or as `<stem>_<folder>.<suffix>` or `<folder>_<stem>.<suffix>` next to it."""
    stem, suffix = name.split(".")
    names = (f"{stem}_{checkpoint.name}.{suffix}", f"{checkpoint.name}_{name}")
    options = [checkpoint / name, *(checkpoint.parent / other for other in names)]
    return next((path for path in options if path.is_file()), None)


def require_supported(checkpoint: Path) -> dict:
    """The stored config; skips a full case whose family or one of whose layer types has no row yet."""
    config = json.loads((checkpoint / "config.json").read_text())
    if checkpoint.parent == SMALL:
        return config
    symbols = {symbol.rstrip("*") for symbol in config["hybrid_override_pattern"].split("-")} - {"", "*DA"}
    if missing := sorted(symbols - MIXERS.keys()):
        pytest.skip(f"no layer type {', '.join(missing)} in the registry")
    if (family := config["model_type"].removeprefix("hybrid_")) not in FAMILIES:
        pytest.skip(f"no family {family} in the table")
    return config


every_checkpoint = pytest.mark.parametrize("checkpoint", checkpoints())
every_case = pytest.mark.parametrize("checkpoint", checkpoints("io.safetensors"))


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


@pytest.mark.parametrize("full", [full_case(name) for name in SMALL_CASES])
def test_a_small_case_is_cut_from_the_full_one(full):
    """Bit for bit but for the hidden states that enter the layer, which are computed."""
    small = SMALL / full.name
    stored, outputs = load_file(small / "model.safetensors"), load_file(small / "io.safetensors")
    if full.name in LAST_LAYER:
        config, weights, published = last_layer(full)
        entering, computed = (tensors.pop("model.embed_tokens.weight") for tensors in (stored, weights))
        assert_near(entering, computed, entering)
        assert json.loads((small / "config.json").read_text()) == config
    else:
        weights, published = load_file(full / "model.safetensors"), whole(full)
    for ours, theirs in ((stored, weights), (outputs, published)):
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
