# SPDX-License-Identifier: Apache-2.0
"""A GDN Hybrid of a dense Qwen3 as a stock `Qwen3_5ForCausalLM`, which loads without this package.

Same numbers, other tensors. Qwen3.5's text model is a hybrid of attention and Gated DeltaNet by itself:

- Its GDN layers repeat queries with keys, so keys, values and their convolutions are stored for all heads.
- Its attention has an output gate. Zero rows give sigmoid(0), one half, and the output projection is doubled.
- Its norms multiply by one plus the stored weight; the norm inside GDN by the weight itself.

Legend: H heads, K head_dim, D hidden_size, W conv_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.auto import tokenization_auto

from hmf.config.layers import LAYER_KINDS, layer_options
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError, listed, notice

from .checkpoint import STORED, load_config, load_model, save_checkpoint
from .configuration import OPTION_KEYS
from .files import require_finite

FORMAT = "qwen3_5"
SYMBOL, GDN = "GDN", LAYER_KINDS["GDN"]
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


def _must_be(value: Any, fix: str) -> Callable[[Any, Any], str | None]:
    return lambda given, config: None if given == value else fix


def _norm_eps(given: float, config: Any) -> str | None:
    wanted = config.rms_norm_eps
    if given == wanted:
        return None
    return (
        f"the format has one epsilon for all norms, here rms_norm_eps, {wanted:g}, with which layers of a new Hybrid "
        f"start; to convert this one, write {wanted:g} there, which changes its numbers a little, and evaluate it again"
    )


def _expressed(given: Any, config: Any) -> str | None:
    return None


TRAIN = "make the Hybrid anew without it (hmf init), or keep it in its own format, which hmf serve serves"
# Every option of GDN: a function of its value and the config that says why it cannot be expressed, or None.
OPTIONS: dict[str, Callable[[Any, Any], str | None]] = {
    **dict.fromkeys(("hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads"), _expressed),
    "use_gate": _must_be(True, f"the format always gates the output; {TRAIN}"),
    "conv_size": _expressed,  # width 1 gets an older tap of zero
    "use_short_conv": _expressed,  # left out: a filter that passes the current token through
    "kv_proj_rank": lambda given, config: f"the format repeats heads and adds nothing; {TRAIN}" if given else None,
    "kv_learnable_residual": _expressed,  # without kv_proj_rank it does nothing
    "allow_neg_eigval": _must_be(False, f"the format's beta is at most 1; {TRAIN}"),
    "conv_bias": _must_be(False, f"the format's convolutions have no bias; {TRAIN}"),
    "norm_eps": _norm_eps,
}
# Keys of a Qwen3 Hybrid's config that say what the new config says in other words.
REPLACED = {
    *("model_type", "architectures", "transformers_version", "hybrid_override_pattern", "layer_types", "state_dtype"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "rope_parameters"),
    *("_name_or_path", "output_attentions"),  # of a call, not of a model
    *OPTION_KEYS,
}


@dataclass(frozen=True)
class NativeReport:
    """Numbers of parameters, embeddings that serve as the head counted once."""

    before: int
    after: int

    def describe(self) -> str:
        """One line of text."""
        added = self.after - self.before
        return (
            f"{self.after:,} parameters: {added:,} ({added / self.before:.1%}) more than the Hybrid, for repeated "
            "heads and for attention's gates"
        )


def convert(source: str | Path, out: str | Path) -> NativeReport:
    """`hmf convert`: write the Hybrid `source` as a stock Qwen3.5 at the new directory `out`, with all its other files.

    Tensors keep their dtypes; norms are float32 where the rounding of weight - 1 would change them. HmfError that
    names the key for what the format cannot express.
    """
    native_config(load_config(source), f"{source}/config.json")  # before the weights are read
    model = load_model(source, dtype=STORED)
    require_finite(Path(source))
    return save_native(model, out, companions=source)


def save_native(model: PreTrainedModel, out: str | Path, companions: str | Path) -> NativeReport:
    """Save a GDN Hybrid in memory as a stock Qwen3.5, with what stands beside the weights in `companions`."""
    config = native_config(model.config, f"{companions}/config.json")
    with torch.device("meta"):
        native = Qwen3_5ForCausalLM(config)
    missing, unexpected = native.load_state_dict(native_tensors(model, str(companions)), strict=False, assign=True)
    if wrong := sorted({*missing, *unexpected}):
        raise HmfError(f"{companions}: tensors without a counterpart in {FORMAT}: {listed(wrong)}")
    native.tie_weights()
    native.generation_config = model.generation_config
    native.config.dtype = model.config.dtype or model.dtype
    save_checkpoint(native, out, companions)
    report = NativeReport(model.num_parameters(), native.num_parameters())
    notice(f"{out}: {report.describe()}")
    return report


def native_config(config: Any, source: str = "config.json") -> Qwen3_5TextConfig:
    """The stock config of a Hybrid's; HmfError that names the key for what it cannot express."""

    def refuse(key: str, why: str) -> NoReturn:
        raise HmfError(f"{source}: {key}: {why}")

    name, pattern = config.model_type, getattr(config, "pattern", None)
    if pattern is None:
        refuse("model_type", f"{name!r} is no Hybrid; make one with hmf init, or serve the model as it is")
    if pattern.fused:
        refuse("hybrid_override_pattern", f"the teacher is still there; use hmf export --format {FORMAT}")
    if name == "hybrid_qwen3_moe":
        refuse("model_type", f"{name!r} has experts, and {FORMAT} is dense; use the Hybrid's own format")
    if name != "hybrid_qwen3":
        refuse(
            "model_type",
            f"{name!r}: attention in {FORMAT} normalises queries and keys, which that family's does not; only "
            "Hybrids of Qwen3 are converted; use the Hybrid's own format",
        )
    if others := sorted(set(pattern.symbols) - {ATTENTION, SYMBOL}):
        refuse(
            "hybrid_override_pattern",
            f"{', '.join(others)}: {FORMAT} has attention and GDN layers only; use the Hybrid's own format",
        )
    if SYMBOL not in pattern.symbols or ATTENTION not in pattern.symbols:
        refuse("hybrid_override_pattern", f"{pattern}: {FORMAT} needs both attention and GDN layers; give a mix")
    if config.attention_bias:
        refuse("attention_bias", "engines read no biases in this format; use the Hybrid's own format")
    if config.hidden_act not in ("silu", "swish"):
        refuse(
            "hidden_act",
            f"{config.hidden_act!r} would become the activation of the convolutions too, which have silu; use the "
            "Hybrid's own format",
        )
    kept_windows = [
        w for w, symbol in zip(config.attention_windows, pattern.symbols, strict=True) if symbol == ATTENTION
    ]
    if any(kept_windows):
        refuse("sliding_window", "attention in the format sees all tokens; use the Hybrid's own format")
    options = layer_options(config, SYMBOL)
    if unknown := type(options).model_fields.keys() ^ OPTIONS.keys():
        raise HmfError(f"{GDN.config_key}: {listed(sorted(unknown))}: unknown to the conversion to {FORMAT}")
    for key, reason in OPTIONS.items():
        value = getattr(options, key)
        if why := reason(value, config):
            refuse(f"{GDN.config_key}.{key}", f"{value!r}: {why}")

    fields = config.to_dict()
    known = {field.name for field in dataclasses.fields(Qwen3_5TextConfig)}
    kept = {key: value for key, value in fields.items() if key in known - REPLACED}
    if dropped := sorted(fields.keys() - kept.keys() - REPLACED):
        notice(f"{source}: not in {FORMAT}'s config, and left out: {listed(dropped, 8)}")
    # Not the sections of positions by image axes: in text all axes have the same position.
    rope = {key: value for key, value in config.rope_parameters.items() if not key.startswith("mrope")}
    return Qwen3_5TextConfig(
        **kept
        | {
            "architectures": [Qwen3_5ForCausalLM.__name__],
            "layer_types": [
                "full_attention" if symbol == ATTENTION else "linear_attention" for symbol in pattern.symbols
            ],
            "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,  # the class would write its own default beside the table
            "linear_conv_kernel_dim": max(2, options.conv_size) if options.use_short_conv else 2,
            "linear_key_head_dim": options.head_dim,
            "linear_value_head_dim": options.head_dim,
            "linear_num_key_heads": options.num_heads,
            "linear_num_value_heads": options.num_heads,
            "mamba_ssm_dtype": config.state_dtype,  # vLLM's name for it
            # Read where tokenizer_config.json names no class: Qwen3.5's own would split text in another way.
            "tokenizer_class": tokenization_auto.TOKENIZER_MAPPING_NAMES[config.family.model_type],
        }
    )


@torch.no_grad()
def native_tensors(model: PreTrainedModel, source: str = "") -> dict[str, torch.Tensor]:
    """The tensors of `native_config(model.config)` by name, from those of a Hybrid; unchanged ones are shared."""
    given, found = dict(model.state_dict()), {}
    rounded: list[str] = []

    def minus_one(name: str) -> torch.Tensor:
        weight = given.pop(name)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) - 1
        stored = wide.to(weight.dtype)
        if torch.equal(wide, stored.to(wide.dtype)):
            return stored
        rounded.append(name)
        return wide

    for index, symbol in enumerate(model.config.pattern.symbols):
        layer = f"model.layers.{index}."
        if symbol == ATTENTION:
            home = f"{layer}self_attn."
            query = given.pop(f"{home}q_proj.weight").unflatten(0, (model.config.num_attention_heads, -1))  # [H, K, D]
            found[f"{home}q_proj.weight"] = torch.cat([query, torch.zeros_like(query)], 1).flatten(0, 1)
            found[f"{home}o_proj.weight"] = given.pop(f"{home}o_proj.weight") * 2
            for name in ("q_norm.weight", "k_norm.weight"):
                found[home + name] = minus_one(home + name)
        else:
            mixer = model.get_submodule(layer + GDN.module_name)
            own = {name: given.pop(f"{layer}{GDN.module_name}.{name}") for name in mixer.state_dict()}
            found |= {f"{layer}linear_attn.{name}": x for name, x in _gdn_tensors(mixer.options, own).items()}
    for name in [name for name in given if name.endswith(NORMS)]:
        found[name] = minus_one(name)
    if rounded:
        notice(
            f"{source}: {len(rounded)} norms are stored in float32, as weight - 1 has more digits than their dtype: "
            f"{listed(rounded, 2)}; an engine that computes in bfloat16 rounds them"
        )
    return found | given


def _gdn_tensors(options: Any, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen3.5's tensors of one GDN layer, from its own, which are taken out of `own`; what is left keeps its name."""

    def all_heads(name: str) -> torch.Tensor:
        """Rows for all heads, from those of query, key or value heads [Hk K, ...]."""
        heads = own.pop(name).unflatten(0, (-1, options.head_dim))
        return heads.repeat_interleave(options.num_heads // heads.shape[0], 0).flatten(0, 1)

    projections = torch.cat([all_heads(f"{name}_proj.weight") for name in "qkv"])  # [3 H K, D]
    if options.use_short_conv:
        filters = torch.cat([all_heads(f"{name}_conv1d.weight") for name in "qkv"])  # [3 H K, 1, W]
        filters = F.pad(filters, (max(0, 2 - options.conv_size), 0))
    else:
        filters = projections.new_tensor([0.0, 1.0]).repeat(len(projections), 1, 1)
    renamed = {
        "in_proj_z.weight": "g_proj.weight",
        "in_proj_b.weight": "b_proj.weight",
        "in_proj_a.weight": "gk_proj.weight",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
    found = {name: own.pop(source) for name, source in renamed.items()}
    return found | {"in_proj_qkv.weight": projections, "conv1d.weight": filters} | own
