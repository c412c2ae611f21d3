# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: a checkpoint's, a small one of our own with Qwen3's special tokens, and what other code asks them."""

import string
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from hmf.errors import HmfError, notice
from hmf.model.files import read_object, reading, require_folder

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.json",
    "tekken.json",
    "vocab.txt",
    "*.tiktoken",
    "spiece.*",
)
# Ordinary text to a decoder, one token each: reasoning and tool parsers look them up in the vocabulary.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen's rules: a word takes one leading sign or blank, digits stand alone, signs take the line's end, blanks group.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory.

    Raises:
        HmfError: there is none; its files are damaged, or need a class that transformers does not have; it has more
            entries than the model beside it has embeddings.
    """
    folder = require_folder(source)
    tokenizer = _read_tokenizer(folder)
    _require_embeddings(folder, tokenizer)
    return tokenizer


def check_tokenizer(source: str | Path) -> None:
    """HmfError where a checkpoint's tokenizer does not fit its embeddings; a notice where it cannot be read at all."""
    folder = require_folder(source)
    try:
        tokenizer = _read_tokenizer(folder)
    except HmfError as error:
        notice(f"{error}; training, evaluation and serving will need it")
    else:
        _require_embeddings(folder, tokenizer)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Without any file transformers makes a tokenizer without vocabulary, to which every text is empty.
    if not any(item for pattern in VOCABULARIES for item in folder.glob(pattern)):
        raise HmfError(f"{folder}: has no tokenizer ({', '.join(VOCABULARIES[:3])}, ...); copy its files there")
    config = folder / "tokenizer_config.json"
    name = read_object(config).get("tokenizer_class") if config.exists() else None
    if name is not None and (not isinstance(name, str) or tokenizer_class_from_name(name) is None):
        raise HmfError(
            f"{config}: tokenizer_class: {name!r} is none that transformers has; name the class of the files"
        )
    try:
        with reading(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        readable = tokenizer(string.printable, add_special_tokens=False)["input_ids"]
    except HmfError:
        raise
    except Exception as error:  # of any kind: transformers and tokenizers check little before they use it
        said = " ".join(str(error).split()) or type(error).__name__
        raise HmfError(f"{folder}: the tokenizer cannot be loaded ({said}); copy its files again") from None
    if not readable:
        raise HmfError(f"{folder}: the tokenizer has no vocabulary, every text is empty to it; copy its files again")
    return tokenizer


def _require_embeddings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """HmfError when a token has no embedding in the model beside the tokenizer, if there is one."""
    if not (file := folder / "config.json").exists():
        return
    content = read_object(file)
    nested = content.get("text_config")
    size = content.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    entries = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if isinstance(size, int) and entries > size:
        raise HmfError(
            f"{folder}: the tokenizer has {entries} entries, the model {size} embeddings (config.json: vocab_size); "
            f"resize_token_embeddings({entries}) and save the model, or take the added tokens away"
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of exactly `vocab_size` entries (special tokens included), lossless on any UTF-8 text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, normalized=False, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)]
    added += [AddedToken(token, normalized=False, special=False) for token in MARKERS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=chat_template,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that a plain document starts with: the tokenizer's own beginning, else end-of-text, else end of sequence."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    found = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if found is None:
        raise HmfError(
            f"{tokenizer.name_or_path}: the tokenizer has no token to begin or end a text; set its eos_token"
        )
    return found


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens around it."""
    # verbose=False: texts longer than the model's context are cut into rows later, no reason to warn.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
