# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hybrids for every registered layer type: the one list of cases of the invariance suite.

A new layer type is covered by its row in `hmf.layers.registry.MIXERS`; `OPTIONS` only makes its defaults small enough
for short sequences and adds the variants worth a case of their own.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from hmf.config.layers import LAYER_KINDS
from hmf.layers.registry import MIXERS
from hmf.model.families import family_of
from hmf.model.modeling import hybrid_classes

VOCABULARY = 61

# Dimensions of the base model, for every layer type.
BASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "one-kv-head": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 4},
    "odd-head-dim": {"head_dim": 12},
}

# symbol -> options of every case of that layer type.
SMALL: dict[str, dict[str, Any]] = {
    "GKA": {"num_iter": 6},
    "SWA": {"window_size": 5},
    "BMF": {"window_size": 5, "ssm_mixer": "gdn"},
}

# symbol -> variants on top of those.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "GDN": {
        "negative-eigenvalues": {"allow_neg_eigval": True},
        "conv-bias": {"conv_bias": True, "conv_size": 3},
        "no-short-conv": {"use_short_conv": False},
        "no-gate": {"use_gate": False},
        "low-rank": {"kv_proj_rank": 6},
        "learnable-residual": {"kv_proj_rank": 6, "kv_learnable_residual": True},
    },
    "KDA": {
        "negative-eigenvalues": {"allow_neg_eigval": True},
        "conv-bias": {"conv_bias": True, "conv_size": 3},
        "bare": {"use_short_conv": False, "use_gate": False},
        "learnable-residual": {"kv_proj_rank": 6, "kv_learnable_residual": True},
    },
    "GKA": {
        "plain": {
            "use_alpha_connection": False,
            "use_v_conv": False,
            "use_beta_gate": False,
            "gla_rescale": False,
            "use_gate": False,
        },
        "covariance-without-decay": {"use_forgetting_gate_kk": False},
        "no-decay": {"use_forgetting_gate": False},
        "no-solve": {"num_iter": 0},
        "many-iterations": {"num_iter": 30},
        "learnable-residual": {"kv_proj_rank": 6, "kv_learnable_residual": True},
    },
    "M2": {"no-qk-norm": {"use_qk_norm": False}, "rotary": {"use_pos_emb": True}},
    "BMF": {"untied": {"tie_attn_weights": False}, "mamba2": {"ssm_mixer": "mamba2"}, "gka": {"ssm_mixer": "gka"}},
}


@dataclass(frozen=True)
class Case:
    """One layer type in one shape with one set of options."""

    symbol: str
    name: str
    base: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.symbol}-{self.name}"

    def __hash__(self) -> int:
        return hash(str(self))


def cases() -> list[Case]:
    """Every registered layer type by every base shape and every option variant."""
    found = []
    for symbol in MIXERS:
        found += [Case(symbol, name, base=base) for name, base in BASES.items()]
        found += [Case(symbol, name, options=options) for name, options in OPTIONS.get(symbol, {}).items()]
    return found


def tiny_config(case: Case, pattern: str = "X-*-X", family: str = "qwen3", **fields: Any) -> Any:
    """A Hybrid config of hidden size 32 with 4 query heads of 8; "X" in `pattern` is the case's own layer type."""
    pattern = pattern.replace("X", case.symbol)
    symbols = pattern.split("-")
    dimensions = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": len(symbols),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hybrid_override_pattern": pattern,
    }
    if family_of(family).own_recurrence:  # the base's own recurrent layers are those that are kept
        kinds = ["linear_attention" if symbol == "*" else "full_attention" for symbol in symbols]
        sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        dimensions |= {"base_layer_types": kinds, **sizes, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
    options = SMALL | {case.symbol: SMALL.get(case.symbol, {}) | case.options}
    dicts = {LAYER_KINDS[symbol].config_key: given for symbol, given in options.items() if symbol in symbols}
    return hybrid_classes(family_of(family)).config(**(dimensions | case.base | dicts | fields))


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter non-trivial, norms, gates, biases and decays included; outputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(noise * 0.5 - 1)  # a memory of some tens of tokens: all of it matters
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.2 + (0 if name.endswith("bias") else 1))
            elif "conv1d" in name or name.endswith("_rep"):
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


@functools.lru_cache(maxsize=64)
def _built(case: Case, pattern: str, family: str) -> torch.nn.Module:
    model = hybrid_classes(family_of(family)).causal_lm(tiny_config(case, pattern, family)).double()
    randomise(model)
    return model.eval()


def tiny_hybrid(case: Case, pattern: str = "X-*-X", family: str = "qwen3") -> Any:
    """A float64 model in eval mode, the caller's own copy. Float64 leaves no room for a small error to hide in."""
    return copy.deepcopy(_built(case, pattern, family))


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, tokens] without the special ones 0, 1, 2."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
