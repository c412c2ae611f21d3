# SPDX-License-Identifier: Apache-2.0
"""On-policy Stage 1: trl's distillation loop on text that the student generates, with the teacher in the same model.

trl generates, batches and logs. Its loss is not used, because it needs a second model and has only a KL term. Here the
teacher's path of the fused model scores the text, with all terms of a recipe's objective (GKD, arXiv 2306.13649, with
every sequence sampled by the student).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from hmf.config.runs import OnPolicySettings
from hmf.data.encoding import IGNORED

from .trainer import HybridTrainer

with warnings.catch_warnings():  # trl asks for a vLLM of other versions, which is not used here
    warnings.filterwarnings("ignore", "TRL currently supports vLLM", UserWarning)
    from trl import DistillationConfig as OnPolicyArguments
    from trl import DistillationTrainer as OnPolicyLoop

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class OnPolicyTrainer(HybridTrainer, OnPolicyLoop):
    """`train_dataset` has rows {"prompt": ids}. Every generated token has a label, prompt tokens have none.

    The hooks are HybridTrainer's around those of trl's loop. They differ because trl generates a batch from prompts in
    `_prepare_inputs`: the guard can remember a batch, and its tokens can be counted, only afterwards.
    """

    def __init__(self, model: Any, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        self._original_ids = [
            (config, {name: getattr(config, name, None) for name in SPECIAL_IDS})
            for config in (model.config, model.generation_config)
        ]
        super().__init__(model=model, processing_class=processing_class, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and restore the special tokens of the configs, which the Trainer sets to the tokenizer's."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for config, ids in self._original_ids:
                for name, value in ids.items():
                    setattr(config, name, value)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}  # the prompts are already token ids

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        return Trainer.get_batch_samples(self, epoch_iterator, num_batches, device)  # prompts have no counts

    def _prepare_inputs(self, inputs: Any) -> dict[str, torch.Tensor]:
        if isinstance(inputs, Mapping):
            return dict(inputs)  # a batch that was already generated
        batch = _batch(super()._prepare_inputs(inputs))
        self.guard.remember(batch)
        return batch

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.loss is not None
        # trl generates all batches of a step at once.
        counts = torch.stack([self.loss.count(**_batch(part)) for part in self._buffered_inputs]).sum(0)
        return super().compute_loss(model, inputs, return_outputs, self.accelerator.reduce(counts, "sum"))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card, because the output folder may contain only checkpoints."""

    def _send_telemetry(self, *args: Any, **kwargs: Any) -> None:
        """Send no telemetry to the Hub, as trl would."""


def _batch(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [B, T]: each prompt is padded on the left, its completion on the right."""
    prompt, completion, mask = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
    return {
        "input_ids": torch.cat([prompt, completion], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), completion.masked_fill(mask == 0, IGNORED)], 1),
    }


def generation_arguments(settings: OnPolicySettings) -> dict[str, Any]:
    """The generation settings as arguments of OnPolicyArguments."""
    return {
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "shuffle_dataset": False,
    }


__all__ = ["OnPolicyArguments", "OnPolicyTrainer", "generation_arguments"]
