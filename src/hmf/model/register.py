# SPDX-License-Identifier: Apache-2.0
"""Makes the Auto classes know every Hybrid."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .families import FAMILIES
from .modeling import hybrid_classes


def register() -> None:
    """Register config, decoder and causal language model of every family; doing it again changes nothing."""
    for family in FAMILIES.values():
        classes = hybrid_classes(family)
        AutoConfig.register(family.hybrid_model_type, classes.config, exist_ok=True)
        AutoModel.register(classes.config, classes.model, exist_ok=True)
        AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
        # Where a family's modules hold tensors in another form than its files, such as stacked experts.
        if conversions := get_checkpoint_conversion_mapping(family.model_type):
            register_checkpoint_conversion_mapping(family.hybrid_model_type, conversions, overwrite=True)
