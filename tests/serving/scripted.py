# SPDX-License-Identifier: Apache-2.0
"""A Hybrid that says what a script tells it: a chat server's plumbing can be tested to the letter without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.hybrids import Case
from tests.serving import engines

END = "<|im_end|>"
CALL = '{"name": "get_time", "arguments": {"city": "Rome"}}'
# What follows what. The prompt's last token starts a chain; a token has one successor.
SCRIPT = (
    ("\n", "<think>", "ponder", " deeply", "</think>", "\n\n", "Hello", " world", END),
    ("<tools>", "<tool_call>", CALL, "</tool_call>", END),
)
OTHERS = ["<unk>", "<|im_start|>", "system", "user", "assistant", "tool", "Hi", "word"]
# The shape of Qwen3's: thinking is on unless `enable_thinking=False` puts an empty thought into the prompt. With tools
# the model calls one, and answers once it has the tool's result.
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if tools and messages[-1].role != 'tool' %}{{- '<tools>' }}"
    "{%- elif enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)


def save_scripted(path: Path, family: str = "qwen3", **fields: Any) -> None:
    """A Hybrid with a tokenizer and a chat template at `path`, whose answers are `SCRIPT`; fields: of its config."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys([*OTHERS, *(word for chain in SCRIPT for word in chain)]))
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words if word != "<unk>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END, chat_template=TEMPLATE)
    fast.save_pretrained(path)

    from hmf.model.families import family_of
    from hmf.model.modeling import hybrid_classes
    from tests.hybrids import randomise, tiny_config

    size = {"vocab_size": len(words), "max_position_embeddings": 1024, "eos_token_id": ids[END], "bos_token_id": None}
    config = tiny_config(Case("GDN", "scripted"), "X-*", family, **(engines.DIMENSIONS | size | fields))
    model = hybrid_classes(family_of(family)).causal_lm(config).eval()
    randomise(model)
    with torch.no_grad():
        # Each token's embedding is a direction of its own; the head reads the direction of its predecessor. The mixers
        # and MLPs run, but add too little to turn it.
        model.model.embed_tokens.weight.copy_(torch.eye(len(words), config.hidden_size) * 100)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        for chain in SCRIPT:
            for before, after in zip(chain, chain[1:], strict=False):
                model.lm_head.weight[ids[after], ids[before]] = 10.0
    model.generation_config.eos_token_id = ids[END]
    model.save_pretrained(path)
