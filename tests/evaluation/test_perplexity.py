# SPDX-License-Identifier: Apache-2.0
import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import hmf
from hmf.data.tokenizer import document_separator
from hmf.errors import HmfError
from hmf.evaluation.perplexity import perplexity
from tests.numerics import SAME

in_float64 = pytest.mark.usefixtures("in_float64")
DOCUMENTS = ["import os\n\nprint(os.sep)\n", "x = 1\n" * 30, "é"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(Path(hmf.__file__).parent / "assets" / "teacher")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).double().eval()


def token_nats(model, tokenizer, document, context):
    """Of each token, from at most `context` tokens before it, each in a forward pass of its own."""
    ids = [document_separator(tokenizer), *tokenizer(document).input_ids]
    nats = []
    with torch.no_grad():
        for place in range(1, len(ids)):
            logits = model(torch.tensor([ids[max(0, place - context) : place]])).logits[0, -1]
            nats.append(F.cross_entropy(logits, torch.tensor(ids[place])).item())
    return nats


@pytest.mark.parametrize("batch_size", [1, 3])
@in_float64
def test_every_token_once_with_full_context(model, tokenizer, batch_size):
    nats = [nat for document in DOCUMENTS for nat in token_nats(model, tokenizer, document, 10_000)]
    size = sum(len(document.encode()) for document in DOCUMENTS)
    score = perplexity(model, tokenizer, DOCUMENTS, window=512, batch_size=batch_size)
    assert (score.tokens, score.bytes) == (len(nats), size)
    assert score.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=SAME)
    assert score.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / size, rel=SAME)


@in_float64
def test_stride_of_one_gives_each_token_its_window(model, tokenizer):
    nats = [nat for document in DOCUMENTS for nat in token_nats(model, tokenizer, document, 16)]
    score = perplexity(model, tokenizer, DOCUMENTS, window=16, stride=1)
    assert score.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=SAME)


@pytest.mark.parametrize("stride", [3, 7, 16])
def test_any_stride_counts_all(model, tokenizer, stride):
    score = perplexity(model, tokenizer, DOCUMENTS, window=16, stride=stride)
    assert score.tokens == sum(len(tokenizer(document).input_ids) for document in DOCUMENTS)


def test_a_loss_without_a_finite_perplexity_is_an_error(model, tokenizer):
    for factor, loss in ((torch.nan, "nan"), (1e5, r"[0-9.e+]+")):
        broken = copy.deepcopy(model)
        broken.model.norm.weight.data *= factor
        with pytest.raises(HmfError, match=f"^broken: text: the mean loss of a token is {loss} nats"):
            perplexity(broken, tokenizer, DOCUMENTS, title="broken: text")


def test_bad_requests(model, tokenizer):
    with pytest.raises(HmfError, match="no text"):
        perplexity(model, tokenizer, ["", ""])
    with pytest.raises(HmfError, match="stride 17"):
        perplexity(model, tokenizer, DOCUMENTS, window=16, stride=17)
