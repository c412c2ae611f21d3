# SPDX-License-Identifier: Apache-2.0
"""Registers every Hybrid with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, configuration_utils
from transformers.conversion_mapping import (
    _MODEL_TO_CONVERSION_PATTERN,
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto, tokenization_auto

from hmf.config.layers import LAYER_KINDS
from hmf.config.pattern import ATTENTION, FROM_RECURRENT, FUSED_ATTENTION

from .families import FAMILIES, Family
from .modeling import hybrid_classes


def register() -> None:
    """Register config, models and tokenizer of every family. A second call changes nothing."""
    for family in FAMILIES.values():
        classes = hybrid_classes(family)
        AutoConfig.register(family.hybrid_model_type, classes.config, exist_ok=True)
        AutoModel.register(classes.config, classes.model, exist_ok=True)
        AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
        # By this table the Trainer shifts labels for label smoothing, and lm-eval recognises a causal language model.
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.hybrid_model_type] = classes.causal_lm.__name__
        # Some families' modules have other tensors than their files, such as stacked experts.
        if conversions := get_checkpoint_conversion_mapping(family.model_type):
            register_checkpoint_conversion_mapping(family.hybrid_model_type, conversions, overwrite=True)
        # By this one peft finds the stacked experts that target_modules names one by one. It takes every gate_proj for
        # theirs, and mixers have one where the base's attention has a gate, as in Qwen3-Next.
        if family.model_type in _MODEL_TO_CONVERSION_PATTERN and not family.own_recurrence:
            _MODEL_TO_CONVERSION_PATTERN[family.hybrid_model_type] = _MODEL_TO_CONVERSION_PATTERN[family.model_type]
        _register_tokenizer(family, classes.config)
    _allow_symbols()


def _allow_symbols() -> None:
    """Let transformers' general config class read a Hybrid's config.json, where `layer_types` has the symbols.

    The Trainer does so when it resumes.
    """
    symbols = [
        f"{teacher}{symbol}{fused}" for teacher in ("", FROM_RECURRENT) for symbol in LAYER_KINDS for fused in ("", "*")
    ]
    allowed = (*configuration_utils.ALLOWED_ATTN_LAYER_TYPES, ATTENTION, FUSED_ATTENTION, *symbols)
    configuration_utils.ALLOWED_ATTN_LAYER_TYPES = tuple(dict.fromkeys(allowed))


def _register_tokenizer(family: Family, config_class: type) -> None:
    """Make AutoTokenizer read a Hybrid's tokenizer files, which are the base's, with the base's tokenizer class.

    transformers chooses the class by the files and by tables of model types. For Qwen2, for example, a table overrides
    the files, because checkpoints often name a class that splits text in another way.
    """
    classes = tokenization_auto.TOKENIZER_MAPPING_NAMES
    overruled: set[str] = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    if (name := classes.get(family.model_type)) is None:
        return
    classes[family.hybrid_model_type] = name
    if family.model_type in overruled:
        overruled.add(family.hybrid_model_type)
    # The general class is the default. mistral-common's is slow to import, and its tokenizer files name it.
    if name not in ("TokenizersBackend", "MistralCommonBackend"):
        AutoTokenizer.register(config_class, tokenization_auto.tokenizer_class_from_name(name), exist_ok=True)
