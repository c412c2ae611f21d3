# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on what the student writes: trl's distillation loop, with both paths of one fused model for its two models.

trl generates, batches, counts and logs. Its loss is not used: that asks for a second model and knows KL alone, while a
fused model scores on its teacher's path with all terms of a recipe's objective (GKD, arXiv 2306.13649, with the student
sampling every sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer
from trl import DistillationConfig as OnPolicyArguments
from trl import DistillationTrainer as OnPolicyLoop

from hmf.config.runs import OnPolicySettings
from hmf.data.encoding import IGNORED

from .trainer import HybridTrainer

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class OnPolicyTrainer(HybridTrainer, OnPolicyLoop):
    """`train_dataset` gives rows {"prompt": ids}; every generated token has a label, prompts have none.

    The hooks are HybridTrainer's around those of trl's loop. They differ where trl makes batches of prompts in
    `_prepare_inputs`: only then can a batch be remembered, and only then is known what the step counts.
    """

    def __init__(self, model: Any, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        self._given_ids = [
            (config, {name: getattr(config, name, None) for name in SPECIAL_IDS})
            for config in (model.config, model.generation_config)
        ]
        super().__init__(model=model, processing_class=processing_class, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As a Trainer's; the configs, which it fits to the tokenizer, are as they were given afterwards."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for config, ids in self._given_ids:
                for name, value in ids.items():
                    setattr(config, name, value)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}  # they are tokens already

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)  # prompts count nothing

    def _prepare_inputs(self, inputs: Any) -> dict[str, torch.Tensor]:
        if isinstance(inputs, Mapping):
            return dict(inputs)  # a batch that was made before
        batch = _batch(super()._prepare_inputs(inputs))
        self.guard.remember(batch)
        return batch

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.loss is not None
        # trl has generated for the whole step at once.
        counts = torch.stack([self.loss.count(**_batch(part)) for part in self._buffered_inputs]).sum(0)
        return super().compute_loss(model, inputs, return_outputs, self.accelerator.reduce(counts, "sum"))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the folder of checkpoints holds nothing else."""

    def _send_telemetry(self, *args: Any, **kwargs: Any) -> None:
        """None: trl would tell the Hub what is trained here."""


def _batch(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [B, T]: prompts end where completions start, pads lie outside."""
    prompt, completion, mask = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
    return {
        "input_ids": torch.cat([prompt, completion], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), completion.masked_fill(mask == 0, IGNORED)], 1),
    }


def generation_arguments(settings: OnPolicySettings) -> dict[str, Any]:
    """How the student writes, as arguments of OnPolicyArguments."""
    return {
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "shuffle_dataset": False,
    }


__all__ = ["OnPolicyArguments", "OnPolicyTrainer", "generation_arguments"]
