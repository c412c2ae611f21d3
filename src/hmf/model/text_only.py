# SPDX-License-Identifier: Apache-2.0
"""Extracts the language model of a multimodal checkpoint into a separate checkpoint."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from hmf.errors import HmfError, listed

from .checkpoint import HEAD, load_config, published_tensors
from .configuration import building
from .families import FAMILIES, Family, family_of
from .files import (
    COMPUTED,
    INDEX,
    QUANTISED,
    copy_companions,
    new_directory,
    opened,
    read_object,
    require_dtype,
    require_token_ids,
    stored_tensors,
)
from .rope import check_rope

# Language models that are those of another family in text, where the positions on all axes of an image are the same.
SAME_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
EMBEDDINGS = "embed_tokens.weight"
# Settings of a processor, which prepares images and sound. `copy_companions` leaves these files out.
PROCESSOR = re.compile(r"(video_|audio_|image_)?(preprocessor|processor)_config\.json|chat_template\.json")


@dataclass(frozen=True)
class TextOnlyReport:
    """Which tensors of a multimodal checkpoint were written to the text-only checkpoint, and which were not."""

    family: str
    tensors: int
    left: dict[str, int]  # number of tensors that were left out, by module

    def describe(self) -> str:
        omitted = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(self.left.items()))
        return f"{self.family} with {self.tensors} tensors; left out: {omitted or 'nothing'}"


def text_family(config: Any) -> Family | None:
    """The family of a multimodal config's language model, or None."""
    name = getattr(getattr(config, "text_config", None), "model_type", None)
    return FAMILIES.get(SAME_AS.get(name, name)) if isinstance(name, str) else None


def require_language_model(config: Any) -> None:
    """HmfError for the config of a multimodal model, and for one of an unsupported family."""
    source = Path(config.name_or_path, "config.json")
    if (text := text_family(config)) is not None:
        raise HmfError(
            f"{source}: {config.model_type!r} is a multimodal model; use its language model ({text.model_type}): hmf "
            "init with --text-only, or text_only: true in a recipe of hmf prime"
        )
    family_of((getattr(config, "text_config", None) or config).model_type, source=str(source))


def language_config(whole: Any, source: str | Path) -> Any:
    """The config of a multimodal model's language model, from the whole config; HmfError if it has none."""
    if (family := text_family(whole)) is None:
        family_of(whole.model_type, f"{source}/config.json")  # raises for an unsupported model
        raise HmfError(f"{source}/config.json: {whole.model_type!r} reads only text; leave --text-only (text_only) out")
    file = Path(source) / "config.json"
    require_token_ids(file, whole.text_config.vocab_size)
    with building(source):
        config = _text_config(whole, family, file)
    config.name_or_path = str(source)
    return config


def take_text(source: str | Path, target: str | Path) -> TextOnlyReport:
    """Write the language model of the multimodal checkpoint `source` to the new directory `target`.

    Weights are copied file by file, without those of images. The tokenizer's files and the chat template are copied.
    HmfError for a checkpoint without a language model of a supported family.
    """
    source = Path(source)
    whole = load_config(source)
    config = language_config(whole, source)
    family = family_of(config.model_type)
    _require_decoder(whole, family, source)
    with building(source), torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        names = {*model.state_dict(), *published_tensors(model)}  # experts may be stored merged or one by one
    stored = stored_tensors(source)
    taken = _names(source, stored, names)
    for name in taken:
        require_dtype(source, name, stored[name])
    omitted = Counter(name.removeprefix("model.").partition(".")[0] for name in stored.keys() - taken.keys())
    with new_directory(target) as folder:
        config.save_pretrained(folder)
        _write_weights(source, folder, taken)
        copy_companions(source, folder, leave=PROCESSOR)
        _write_template(source, folder)
    return TextOnlyReport(family.model_type, len(taken), dict(omitted))


def _require_decoder(whole: Any, family: Family, source: Path) -> None:
    """HmfError unless the multimodal model runs text through the family's own decoder."""
    name = (getattr(whole, "architectures", None) or [None])[0]
    whole_class: Any = getattr(transformers, str(name), None)
    if not isinstance(whole, getattr(whole_class, "config_class", None) or ()):
        raise HmfError(
            f"{source}/config.json: architectures: {name!r} is not a class of transformers for "
            f"{whole.model_type!r}; name the model's"
        )
    with building(source), torch.device("meta"), no_init_weights():
        decoder = whole_class(whole).get_decoder()
    if whole.text_config.model_type not in SAME_AS and type(decoder) is not family.class_named("Model"):
        raise HmfError(
            f"{source}/config.json: {name} runs text through {type(decoder).__name__}, which is not the decoder of "
            f"{family.model_type}; its language model cannot be taken out"
        )
    for key, neutral, what in (("final_logit_softcapping", None, "cap"), ("logits_scaling", 1, "divide")):
        if getattr(whole.text_config, key, None) not in (None, neutral):
            raise HmfError(
                f"{source}/config.json: text_config.{key}: {name} of transformers does not {what} logits and its "
                f"language model would; set the key to {json.dumps(neutral)} to keep what {name} computes"
            )


def _text_config(whole: Any, family: Family, file: Path) -> Any:
    """The config of the language model; the whole config's values for embeddings, dtype and tokens take precedence.

    file: the whole config.json. Token ids that it lacks are only defaults of its class, and not the model's.
    """
    fields, given = whole.text_config.to_dict(), read_object(file).keys()
    for key in ("model_type", "architectures", "transformers_version"):
        fields.pop(key, None)
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    for key in ("tie_word_embeddings", "dtype", *QUANTISED, *sorted(tokens & given)):
        if (value := getattr(whole, key, None)) is not None:
            fields[key] = value
    if whole.text_config.model_type in SAME_AS:
        rope = {key: x for key, x in fields["rope_parameters"].items() if not key.startswith("mrope") and x != "mrope"}
        fields["rope_parameters"] = rope
        check_rope(fields, family, f"{file}: text_config")  # `load_config` checks those of the families themselves
    config: Any = family.config_class()
    return config(**fields, architectures=[family.class_named("ForCausalLM").__name__])


def _names(source: Path, stored: Any, expected: set[str]) -> dict[str, str]:
    """Stored name -> name in the language model, for each of the `expected` tensors that is stored.

    The prefix of the language model's tensors is that of its embeddings. HmfError for other tensors under the prefix
    that could be the language model's.
    """
    embeddings = [name for name in stored if name.endswith(EMBEDDINGS)]
    if len(embeddings) != 1:
        candidates = listed(embeddings) if embeddings else "none"
        raise HmfError(
            f"{source}: one tensor must be the language model's embeddings ({EMBEDDINGS}); found: {candidates}"
        )
    prefix, taken = embeddings[0].removesuffix(EMBEDDINGS), {}
    for name in stored:
        own = f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
        if name.endswith(HEAD):
            own = HEAD
        if own in expected and (name.startswith(prefix) or own == HEAD):
            taken[name] = own
        elif own.startswith(("model.layers.", "model.norm.")) and name.startswith(prefix) and not COMPUTED.search(name):
            raise HmfError(
                f"{source}: tensor {name} is not in the language model that text_config describes; copy the whole "
                "checkpoint again"
            )
    return taken


def _write_weights(source: Path, folder: Path, taken: dict[str, str]) -> None:
    """Copy the tensors `taken`, file by file, so that no more than one file is in memory."""
    stored = stored_tensors(source)
    files = dict.fromkeys(stored[name].file for name in taken)
    weight_map: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        names = [name for name, tensor in stored.items() if name in taken and tensor.file == file]
        with opened(source / file) as weights:
            part = {taken[name]: weights.get_tensor(name) for name in names}
        target = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(part, folder / target, {"format": "pt"})
        weight_map |= dict.fromkeys(part, target)
        size += sum(x.nbytes for x in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_template(source: Path, folder: Path) -> None:
    """Give the tokenizer the chat template that only the processor has, in chat_template.json."""
    tokenizer, file = source / "tokenizer_config.json", source / "chat_template.json"
    if (folder / "chat_template.jinja").exists() or not file.exists():
        return
    if tokenizer.exists() and read_object(tokenizer).get("chat_template"):
        return
    template = read_object(file).get("chat_template")
    if not isinstance(template, str):
        raise HmfError(f"{file}: chat_template: {template!r} is not a template; copy the file again")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
