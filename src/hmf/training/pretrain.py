# SPDX-License-Identifier: Apache-2.0
"""`hmf pretrain`: trains a small Qwen3 and its tokenizer from scratch on text and generated tasks (recipes/teacher)."""

import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hmf.config.recipes import naming_recipe, read_run
from hmf.config.rope import RopeSettings
from hmf.config.runs import DataSettings, evaluation_conflicts
from hmf.config.strict import Seed, Settings, Steps, require_none
from hmf.config.training import OptimiserSettings
from hmf.data import tasks, text
from hmf.data.files import read_text
from hmf.data.mixture import check_tasks, mixture
from hmf.data.packing import PackedRow
from hmf.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from hmf.errors import HmfError
from hmf.model.checkpoint import load_config, load_model
from hmf.model.families import family_of
from hmf.model.files import follow_umask
from hmf.model.rope import check_rope, with_rope
from hmf.model.values import require_values

from .checkpoints import on_main_process, published, replace_text
from .evaluation import with_evaluation
from .progress import require_reporters
from .run import arguments, known_steps, run_folder, train
from .trainer import HybridTrainer

RECORD = "training.json"


class TokenizerSettings(Settings):
    """A byte-level BPE, learned from the run's text and tasks."""

    vocab_size: int = Field(ge=300, le=2**20)  # number of tokens
    chat_template: Path  # file of the chat template, relative to the recipe
    task_samples: int = Field(ge=0, le=10**6)  # conversations of each task in the tokenizer's training text


class ModelSettings(Settings):
    """The model's config, with keys of Qwen3Config. Embeddings are tied."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    # standard deviation of the initial weights; above 0, because transformers reads 0 as its default
    initializer_range: float = Field(gt=0)


class PretrainOptimiserSettings(OptimiserSettings):
    """Optimiser settings, and options that make training of a small model fast on a large GPU."""

    save_total_limit: int = Field(1, ge=1)  # number of checkpoints that are kept; older ones are removed
    logging_steps: Steps = 50  # steps between log entries; there is one at each checkpoint, too
    compile: bool = False  # whether the model is compiled with torch.compile, on a GPU only
    # whether a document attends to itself alone; false: positions run through the row, and attention needs no mask
    isolate_documents: bool = True


class PretrainRecipe(Settings):
    """`hmf pretrain`: creates `tokenizer` and `model`, or takes both from `start_from`, the output of another run."""

    output: Path  # run folder
    seed: Seed = 0  # seed of all random numbers
    data: DataSettings  # training data
    eval_data: DataSettings | None = (
        None  # data to evaluate on, with training.eval_strategy; left out: rows held out of data
    )
    start_from: Path | None = None  # output of another run to start from
    rope: RopeSettings = Field(default_factory=RopeSettings)  # changes to rotary positions, with start_from
    tokenizer: TokenizerSettings | None = None  # not allowed with start_from, required without it
    model: ModelSettings | None = None  # not allowed with start_from, required without it
    training: PretrainOptimiserSettings  # optimiser, log, checkpoints

    @model_validator(mode="after")
    def _one_start(self) -> "PretrainRecipe":
        fresh = [part is not None for part in (self.tokenizer, self.model)]
        if any(fresh) if self.start_from else not all(fresh):
            raise ValueError("give either start_from, or both tokenizer and model")
        if self.start_from is None and "rope" in self.model_fields_set:
            raise ValueError("rope: changes the positions of start_from; without it, model has rope_theta")
        if self.data.prepared is not None:
            raise ValueError("data.prepared: hmf pretrain cannot use rows of another tokenizer; give text and tasks")
        if self.eval_data is not None and self.eval_data.prepared is not None:
            raise ValueError(
                "eval_data.prepared: hmf pretrain cannot use rows of another tokenizer; give text and tasks"
            )
        if self.training.compile and self.training.torch_compile:
            raise ValueError(
                "training.compile and training.torch_compile: compile compiles the whole model, torch_compile each "
                "layer; leave one of them out"
            )
        require_none(evaluation_conflicts(self.data, self.eval_data, self.training))
        return self


def main(recipe_path: str, overrides: Sequence[str] = ()) -> Path | None:
    """Run a recipe: create tokenizer and model, train, and save the result in bfloat16 in the output folder.

    An interrupted run resumes from its last checkpoint. At the end the folder has weights, config, tokenizer and
    `training.json`, a record of the model, data, time and versions.

    Args:
        overrides: "KEY=VALUE", as in `read_run`.
    Returns:
        The output folder; None in processes that only take part in training.
    """
    recipe, text = read_run(recipe_path, PretrainRecipe, overrides)
    require_reporters(recipe.training.report_to)
    with naming_recipe(recipe_path, PretrainRecipe, overrides):
        check_tasks("data", recipe.data)
        if recipe.model is not None and recipe.tokenizer is not None:  # both, or none
            _config(recipe.model, recipe.tokenizer.vocab_size)
        with run_folder(recipe.output, text) as first:
            if not (recipe.output / RECORD).is_file():  # which is written last
                _pretrain(recipe, Path(recipe_path).parent)
    return recipe.output if first else None


def _pretrain(recipe: PretrainRecipe, folder: Path) -> None:
    set_seed(recipe.seed)
    # Data workers are separate processes. Threads in each of them would only compete.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    checkpoints = recipe.output / "checkpoints"
    source = recipe.output if published(checkpoints) else recipe.start_from
    if source is not None and not (source / "tokenizer.json").is_file():
        raise HmfError(f"start_from: {source} has no tokenizer.json; give a model folder")
    tokenizer = _tokenizer(recipe, folder) if source is None else load_tokenizer(source)
    for option in ("is_local", "local_files_only"):  # options of loading, which must not be saved with the tokenizer
        tokenizer.init_kwargs.pop(option, None)
    args = _arguments(recipe, checkpoints)
    dataset: Any = mixture(recipe.data, tokenizer, 0, recipe.seed)
    training, data = known_steps(recipe.training, dataset), recipe.data
    dataset, evaluated = with_evaluation(dataset, training, data, recipe.eval_data, tokenizer, recipe.seed)
    model = _model(recipe, tokenizer)
    if (length := recipe.data.sequence_length) > (positions := model.config.max_position_embeddings):
        raise HmfError(
            f"data.sequence_length: rows of {length} tokens are longer than the model's {positions} positions; raise "
            "max_position_embeddings, or shorten the rows"
        )
    on_main_process(lambda: tokenizer.save_pretrained(recipe.output))
    model.config.use_cache = False  # a cache would treat the documents of a row as one
    trainer = HybridTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=evaluated,
        data_collator=default_data_collator if recipe.training.isolate_documents else _collate_without_positions,
        divergence_factor=recipe.training.divergence_factor,
    )
    prepared = time.perf_counter()
    train(trainer, dataset, "pretrain", recipe.output / "training.log.json", training, data.sequence_length)
    record = {
        "parameters": model.num_parameters(),
        "steps": training.steps,
        "tokens": len(dataset) * recipe.data.sequence_length,
        "corpus": {"documents": len(dataset.texts), "tokens": sum(map(len, dataset.texts))},
        "seconds": {
            "preparation": round(prepared - started),
            "training": round(time.perf_counter() - prepared),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    model.config.use_cache = True

    def save() -> None:
        model.to(torch.bfloat16).save_pretrained(recipe.output)
        follow_umask(recipe.output)
        replace_text(recipe.output / RECORD, json.dumps(record, indent=2) + "\n")

    on_main_process(save)


def _tokenizer(recipe: PretrainRecipe, folder: Path) -> PreTrainedTokenizerBase:
    assert recipe.tokenizer is not None and recipe.model is not None  # the recipe's validator ensures this
    path = folder / recipe.tokenizer.chat_template
    if not path.is_file():
        raise HmfError(f"{path}: no such file; tokenizer.chat_template is relative to the recipe")
    template = read_text(path)
    size, context = recipe.tokenizer.vocab_size, recipe.model.max_position_embeddings
    documents = [document.text for document in text.documents(recipe.data.text, "train")]
    # A first tokenizer, trained on text only, renders and measures the conversations.
    first = train_tokenizer(documents, size, template, context)
    conversations = [
        tasks.sample(task, seed, first, max(recipe.data.sequence_length, tasks.MIN_LENGTH)).text(first)
        for task in recipe.data.tasks
        for seed in range(recipe.tokenizer.task_samples)
    ]
    tokenizer = train_tokenizer([*documents, *conversations], size, template, context)
    if (made := len(tokenizer)) < size:
        raise HmfError(
            f"tokenizer.vocab_size: the text gives {made:,} tokens, not {size:,}; lower it, or give more text"
        )
    return tokenizer


def _model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    if recipe.start_from is not None:
        config = load_config(recipe.start_from)
        if getattr(config, "pattern", None) is not None:
            raise HmfError(f"start_from: {recipe.start_from} is a Hybrid; train it with `hmf finetune`")
        return load_model(recipe.start_from, dtype=torch.float32, config=with_rope(config, recipe.rope))
    assert recipe.model is not None  # the recipe's validator ensures this
    config = _config(
        recipe.model,
        len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    return model


def _config(model: ModelSettings, vocab_size: int, **others: Any) -> Qwen3Config:
    """The config of a model of these sizes. HmfError if no model can have them."""
    settings = model.model_dump() | {"vocab_size": vocab_size}
    require_values(settings | {"model_type": Qwen3Config.model_type}, "model")
    if settings["num_attention_heads"] % settings["num_key_value_heads"] or settings["head_dim"] % 2:
        raise HmfError(
            "model: num_attention_heads must be a multiple of num_key_value_heads, and head_dim must be even; "
            "correct them"
        )
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    check_rope({"rope_parameters": rope}, family_of(Qwen3Config.model_type), "model")
    return Qwen3Config(**settings, rope_parameters=rope, tie_word_embeddings=True, **others)


def _collate_without_positions(rows: list[PackedRow]) -> PackedRow:
    return default_data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def _arguments(recipe: PretrainRecipe, checkpoints: Path) -> TrainingArguments:
    training, cuda = recipe.training, torch.cuda.is_available()
    return arguments(
        training,
        checkpoints,
        recipe.seed,
        TrainingArguments,
        optim="adamw_torch_fused",
        bf16=cuda and training.precision == "bfloat16",
        tf32=cuda or None,
        torch_compile=training.compile and cuda,
    )
