# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on transformers' Trainer: fine-tuning of a plain Hybrid on text, conversations or preferences."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed

from hmf.config.layers import experts_per_token
from hmf.config.runs import FinetuneRecipe
from hmf.data.encoding import IGNORED
from hmf.data.mixture import mixture, row_length
from hmf.data.packing import PackedRow
from hmf.data.preference import PairDataset, pair_dataset
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.model.checkpoint import cast, load_config, load_model, save_checkpoint, stored_dtypes
from hmf.model.files import follow_umask, stored_tensors
from hmf.model.rope import with_rope

from .checkpoints import say
from .evaluation import evaluation_length, with_evaluation
from .groups import add_adapters, choose, table
from .losses import CrossEntropy, Preference
from .progress import require_reporters
from .run import arguments, check_windows, known_steps, narrow_frozen, train, widen_frozen
from .strategy import strategy_arguments, whole_weights
from .trainer import HybridTrainer

CHECKED_ROWS = 8  # rows whose labels are checked before training


def finetune(recipe: FinetuneRecipe, draw: Callable[[Path], object] | None = None) -> Path:
    """`hmf finetune`: train the plain Hybrid `recipe.model` and save the result at `recipe.output`/model.

    An interrupted run resumes from its last complete checkpoint under `output`/checkpoints. Its log is
    `output`/stage2.log.json; `draw` is called with that path from time to time. Returns the saved folder.

    Raises:
        HmfError: the recipe or the data are invalid, a loss is not finite or diverges (its batch is saved), or the disk
            is full.
    """
    training, output = recipe.training, recipe.output
    target = output / "model"
    if target.is_dir():
        return target
    config = check(recipe)
    set_seed(recipe.seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader already uses several processes
    model = load_model(recipe.model, dtype=torch.float32, config=with_rope(config, recipe.rope))
    dtypes = stored_dtypes(model, stored_tensors(recipe.model))
    groups = choose(model, recipe.trainable, recipe.lora)
    adapters = None
    if recipe.lora is not None:
        adapters, added = add_adapters(model, groups, recipe.lora)
        groups.append(added)
    if training.narrows_frozen:
        narrow_frozen(model)
    rows, evaluated = rows_for(recipe, load_tokenizer(recipe.model))
    training = known_steps(training, rows)
    args = arguments(
        training,
        output / "checkpoints",
        recipe.seed,
        TrainingArguments,
        use_cache=config.use_cache,
        **strategy_arguments(training, model),
    )
    if args.process_index == 0:
        for line in table(groups):
            say(line)
    loss = CrossEntropy() if recipe.pairs is None else Preference(recipe.pairs.beta)
    trainer = HybridTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=evaluated,
        loss=loss,
        groups=groups,
        sequence_parallel=training.sequence_parallel,
        divergence_factor=training.divergence_factor,
    )
    if isinstance(loss, Preference):
        trainer.add_callback(_References(trainer, loss, rows, output / "reference.safetensors"))
        if evaluated is not None:
            trainer.add_callback(_References(trainer, loss, evaluated, output / "reference.eval.safetensors"))
    log, flops = output / "stage2.log.json", flops_per_token(model)
    train(trainer, rows, recipe.method, log, training, sequence_length(recipe), flops, draw)
    weights = whole_weights(model)
    if trainer.is_world_process_zero():
        if adapters is not None:  # the model is then not sharded
            widen_frozen(model)
            adapters.merge_and_unload()
        if recipe.dtype is not None:
            dtypes = dict.fromkeys(dtypes, getattr(torch, recipe.dtype))
        cast(model, dtypes, weights)
        model.config.dtype = getattr(torch, recipe.dtype) if recipe.dtype is not None else config.dtype
        save_checkpoint(model, target, companions=recipe.model, weights=weights)
    trainer.accelerator.wait_for_everyone()
    return target


def check(recipe: FinetuneRecipe) -> Any:
    """The config of the recipe's model. Raises HmfError for errors that can be detected before a run starts."""
    require_reporters(recipe.training.report_to)
    config = load_config(recipe.model)
    evaluated = evaluation_length(recipe.training, recipe.eval_data or recipe.eval_pairs)
    check_model(recipe, config, max(evaluated, sequence_length(recipe)))
    load_tokenizer(recipe.model)
    return config


def check_model(recipe: FinetuneRecipe, config: Any, sequence_length: int) -> None:
    """Raise HmfError if the recipe cannot train a model of this config on rows of `sequence_length` tokens."""
    pattern = getattr(config, "pattern", None)
    if pattern is None:
        raise HmfError(f"{recipe.model}: is not a Hybrid; make one with `hmf prime`")
    if pattern.fused:
        raise HmfError(f"{recipe.model}: still has its teacher; run `hmf export` and use the result")
    if sequence_length > (positions := with_rope(config, recipe.rope).max_position_embeddings):
        raise HmfError(
            f"sequence_length: rows of {sequence_length} tokens are longer than the model's {positions} positions; "
            "set rope.max_position_embeddings"
        )
    if {"all", "mixers"} & set(recipe.trainable) or (recipe.lora is not None and "mixers" in recipe.lora.groups):
        check_windows(config, sequence_length)


def sequence_length(recipe: FinetuneRecipe) -> int:
    """The number of tokens in a row."""
    if recipe.data is not None:
        return row_length(recipe.data)
    assert recipe.pairs is not None  # the recipe's validator ensures this
    return recipe.pairs.sequence_length


def rows_for(recipe: FinetuneRecipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """The recipe's data set, and that of its evaluation or None. Raises HmfError for labels that are surely wrong."""
    training, seed = recipe.training, recipe.seed
    if (pairs := recipe.pairs) is not None:
        return with_evaluation(
            pair_dataset(pairs, tokenizer, seed=seed), training, pairs, recipe.eval_pairs, tokenizer, seed
        )
    assert recipe.data is not None  # the recipe's validator ensures this
    dataset, evaluated = with_evaluation(
        mixture(recipe.data, tokenizer, CHECKED_ROWS, seed), training, recipe.data, recipe.eval_data, tokenizer, seed
    )
    checked = [dataset[index] for index in range(min(CHECKED_ROWS, len(dataset)))]
    # A document's first token has no context and is never supervised.
    supervised = torch.cat([row["labels"][row["position_ids"] > 0] != IGNORED for row in checked])
    if not supervised.any():
        raise HmfError(f"data: no token of the first {len(checked)} rows is supervised; give data with labels")
    if recipe.method == "sft" and not any(map(_has_prompt, checked)):
        raise HmfError(
            "data: every token is supervised, also in prompts; use method cpt for text, sft for conversations"
        )
    return dataset, evaluated


def _has_prompt(row: PackedRow) -> bool:
    """Whether a document of the row has tokens with and without labels. What fills the row up has none."""
    inside = row["position_ids"] > 0
    documents = (~inside).cumsum(0)[inside]
    counts = documents.bincount()
    supervised = documents.bincount(row["labels"][inside] != IGNORED)
    return bool(((supervised > 0) & (supervised < counts)).any())


def flops_per_token(model: PreTrainedModel) -> float | None:
    """Floating-point operations of a token, from parameter counts; None for mixtures of experts.

    Per parameter: 2 in the forward pass, 2 in the backward to activations, 2 in the backward to trained weights. The
    backward runs through all layers.
    """
    if experts_per_token(model.config):
        return None
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    inner = [x for x in model.parameters() if x is not embeddings and x is not head]
    total = sum((6 if x.requires_grad else 4) * x.numel() for x in [*inner, head])
    return float(total)


class _References(TrainerCallback):
    """Measures the initial model's log-likelihood of every answer before the first step. A resumed run reads them."""

    def __init__(self, trainer: HybridTrainer, objective: Preference, rows: PairDataset, path: Path):
        self.trainer, self.objective, self.rows, self.path = trainer, objective, rows, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.measure()
        else:
            self.read()

    def read(self) -> None:
        """Read the log-likelihoods that were measured when the run began."""
        if not self.path.is_file():
            raise HmfError(f"{self.path}: is missing, and a resumed run cannot measure it again; choose another output")
        try:
            with safe_open(self.path, "pt") as stored:
                pairs, references = stored.metadata().get("pairs"), stored.get_tensor("references")
        except SafetensorError as error:
            raise HmfError(
                f"{self.path}: is damaged ({error}), and a resumed run cannot measure it again; choose another output"
            ) from None
        if pairs != self.rows.digest():
            raise HmfError(
                f"{self.path}: was measured on other pairs; restore the run's pairs, or choose another output"
            )
        self.rows.references.copy_(references)

    @torch.no_grad()
    def measure(self) -> None:
        from tqdm.auto import tqdm

        trainer, references = self.trainer, self.rows.references
        model, accelerator = trainer.model_wrapped, trainer.accelerator
        model.eval()
        count, step = len(references), accelerator.num_processes
        # All processes make the same number of calls, because a wrapped model may need collectives.
        for first in tqdm(range(0, count, step), desc="reference", unit="row", disable=None):
            number = min(first + accelerator.process_index, count - 1)
            batch = trainer._prepare_inputs({name: x[None] for name, x in self.rows.row(number).items()})
            likelihoods = model(**batch, objective=self._likelihoods)[0]
            likelihoods = accelerator.gather(likelihoods[None]).cpu()[: count - first]
            has_pair = ~references[first : first + step].isnan()
            if not likelihoods[has_pair].isfinite().all():  # NaN stands for no pair
                raise HmfError(
                    "pairs: the log-likelihood of an answer under the initial model is not finite; check the weights "
                    "of the model"
                )
            references[first : first + step][has_pair] = likelihoods.float()[has_pair]
        model.train()
        if accelerator.is_main_process:
            part = self.path.with_suffix(".part")
            save_file({"references": references}, part, {"pairs": self.rows.digest()})
            follow_umask(part)
            os.replace(part, self.path)
        accelerator.wait_for_everyone()

    def _likelihoods(self, model: PreTrainedModel, reference: torch.Tensor, **batch: Any) -> torch.Tensor:
        return self.objective.likelihoods(model, reference.shape[1], **batch)
