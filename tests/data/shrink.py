# SPDX-License-Identifier: Apache-2.0
"""The cases of this folder, cut from the full ones of the published software: `python -m tests.data.shrink FULL`.

A cut model holds the last layers of a full one, bit for bit. Its embeddings are the hidden states that enter those
layers in the full model, one "token" for each position, and its head holds the first rows of the full head. So its
logits and losses are the published ones. `tests/model/test_parity.py` compares both where it finds the full cases.
`qwen3_gdn` is whole: all layers, and the logits of its first tokens.

The hidden states of `fused_gdn` are published. Those of the other cases are computed here in float64 and rounded to
float32; the full model, computed in this way, gives the published float64 logits to a part in 10^6.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hmf  # noqa: F401  (registers the architectures)
from tests.numerics import in_float64

HERE = Path(__file__).parent
LAST_LAYER = ("qwen3_gka", "qwen3_mamba2", "qwen3_bmojof_gka")
TOKENS = 48  # of the first row; the stored decode is a prefill of 40 and then one by one
SMALL = 600  # numbers of a gradient worth its bytes
Tensors = dict[str, torch.Tensor]


def last_layer(full: Path) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Config, weights and logits of the last layer of a full Hybrid, on the first TOKENS positions of its first row."""
    config = json.loads((full / "config.json").read_text())
    weights, stored = load_file(full / "model.safetensors"), load_file(full / "io.safetensors")
    last = config["num_hidden_layers"] - 1
    model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float64).eval()
    entering: list[torch.Tensor] = []
    model.model.layers[last].register_forward_pre_hook(lambda layer, args: entering.append(args[0]))
    with in_float64(), torch.no_grad():
        logits = model(stored["input_ids"][:1]).logits
    torch.testing.assert_close(logits, stored["logits_f64"][:1], atol=1e-6, rtol=0)

    prefix = f"model.layers.{last}."
    cut = {name.replace(prefix, "model.layers.0."): x for name, x in weights.items() if name.startswith(prefix)} | {
        "model.embed_tokens.weight": entering[0][0, :TOKENS].float(),
        "model.norm.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"][:TOKENS].clone(),
    }
    outputs = {name: x[..., :TOKENS].clone() for name, x in _first_tokens(stored).items() if "logits" in name}
    outputs["input_ids"] = torch.arange(TOKENS)[None]
    symbol = config["layer_types"][last]
    config |= {"num_hidden_layers": 1, "hybrid_override_pattern": symbol, "layer_types": [symbol], "vocab_size": TOKENS}
    if "mamba2_config" in config:
        config["mamba2_config"]["n_layer"] = 1
    return config, cut, outputs


def after_first_layer(full: Path) -> tuple[dict[str, Any], Tensors, Tensors, dict[str, Any], Tensors]:
    """Base config, base weights, what the fused model has beside them, where it came from, losses and gradients.

    In the place of the first layer, which is the same on both paths, stands one of zeros, which hands on its input.
    """
    config = json.loads((full / "base/config.json").read_text())
    base, fused = load_file(full / "base/model.safetensors"), load_file(full / "fused/model.safetensors")
    origin, stage1 = json.loads((full / "tensor_origin.json").read_text()), load_file(full / "stage1.safetensors")
    rows = stage1["layer.0.hybrid_out"].flatten(0, 1)
    assert torch.equal(rows, stage1["layer.0.attn_out"].flatten(0, 1))
    config |= {"vocab_size": len(rows), "tie_word_embeddings": True}  # no loss here looks at the head
    cut = {name: torch.zeros_like(x) if ".layers.0." in name else x for name, x in base.items()}
    cut["model.embed_tokens.weight"] = rows.clone()
    del cut["lm_head.weight"]

    new = {name: x for name, x in fused.items() if name not in base}
    copies = {name: name.replace(".gdn.", ".self_attn.") for name in new}
    copies = {name: source for name, source in copies.items() if source in cut and torch.equal(new[name], cut[source])}
    mixers = {name: x for name, x in new.items() if name not in copies}
    origin |= {"copied_same_name_from_base": sorted(cut), "same_as": copies}

    outputs = {name: x for name, x in stage1.items() if name.startswith("loss.eval.")}
    outputs["input_ids"] = torch.arange(len(rows)).view_as(stage1["input_ids"])
    for kind, file in {"grad": "", "kernels": "_kernels"}.items():
        gradients = load_file(full / f"stage1_grads_none_prelmhead{file}.safetensors")
        outputs |= {name.replace("grad", kind, 1): x for name, x in gradients.items() if x.numel() <= SMALL}
    return config, cut, mixers, origin, outputs


def whole(full: Path) -> Tensors:
    """The logits of all layers on the first TOKENS positions of the first row."""
    return _first_tokens(load_file(full / "io.safetensors"))


def _first_tokens(stored: Tensors) -> Tensors:
    """input_ids and all logits; those of the decode come after its prefill of 40 tokens."""
    counts = {name: TOKENS - 40 if name.startswith("decode_logits") else TOKENS for name in stored}
    return {name: x[:1, : counts[name]].clone() for name, x in stored.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def main(full: Path) -> None:
    save_file(whole(full / "qwen3_gdn"), HERE / "qwen3_gdn" / "io.safetensors")
    for case in LAST_LAYER:
        config, weights, outputs = last_layer(full / case)
        (folder := HERE / case).mkdir(exist_ok=True)
        _write_json(folder / "config.json", config)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        save_file(outputs, folder / "io.safetensors")
        lines = [f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}\n" for name, x in weights.items()]
        (folder / "params.txt").write_text("".join(sorted(lines)))
    config, base, mixers, origin, stage1 = after_first_layer(full / "fused_gdn")
    (folder := HERE / "fused_gdn" / "base").mkdir(exist_ok=True, parents=True)
    _write_json(folder / "config.json", config)
    save_file(base, folder / "model.safetensors", {"format": "pt"})
    _write_json(HERE / "fused_gdn" / "tensor_origin.json", origin)
    save_file(mixers, HERE / "fused_gdn" / "mixers.safetensors")
    save_file(stage1, HERE / "fused_gdn" / "stage1.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
