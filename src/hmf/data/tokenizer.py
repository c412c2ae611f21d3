# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading and checking, training a small one with Qwen3's special tokens, and encoding."""

import functools
import re
import string
from collections.abc import Container, Iterable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from hmf.config.strict import require_text
from hmf.data.conversation import strings_of
from hmf.errors import HmfError, notice
from hmf.folders import require_downloaded
from hmf.model.files import meant, read_object, reading, require_folder
from hmf.model.values import require_values

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
# One token each, but not special, so that decoding keeps them. Reasoning and tool parsers look them up.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen's rules: a word may start with one punctuation mark or space, each digit is a piece of its own, punctuation
# includes the line ends after it, and spaces are grouped.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_PRIVATE = "\U0010f000"  # first of the characters that stand for special tokens, in Unicode's last private plane


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory.

    Raises:
        HmfError: there is no tokenizer; its files are damaged or name a class that transformers does not have; or it
            has more entries than the model in the same directory has embeddings.
    """
    folder = require_folder(source)
    tokenizer = _read_tokenizer(folder)
    _require_embeddings(folder, tokenizer)
    return tokenizer


def check_tokenizer(source: str | Path) -> None:
    """HmfError if the checkpoint's tokenizer has more entries than embeddings; a notice if it cannot be loaded."""
    folder = require_folder(source)
    try:
        tokenizer = _read_tokenizer(folder)
    except HmfError as error:
        notice(f"{error}; training, evaluation and serving need it")
    else:
        _require_embeddings(folder, tokenizer)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    # Without any file, transformers makes a tokenizer with an empty vocabulary, which encodes every text to no tokens.
    if not (vocabularies := [item for pattern in VOCABULARIES for item in folder.glob(pattern)]):
        raise HmfError(
            f"{folder}: has no tokenizer ({', '.join(VOCABULARIES[:3])}, ...); "
            + (meant(folder) or "copy the tokenizer's files into it")
        )
    if (file := folder / "config.json").exists():  # transformers reads it to find the tokenizer's class
        require_values(read_object(file), file)
    config = folder / "tokenizer_config.json"
    files = (config, folder / "special_tokens_map.json", folder / "added_tokens.json")
    content, *_ = [read_object(file) if file.exists() else {} for file in files]
    _check_template(folder, content.get("chat_template"))
    name = content.get("tokenizer_class")
    if name is not None and (not isinstance(name, str) or tokenizer_class_from_name(name) is None):
        raise HmfError(
            f"{config}: tokenizer_class: transformers has no class {name!r}; name the class that reads these files"
        )
    try:
        with reading(folder):
            for file in vocabularies:
                require_downloaded(file)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        readable = tokenizer(string.printable, add_special_tokens=False)["input_ids"]
    except HmfError:
        raise
    except Exception as error:  # of any class: transformers and tokenizers check little before they use the files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HmfError(f"{folder}: the tokenizer cannot be loaded ({reason}); copy its files again") from None
    if not readable:
        raise HmfError(
            f"{folder}: the tokenizer has no vocabulary and encodes every text to no tokens; copy its files again"
        )
    return tokenizer


def _check_template(folder: Path, template: Any) -> None:
    """HmfError unless chat_template of tokenizer_config.json is a template, or several with different names; a notice
    if another file is used in its place."""
    file, key = folder / "tokenizer_config.json", "chat_template"
    named = list(template.items()) if isinstance(template, dict) else []
    if isinstance(template, list):
        named = [
            (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None) for item in template
        ]
    if (template is not None and not isinstance(template, str | list | dict)) or not all(
        isinstance(part, str) for pair in named for part in pair
    ):
        raise HmfError(f"{file}: {key}: must be text, or a list of objects with a name and a template; correct it")
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise HmfError(f"{file}: {key}: two templates have the name {twice[0]!r}; remove one of them")
    if template and (other := folder / f"{key}.jinja").is_file():
        with reading(other):
            content = other.read_bytes().decode(errors="replace")
        # Jinja reads all line breaks alike, and leaves out one at the end.
        if content.splitlines() != str(dict(named).get("default", template)).splitlines():
            notice(f"{other}: is the chat template; {key} of {file.name} differs and is not read")


def _require_embeddings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """HmfError if a token has no embedding in the model in the same directory, if there is one."""
    if not (file := folder / "config.json").exists():
        return
    content = read_object(file)
    nested = content.get("text_config")
    size = content.get("vocab_size", nested.get("vocab_size") if isinstance(nested, dict) else None)
    entries = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if isinstance(size, int) and entries > size:
        raise HmfError(
            f"{folder}: the tokenizer has {entries} entries, the model {size} embeddings (config.json: vocab_size); "
            f"call resize_token_embeddings({entries}) and save the model, or remove the added tokens"
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` entries, special tokens included."""
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
    """Id of the token before and after a document: BOS if the tokenizer has one, else end-of-text, else EOS."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id
    separator = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.eos_token_id)
    if separator is None:
        raise HmfError(
            f"{tokenizer.name_or_path}: the tokenizer has no BOS, end-of-text or EOS token; set its eos_token"
        )
    return separator


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], split_special_tokens: bool = False
) -> list[list[int]]:
    """Token ids of each text, without special tokens around it.

    Args:
        split_special_tokens: encode special tokens in a text as plain text.
    Raises:
        HmfError: a text has a lone surrogate, or is too long for the tokenizer.
    """
    try:
        # verbose=False: no warning about texts that exceed the model's context, since they are cut into rows later.
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            split_special_tokens=split_special_tokens,
        )["input_ids"]
    except TypeError:
        require_text(texts, "texts")  # names the problem, which the tokenizer's error does not
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by the tokenizers library; not a subclass of Exception
            raise
        raise HmfError(
            f"the tokenizer fails ({' '.join(str(error).split())}); the longest text has {max(map(len, texts)):,} "
            "characters; split it or remove it"
        ) from None


def encode_parts(tokenizer: PreTrainedTokenizerBase, parts: list[str]) -> list[list[int]]:
    """Token ids of each part of a text, as if the parts before it were read or generated already.

    Tokenizers such as Llama 2's add a space before a text. Here only the first part may have it.

    Raises:
        HmfError: as for `encode_texts`, or this space cannot be left out.
    """
    encoded = encode_texts(tokenizer, parts)
    [example] = encode_texts(tokenizer, ["a"])
    if not "".join(tokenizer.convert_ids_to_tokens(example)).startswith(("\u2581", "\u0120")):
        return encoded
    for number, (before, part) in enumerate(pairwise(parts), 1):
        for anchor in (before, "\n"):  # the first, unless a token extends from it into the part
            head, whole = encode_texts(tokenizer, [anchor, anchor + part])
            if whole[: len(head)] == head:
                encoded[number] = whole[len(head) :]
                break
        else:
            raise HmfError(
                f"the tokenizer adds a space before {part[:16]!r}, where the text has none; use a chat template whose "
                "turns do not begin with white space"
            )
    return encoded


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the special tokens: those with a role, such as EOS, and added ones. Some end turns without a role."""
    return _special(tokenizer)[0]


def is_special(tokenizer: PreTrainedTokenizerBase, number: int) -> bool:
    """Whether an id is one of `special_ids`; fast for most of them."""
    skipped = tokenizer.decode([number]) and not tokenizer.decode([number], skip_special_tokens=True)
    return bool(skipped) or number in special_ids(tokenizer)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern for the special tokens in a text; at each position, the longest one matches."""
    return _special(tokenizer)[1]


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], re.Pattern[str]]:
    return _collected(tokenizer, len(tokenizer), *tokenizer.all_special_tokens)


@functools.lru_cache(maxsize=8)  # it takes long if there are thousands of special tokens
def _collected(tokenizer: PreTrainedTokenizerBase, *state: Any) -> tuple[frozenset[int], re.Pattern[str]]:
    """Ids and pattern of the special tokens. `state` changes if tokens are added."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    names = sorted({*added.values(), *tokenizer.all_special_tokens}, key=len, reverse=True)
    return frozenset({*added, *tokenizer.all_special_ids}), re.compile("|".join(map(re.escape, names)) or "(?!)")


class SpecialTokenSplitter:
    """Encodes special tokens in the contents of messages as plain text, and those of the chat template as usual.

    Before the template is applied, `hide` replaces each special token by a character of a private Unicode plane. In the
    token ids of the template's output, `restore` replaces these characters by the ids of the plain text. The ids of a
    text without special tokens do not change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, value: Any):
        """`value` holds the texts; private characters that occur in them are not used as placeholders."""
        self.tokenizer, self.pattern = tokenizer, special_tokens(tokenizer)
        self.hidden: dict[str, str] = {}  # placeholder by special token
        used = {character for text in strings_of(value) if max(text, default="") >= _PRIVATE for character in text}
        self.free = (character for character in map(chr, range(ord(_PRIVATE), 0x110000)) if character not in used)

    def hide(self, value: Any, but: Container[str] = ()) -> Any:
        """A value of texts, lists and objects, with all special tokens in its texts hidden except those in `but`."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: match[0] if match[0] in but else self._placeholder(match[0]), value)
        if isinstance(value, dict):
            return {self.hide(name, but): self.hide(item, but) for name, item in value.items()}
        return [self.hide(item, but) for item in value] if isinstance(value, list) else value

    def _placeholder(self, token: str) -> str:
        if token not in self.hidden:
            self.hidden[token] = next(self.free)
        return self.hidden[token]

    def restore(self, text: str, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
        """Replace the placeholders of hidden special tokens by plain text.

        Args:
            text: the template's output, with placeholders.
            ids: its token ids.
            mask: one value for each token.
        Returns:
            Token ids and mask of the text without placeholders.
        Raises:
            HmfError: the tokenizer does not encode a part of the text in the same way as within the whole text.
        """
        tokens = {character: token for token, character in self.hidden.items()}
        if not any(character in text for character in tokens):
            return ids, mask
        to_plain_text = str.maketrans(tokens)
        special = special_ids(self.tokenizer)
        new_ids, new_mask = list[int](), list[int]()
        for _, group in groupby(zip(ids, mask, strict=True), key=lambda pair: (pair[1], pair[0] in special)):
            part, mask_values = zip(*group, strict=True)
            piece = self.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            part_ids = list(part)
            if any(character in piece for character in tokens):
                if encode_texts(self.tokenizer, [piece])[0] != part_ids:
                    raise self._refusal()
                [part_ids] = encode_texts(self.tokenizer, [piece.translate(to_plain_text)], split_special_tokens=True)
            new_ids += part_ids
            new_mask += [mask_values[0]] * len(part_ids)
        plain = text.translate(to_plain_text)
        if self.tokenizer.decode(new_ids, clean_up_tokenization_spaces=False) not in (plain, self._normalised(plain)):
            raise self._refusal()
        return new_ids, new_mask

    def _normalised(self, text: str) -> str:
        """The text that is encoded: Qwen's tokenizers, for example, compose letters and their accents (NFC)."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return normalizer.normalize_str(text) if normalizer else text

    def _refusal(self) -> HmfError:
        return HmfError(
            "split_special_tokens: this tokenizer encodes parts of a text differently from the whole text; set it to "
            "false, or remove the special tokens from the text"
        )
