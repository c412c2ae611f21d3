# SPDX-License-Identifier: Apache-2.0
"""A small byte-level BPE tokenizer with Qwen3's special tokens, and the few things that other code asks a tokenizer."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Ordinary text to a decoder, one token each: reasoning and tool parsers look them up in the vocabulary.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Qwen's rules: a word takes one leading sign or blank, digits stand alone, signs take the line's end, blanks group.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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
    end_of_text = tokenizer.get_vocab().get(END_OF_TEXT)
    return tokenizer.eos_token_id if end_of_text is None else end_of_text


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text, without special tokens around it."""
    # verbose=False: texts longer than the model's context are cut into rows later, no reason to warn.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
