# SPDX-License-Identifier: Apache-2.0
"""Trains a small Qwen3 and its tokenizer from scratch on library source and generated tasks (recipes/teacher)."""

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hmf.data import tasks, text
from hmf.data.packing import MixtureDataset
from hmf.data.tokenizer import END_OF_TEXT, encode_texts, train_tokenizer
from hmf.errors import HmfError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerRecipe(_Strict):
    vocab_size: int = Field(ge=300)
    chat_template: Path  # relative to the recipe
    task_samples: int = Field(ge=0)  # conversations of each task that the tokenizer also learns from


class ModelRecipe(_Strict):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    initializer_range: float


class TrainingRecipe(_Strict):
    steps: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    final_learning_rate_ratio: float = Field(ge=0, le=1)
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    save_steps: int = Field(ge=1)
    workers: int = Field(ge=0)
    compile: bool
    attention: str = "sdpa"


class PretrainRecipe(_Strict):
    """Everything about a run; `text` is "stdlib", or a folder or file relative to the working directory."""

    output: Path
    seed: int
    text: str
    sequence_length: int = Field(ge=tasks.MIN_LENGTH)
    text_share: float = Field(ge=0, le=1)
    tasks: dict[str, float]
    tokenizer: TokenizerRecipe
    model: ModelRecipe
    training: TrainingRecipe


def load_recipe(path: str | Path) -> PretrainRecipe:
    """Reads and checks a recipe; raises HmfError with file and key."""
    path = Path(path)
    try:
        recipe = PretrainRecipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise HmfError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise HmfError(f"{path}: {'.'.join(map(str, first['loc'])) or 'recipe'}: {first['msg']}") from error
    for name in recipe.tasks:
        if name not in tasks.TASKS:
            raise HmfError(f"{path}: tasks.{name}: unknown task; choose from {', '.join(tasks.TASKS)}")
    return recipe


def main(recipe_path: str) -> None:
    """Runs a recipe: tokenizer, model, training, and the result in bfloat16 in the recipe's output folder.

    A run that was cut off continues from its last checkpoint. The folder then holds weights, config, tokenizer and
    `training.json`: what was trained, on what, for how long.
    """
    recipe = load_recipe(recipe_path)
    set_seed(recipe.seed)
    # Data workers are processes already; threads inside each of them only get in the way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.perf_counter()
    checkpoints = recipe.output / "checkpoints"
    documents = [document.text for document in text.documents(recipe.text, "train")]
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last:
        tokenizer = AutoTokenizer.from_pretrained(recipe.output)
    else:
        tokenizer = _tokenizer(recipe, documents, Path(recipe_path).parent)
        tokenizer.save_pretrained(recipe.output)
    encoded = encode_texts(tokenizer, documents)
    dataset = MixtureDataset(
        encoded,
        tokenizer,
        recipe.sequence_length,
        recipe.tasks,
        rows=recipe.training.steps * recipe.training.rows_per_step,
        text_share=recipe.text_share,
        seed=recipe.seed,
    )
    model = _model(recipe, tokenizer)
    model.config.use_cache = False  # rows hold several documents, which a cache would take for one
    trainer = Trainer(model=model, args=_arguments(recipe, checkpoints), train_dataset=dataset)
    prepared = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    record = {
        "parameters": model.num_parameters(),
        "steps": recipe.training.steps,
        "tokens": len(dataset) * recipe.sequence_length,
        "corpus": {"documents": len(documents), "tokens": sum(map(len, encoded))},
        "seconds": {
            "preparation": round(prepared - started),
            "training": round(time.perf_counter() - prepared),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(recipe.output)
    (recipe.output / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _tokenizer(recipe: PretrainRecipe, documents: list[str], folder: Path) -> PreTrainedTokenizerBase:
    path = folder / recipe.tokenizer.chat_template
    if not path.is_file():
        raise HmfError(f"{path}: no such file; tokenizer.chat_template is relative to the recipe")
    template = path.read_text(encoding="utf-8")
    size, context = recipe.tokenizer.vocab_size, recipe.model.max_position_embeddings
    # Conversations need a tokenizer to be rendered and measured: a first one, of text alone, serves for that.
    first = train_tokenizer(documents, size, template, context)
    conversations = [
        tasks.sample(task, seed, first, recipe.sequence_length).text(first)
        for task in recipe.tasks
        for seed in range(recipe.tokenizer.task_samples)
    ]
    return train_tokenizer([*documents, *conversations], size, template, context)


def _model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase) -> Any:
    settings = recipe.model.model_dump()
    rope = {"rope_type": "default", "rope_theta": settings.pop("rope_theta")}
    config = Qwen3Config(
        **settings,
        rope_parameters=rope,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=recipe.training.attention
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    return model


def _arguments(recipe: PretrainRecipe, checkpoints: Path) -> TrainingArguments:
    training, cuda = recipe.training, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=training.steps,
        per_device_train_batch_size=training.rows_per_step,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": training.final_learning_rate_ratio},
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=cuda,
        tf32=cuda or None,
        torch_compile=training.compile and cuda,
        dataloader_num_workers=training.workers,
        dataloader_prefetch_factor=4 if training.workers else None,
        dataloader_persistent_workers=False,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        save_steps=training.save_steps,
        save_total_limit=1,
        logging_steps=50,
        report_to=[],
        seed=recipe.seed,
        # Rows are independent draws already, and their order is part of the recipe.
        train_sampling_strategy="sequential",
        disable_tqdm=not os.isatty(1),
    )
