# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: a checkpoint's, a small one of our own with Qwen3's special tokens, and what other code asks them."""

import functools
import re
import string
from collections.abc import Container, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from hmf.config.strict import require_text
from hmf.data.conversation import strings_of
from hmf.errors import HmfError, notice
from hmf.model.checkpoint import require_values
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

_PRIVATE = "\U0010f000"  # characters that stand for special tokens, in the last of Unicode's private planes


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
    if (file := folder / "config.json").exists():  # transformers reads it to find the tokenizer's class
        require_values(read_object(file), file)
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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HmfError(f"{folder}: the tokenizer cannot be loaded ({reason}); copy its files again") from None
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


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], split_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of each text, without special tokens around it.

    Args:
        split_special_tokens: encode special tokens in a text as the text that they are written with.
    Raises:
        HmfError: a text has a lone surrogate, or is too long for the tokenizer.
    """
    try:
        # verbose=False: texts longer than the model's context are cut into rows later, no reason to warn.
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=split_special_tokens,
        )["input_ids"]
    except TypeError:
        require_text(texts, "texts")  # what the tokenizer's own error does not name
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library, and no Exception
            raise
        raise HmfError(
            f"the tokenizer fails ({' '.join(str(error).split())}); the longest text has {max(map(len, texts)):,} "
            "characters: split it, or take it out"
        ) from None


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds the special tokens in a text, the longest at each place."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


class Plain:
    """Encodes special tokens in what messages hold as the text that they are written with.

    In a text that a chat template is to write, each special token is hidden: one character of a private plane stands
    for it. In the ids of the template's text, what hides one is replaced by the ids of what it stands for. So a text
    without special tokens has the ids that it always has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, value: Any):
        """For the texts in `value`, whose own characters stand for themselves."""
        self.tokenizer, self.pattern = tokenizer, special_tokens(tokenizer)
        self.hidden: dict[str, str] = {}  # by token
        own = {character for text in strings_of(value) if max(text, default="") >= _PRIVATE for character in text}
        self.free = (character for character in map(chr, range(ord(_PRIVATE), 0x110000)) if character not in own)

    def hide(self, value: Any, but: Container[str] = ()) -> Any:
        """A value of texts, lists and objects without special tokens in its texts, but for those of `but`."""
        if isinstance(value, str):
            return self.pattern.sub(lambda found: found[0] if found[0] in but else self._hidden(found[0]), value)
        if isinstance(value, dict):
            return {self.hide(name, but): self.hide(item, but) for name, item in value.items()}
        return [self.hide(item, but) for item in value] if isinstance(value, list) else value

    def _hidden(self, token: str) -> str:
        if token not in self.hidden:
            self.hidden[token] = next(self.free)
        return self.hidden[token]

    def restore(self, text: str, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Ids with the tokens that are hidden in `text` as plain text, and the mask by token that belongs to them.

        Raises:
            HmfError: the tokenizer does not encode a part of the text alone as it does in the whole.
        """
        shown = {character: token for token, character in self.hidden.items()}
        if not any(character in text for character in shown):
            return ids, mask
        back = str.maketrans(shown)
        special = set(self.tokenizer.all_special_ids) | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        made, learnt = list[int](), list[int]()
        for _, group in groupby(zip(ids, mask, strict=True), key=lambda pair: (pair[1], pair[0] in special)):
            part, marks = zip(*group, strict=True)
            piece = self.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            new = list(part)
            if any(character in piece for character in shown):
                if encode_texts(self.tokenizer, [piece])[0] != new:
                    raise self._refusal()
                [new] = encode_texts(self.tokenizer, [piece.translate(back)], split_special_tokens=True)
            made += new
            learnt += [marks[0]] * len(new)
        if self.tokenizer.decode(made, clean_up_tokenization_spaces=False) != text.translate(back):
            raise self._refusal()
        return made, learnt

    def _refusal(self) -> HmfError:
        return HmfError(
            "split_special_tokens: this tokenizer does not encode a text in parts as it does in the whole; set it to "
            "false, or remove the special tokens from the text"
        )
