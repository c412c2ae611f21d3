# SPDX-License-Identifier: Apache-2.0
"""Perplexity and bits per byte of held-out documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hmf.data.progress import Progress
from hmf.data.tokenizer import document_separator, encode_texts
from hmf.errors import HmfError
from hmf.evaluation.results import perplexity_of
from hmf.priming.divergence import wide


@dataclass(frozen=True)
class TextScore:
    """Perplexity per token, and bits per UTF-8 byte, which does not depend on the tokenizer."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 8,
    title: str = "text",
) -> TextScore:
    """Score every token of every document once. The first token is predicted from the document separator.

    Args:
        window: length in tokens of the windows that the model reads.
        stride: tokens by which the window advances; None for windows that do not overlap. A smaller stride gives
            each token more context and takes longer.
        title: label of the progress lines.
    Raises:
        HmfError: no text, a stride that skips tokens, or a loss without a finite perplexity.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise HmfError(f"stride {stride}: must be from 1 to the window, {window}; a longer stride would skip tokens")
    windows = []  # (ids of at most window + 1 tokens, number of tokens at the end that this window scores)
    scored_tokens = 0
    for ids in encode_texts(tokenizer, list(documents) or [""]):
        ids = [document_separator(tokenizer), *ids]
        done = 1  # the separator itself is not scored
        while done < len(ids):
            # The first window scores all of its tokens; later ones move on by the stride.
            end = min(len(ids), window + 1 if done == 1 else done + stride)
            windows.append((ids[max(0, end - window - 1) : end], end - done))
            done = end
        scored_tokens += len(ids) - 1
    if scored_tokens == 0:
        raise HmfError("perplexity: no text to score; give at least one document that is not empty")
    total_bytes = sum(len(document.encode()) for document in documents)
    # Windows of similar lengths share a batch, which needs little padding.
    windows.sort(key=lambda item: len(item[0]), reverse=True)
    nats, progress = 0.0, Progress(title, scored_tokens, unit=" tokens")
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        nats += _batch_nats(model, batch, tokenizer.pad_token_id or 0)
        tokens = sum(scored for _, scored in batch)
        progress.add(tokens, tokens)
    progress.close()
    return TextScore(
        perplexity=perplexity_of(nats, scored_tokens, title),
        bits_per_byte=nats / math.log(2) / total_bytes,
        tokens=scored_tokens,
        bytes=total_bytes,
    )


def _batch_nats(model: PreTrainedModel, windows: Sequence[tuple[list[int], int]], pad: int) -> float:
    longest = max(len(ids) for ids, _ in windows)
    # Padding is on the right, where causal models cannot attend to it. Targets that are not scored are masked.
    input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in windows], device=model.device)
    targets = torch.full_like(input_ids, -100)
    for row, (ids, scored) in enumerate(windows):
        targets[row, len(ids) - scored : len(ids)] = input_ids[row, len(ids) - scored : len(ids)]
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in windows], device=model.device)
    logits = model(input_ids=input_ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(wide(logits.flatten(0, 1)), targets[:, 1:].flatten(), reduction="sum")
    return losses.item()
