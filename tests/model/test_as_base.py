# SPDX-License-Identifier: Apache-2.0
"""A Hybrid in transformers' hands: what its base family's own class does, it does, or refuses by name.

Three models of one family go through the same calls: the base, its twin (a Hybrid whose sliding windows are longer than
every text here, filled from the base's attention, so that both give the same numbers) and a Hybrid with GDN layers.
"""

import copy
import inspect
import pickle
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from hmf.errors import HmfError
from hmf.model.convert import drop_teacher
from hmf.model.families import FAMILIES
from tests.hybrids import random_ids
from tests.twins import IDS, MASK, MORE, NEW, ONE, PAD, PADDED, POSITIONS, close, fused_model, generate, greedy


def second_turn(model, mask=None, **given):
    """Ids and first logits of a second turn on the first one's cache, and how many tokens its first pass was fed."""
    first = generate(model, PADDED, attention_mask=mask, return_dict_in_generate=True, **given)
    text, fed = torch.cat([first.sequences, MORE], 1), []
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(2, NEW + MORE.shape[1])], 1)
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: fed.append(output.shape[1]))
    again = generate(
        model,
        text,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        return_dict_in_generate=True,
        output_logits=True,
    )
    handle.remove()
    return again.sequences, again.logits[0], fed[0]


def pieces(model, cache):
    """Logits of a text fed in two pieces through one cache."""
    parts = [model(x, past_key_values=cache, use_cache=True).logits for x in IDS.split([8, 4], 1)]
    return torch.cat(parts, 1)


def streamed(model):
    got = []

    class Streamer(BaseStreamer):
        def put(self, value):
            got.append(value.flatten().tolist())

        def end(self):
            got.append(None)

    generate(model, ONE, streamer=Streamer())
    assert got.pop() is None
    return got


def sampled(model, **given):
    torch.manual_seed(0)
    return generate(model, do_sample=True, **given)


# What users call: the twin gives what its base gives, in every family.
CALLS = {
    "forward": lambda m: m(IDS).logits,
    "all outputs": lambda m: m(IDS, output_hidden_states=True).hidden_states,
    "last layer's input": lambda m: m.model(IDS, output_hidden_states=[3]).hidden_states[3],
    "tuple": lambda m: m(IDS, return_dict=False)[0],
    "tuple with loss": lambda m: m(IDS, labels=IDS, use_cache=False, return_dict=False)[:2],
    "positional": lambda m: m(PADDED, MASK, POSITIONS).logits[MASK.bool()],
    "labels by position": lambda m: m(IDS, None, None, None, None, IDS).loss,
    "labels": lambda m: m(IDS, labels=IDS.masked_fill(MASK == 0, -100)).loss,
    "num_items_in_batch": lambda m: m(IDS, labels=IDS, num_items_in_batch=torch.tensor(7)).loss,
    "shift_labels": lambda m: m(IDS, labels=IDS, shift_labels=IDS).loss,
    "logits_to_keep": lambda m: (m(IDS, logits_to_keep=3).logits, m(IDS, logits_to_keep=torch.tensor([2, 5])).logits),
    "inputs_embeds": lambda m: m(inputs_embeds=m.get_input_embeddings()(IDS)).logits,
    "position_ids": lambda m: m(IDS, position_ids=torch.arange(3, 15)[None]).logits,
    "unused argument": lambda m: m(IDS, token_type_ids=None).logits,
    "empty cache": lambda m: pieces(m, DynamicCache()),
    "cache with config": lambda m: pieces(m, DynamicCache(config=m.config)),
    "cache comes back": lambda m: [m(IDS, use_cache=x).past_key_values is None for x in (True, False, None)],
    "given cache comes back": lambda m: [
        m(IDS, past_key_values=DynamicCache(config=m.config), use_cache=x).past_key_values is None
        for x in (True, False, None)
    ],
    "generate": generate,
    "generate with a mask": lambda m: generate(m, PADDED, attention_mask=MASK),
    "generate infers the mask": lambda m: generate(m, PADDED),
    "generate uncached": lambda m: generate(m, use_cache=False),
    "generate in chunks": lambda m: generate(m, prefill_chunk_size=5),
    "generate from embeddings": lambda m: generate(m, None, inputs_embeds=m.get_input_embeddings()(IDS)),
    "dynamic cache": lambda m: generate(m, cache_implementation="dynamic"),
    "cache by hand": lambda m: generate(m, past_key_values=DynamicCache()),
    "second turn": second_turn,
    "second turn with a mask": lambda m: second_turn(m, MASK),
    "beams": lambda m: generate(m, num_beams=3, num_return_sequences=2),
    "samples": lambda m: sampled(m, num_return_sequences=3, temperature=0.5),
    "sampled beams": lambda m: sampled(m, num_beams=2),
    "guidance": lambda m: generate(m, guidance_scale=1.5),
    "streamer": streamed,
    "decoder": lambda m: m.model(PADDED, attention_mask=MASK, position_ids=POSITIONS).last_hidden_state[MASK.bool()],
    "decoder tuple": lambda m: m.model(IDS, return_dict=False)[0],
}


# The stock model of a base with recurrent layers of its own does not accept a cache without a config.
WITH_CONFIG = {"empty cache": "cache with config", "cache by hand": "generate"}


# These calls differ from "generate" in transformers' own loop alone, and these families from others in nothing that it
# sees: Gemma 3, Phi-3 (which drops caches), Qwen3, Qwen3-MoE and Qwen3.5 go through them.
OF_THE_LOOP = {
    "generate infers the mask",
    "generate uncached",
    "generate in chunks",
    "dynamic cache",
    "cache by hand",
    "beams",
    "samples",
    "sampled beams",
    "guidance",
    "streamer",
}
ALIKE_IN_THE_LOOP = {
    *("gemma2", "granite", "llama", "ministral3", "mistral", "olmo2", "olmo3", "qwen2", "smollm3"),
    *("qwen3_5_moe_text", "qwen3_next"),
}


@pytest.mark.parametrize(
    ("call", "family"),
    [(c, f) for c in CALLS for f in FAMILIES if not (c in OF_THE_LOOP and f in ALIKE_IN_THE_LOOP)],
)
@torch.no_grad()
def test_a_twin_answers_as_its_base(call, family, families):
    own = FAMILIES[family].own_recurrence is not None
    expected = CALLS[WITH_CONFIG.get(call, call) if own else call](families[family]["base"])
    close(CALLS[call](families[family]["twin"]), expected, atol=1e-4 if own else 3e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_are_the_bases(family, families):
    """transformers, peft and trl read them: from the instance, from the class, and from the decoder."""
    base, gdn = (families[family][name] for name in ("base", "gdn"))
    for of in (lambda m: m.forward, lambda m: type(m).forward, lambda m: m.prepare_inputs_for_generation):
        assert inspect.signature(of(gdn)) == inspect.signature(of(base))
    ours, theirs = (inspect.signature(type(m.model).forward).parameters.values() for m in (gdn, base))
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@torch.no_grad()
def test_a_second_turn_feeds_only_new_tokens(model, mask):
    sequences, logits, fed = second_turn(model, mask)
    assert fed == 1 + MORE.shape[1]  # the first turn's last token has not been fed yet
    for row, start in enumerate((0, 5)):
        text = sequences[row : row + 1, start:]
        close(logits[row], model(text[:, :-NEW]).logits[0, -1])
        assert text.tolist() == greedy(model, text[:, :-NEW]).tolist()


@pytest.mark.parametrize("given", [{}, {"attention_mask": MASK}, {"attention_mask": MASK.bool()}], ids=str)
@torch.no_grad()
def test_left_padded_rows_are_rows_alone(model, given):
    found = generate(model, PADDED, **given)
    for row, start in enumerate((0, 5)):
        assert found[row, start:].tolist() == greedy(model, IDS[row : row + 1, start:])[0].tolist()


@pytest.mark.parametrize("name", ["twin", "gdn"])
@torch.no_grad()
def test_forward_with_a_mask_has_generates_positions(name, families):
    """Positions come from the mask in both, or from the caller; Ministral 3 scales its queries by them."""
    model, ids, mask = families["ministral3"][name], random_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :20] = 0
    ids, expected = ids.masked_fill(mask == 0, PAD), model(ids[1:, 20:]).logits[0]
    for given in ({}, {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}):
        close(model(ids, attention_mask=mask, **given).logits[1, 20:], expected)
    for numbers in (
        mask.bool(),
        mask.float(),
        mask * torch.arange(1, 41),
    ):  # any number but 0 is a token, as in the base
        close(model(ids, attention_mask=numbers).logits[1, 20:], expected)
    assert (model(ids, position_ids=torch.arange(40)[None]).logits[1, 20:] - expected).abs().max() > 1e-2
    first = {"max_new_tokens": 1, "min_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
    close(generate(model, ids, **first).logits[0][1], expected[-1])


@torch.no_grad()
def test_padding_inside_a_row_has_positions_as_in_a_base(trio):
    """A forward pass counts it, on cached tokens too; generate's positions leave it out."""
    hole, right = torch.ones_like(IDS), MASK.flip(1)
    hole[1, 4:7] = 0
    after = torch.cat([right, torch.ones_like(MORE)], 1)
    found = {}
    for name in ("twin", "base"):
        model, cache = trio[name], DynamicCache()
        model(IDS, attention_mask=right, past_key_values=cache)
        turn = model(MORE, attention_mask=after, past_key_values=cache).logits
        found[name] = model(IDS, attention_mask=hole).logits[hole.bool()], turn, generate(model, attention_mask=hole)
    close(found["twin"], found["base"])


@torch.no_grad()
def test_generate_computes_one_position_of_the_prompt(model):
    positions = []
    model.lm_head.register_forward_hook(lambda module, args, output: positions.append(output.shape[1]))
    generate(model)
    assert positions == [1] * NEW


@torch.no_grad()
def test_documents_in_one_row_do_not_see_each_other(trio):
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": row, "labels": row} for row in (IDS[0].tolist(), MORE[0].tolist())]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")(rows)
    alone = [trio["gdn"](torch.tensor([row["input_ids"]])).logits for row in rows]
    close(trio["gdn"](**batch).logits, torch.cat(alone, 1))
    cache = DynamicCache()
    trio["gdn"](batch["input_ids"], position_ids=batch["position_ids"], past_key_values=cache)
    with pytest.raises(HmfError, match="past_key_values: the cache holds 2 sequences and the batch has 1"):
        trio["gdn"](ONE, past_key_values=cache)


@torch.no_grad()
def test_a_cache_travels(model):
    """Copied, pickled, repeated, selected and reordered, it goes on as a fresh pass does."""

    def filled():
        cache = DynamicCache(config=model.config)
        model(IDS[:, :8], past_key_values=cache)
        return cache

    expected, rest = model(IDS).logits[:, 8:], IDS[:, 8:]
    for cache in (copy.deepcopy(filled()), pickle.loads(pickle.dumps(filled()))):
        close(model(rest, past_key_values=cache).logits, expected)
    for change, rows in (
        ("batch_select_indices", torch.tensor([1])),
        ("batch_select_indices", torch.tensor([False, True])),
        ("reorder_cache", torch.tensor([1, 0])),
    ):
        cache = filled()
        getattr(cache, change)(rows)
        close(model(rest[rows], past_key_values=cache).logits, expected[rows])
    (cache := filled()).batch_repeat_interleave(2)
    close(model(rest.repeat_interleave(2, 0), past_key_values=cache).logits, expected.repeat_interleave(2, 0))
    (cache := filled()).crop(0)
    close(model(rest, past_key_values=cache).logits, expected)


def test_attentions_are_those_of_the_attention_layers(trio):
    twin = copy.deepcopy(trio["twin"])
    for one in (base := copy.deepcopy(trio["base"]), twin):
        one.set_attn_implementation("eager")
    found, expected = (one(IDS, output_attentions=True).attentions for one in (twin, base))
    close(found, (expected[0], expected[2]))


def refused(name, model, folder):
    cache, mask = DynamicCache(), torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    match name:
        case "static" | "quantized" | "offloaded_static" | "sliding_window":
            generate(model, cache_implementation=name)
        case "static by hand":
            model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=32))
        case "tuples":
            model(IDS, past_key_values=((MASK, MASK),) * 4)
        case "a base's cache":
            cache = DynamicCache(ddp_cache_data=[(torch.zeros(2, 2, 3, 8),) * 2] * 4)
            model(IDS, past_key_values=cache)
        case "4-D mask":
            model(IDS, attention_mask=mask)
        case "masks by layer type":
            model(IDS, attention_mask={"full_attention": mask})
        case "right padding":
            generate(model, IDS, attention_mask=MASK.flip(1))
        case "right padding, uncached":
            generate(model, IDS, attention_mask=MASK.flip(1).bool(), use_cache=False)
        case "right padding by its token":
            generate(model, PADDED.flip(1))
        case "right padding of embeddings":
            generate(model, None, inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK.flip(1))
        case "positions of images":
            model(IDS, position_ids=torch.arange(12).expand(3, 2, 12))
        case "positions of another length":
            model(IDS, position_ids=torch.arange(11)[None])
        case "listed positions":
            model(IDS, position_ids=[list(range(12))])
        case "mask of one row":
            model(IDS, attention_mask=MASK[1:])
        case "no tokens":
            model(IDS[:, :0])
        case "no embeddings":
            model(inputs_embeds=torch.zeros(2, 0, model.config.hidden_size))
        case "no rows":
            model(IDS[:0])
        case "no new tokens":
            model(IDS, past_key_values=cache)
            model(IDS[:, :0], past_key_values=cache)
        case "mask of new tokens":
            model(IDS, past_key_values=cache)
            model(MORE, past_key_values=cache, attention_mask=torch.ones_like(MORE))
        case "other rows":
            model(ONE, past_key_values=cache)
            model(MORE, past_key_values=cache)
        case "crop":
            model(IDS, past_key_values=cache)
            cache.crop(-2)
        case "after crop" | "after reset":
            model(IDS, past_key_values=cache)
            try:
                cache.reset() if "reset" in name else cache.crop(-2)
            except HmfError:
                model(IDS, past_key_values=cache)
            model(IDS, past_key_values=cache)
        case "checkpointing":
            model = copy.deepcopy(model).train()
            model.gradient_checkpointing_enable()
            generate(model)
        case "lookup":
            generate(model, ONE, prompt_lookup_num_tokens=2)
        case "assistant":
            generate(model, ONE, assistant_model=model)
        case "continuous batching":
            model.generate_batch(IDS.tolist())
        case "variant":
            type(model).from_pretrained(folder, variant="fp16")
        case "no subfolder":
            type(model).from_pretrained(folder, subfolder="best")
        case "offloaded layers":
            places = dict.fromkeys(("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
            places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(4)}
            AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(folder / "off"))


REFUSED = {
    "static": "cache_implementation='static' is not supported",
    "quantized": "cache_implementation='quantized' is not supported",
    "offloaded_static": "cache_implementation='offloaded_static' is not supported",
    "sliding_window": "cache_implementation='sliding_window' is not supported",
    "static by hand": "past_key_values: StaticCache is not supported",
    "tuples": "past_key_values: tuple is not supported",
    "a base's cache": "past_key_values: another model, or prefix tuning, filled the cache",
    "4-D mask": r"attention_mask: .* \[2, 12\], not \[2, 1, 12, 12\]",
    "masks by layer type": "attention_mask: .*not dict",
    **dict.fromkeys(
        (
            "right padding",
            "right padding, uncached",
            "right padding by its token",
            "right padding of embeddings",
        ),
        r"attention_mask: a row ends in padding, .*; pad on the left \(padding_side='left'\)",
    ),
    "positions of images": r"position_ids: .* \[2, 12\], not \[3, 2, 12\]",
    "positions of another length": r"position_ids: .* \[2, 12\], not \[1, 11\]",
    "listed positions": r"position_ids: .* not list",
    "no tokens": r"input_ids: has no tokens, as its shape begins with \[2, 0\]",
    "no embeddings": r"inputs_embeds: has no tokens",
    "no rows": r"input_ids: has no tokens, as its shape begins with \[0, 12\]",
    "no new tokens": r"input_ids: has no tokens",
    "mask of one row": r"attention_mask: .* \[2, 12\], not \[1, 12\]",
    "mask of new tokens": r"attention_mask: .* \[2, 16\], not \[2, 4\]",
    "other rows": "past_key_values: the cache holds 1 sequences and the batch has 2",
    "crop": "a recurrent state cannot be rolled back",
    "after crop": r"past_key_values: its layers hold \[10, 12\] tokens",
    "after reset": r"past_key_values: its layers hold \[0, 12\] tokens",
    "checkpointing": r"generate: gradient checkpointing keeps no cache in training mode; call model.eval\(\)",
    "lookup": "assisted generation is not supported",
    "assistant": "assisted generation is not supported",
    "continuous batching": "generate_batch: .* not supported",
    "variant": "variant='fp16' is not supported",
    "no subfolder": "best: no such directory",
    "offloaded layers": r"device_map: model.layers.1.gdn cannot be offloaded",
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_a_state_cannot_do_is_refused_by_name(name, trio, folders):
    with pytest.raises((HmfError, ValueError), match=REFUSED[name]) as caught:  # assisted: transformers' own words
        refused(name, copy.deepcopy(trio["gdn"]), folders / "gdn")
    assert "\n" not in str(caught.value)


GAP = torch.cat([torch.arange(5), torch.arange(20, 27)])[None]
WHERE_A_BASE_GOES_ON = {
    "mask": lambda m, positions: m(IDS, position_ids=positions, attention_mask=torch.ones_like(IDS), use_cache=False),
    "padding": lambda m, positions: m(PADDED, position_ids=positions, attention_mask=MASK, use_cache=False),
    "empty cache": lambda m, positions: m(IDS, position_ids=positions, past_key_values=DynamicCache()),
    "use_cache of the config": lambda m, positions: m(IDS, position_ids=positions),
    "generate": lambda m, positions: m.generate(IDS, position_ids=positions.expand(2, -1), max_new_tokens=1),
}


@pytest.mark.parametrize(
    ("positions", "jump"), [(GAP, "4 to 20"), (GAP.flip(1), "26 to 25"), (GAP / 4, "0.0 to 0.25")], ids=str
)
@pytest.mark.parametrize("call", WHERE_A_BASE_GOES_ON)
@torch.no_grad()
def test_positions_that_jump_begin_no_document_where_a_base_goes_on(call, positions, jump, trio):
    WHERE_A_BASE_GOES_ON[call](trio["base"], positions)
    with pytest.raises(HmfError, match="position_ids: jump from .* with an attention_mask or a cache") as caught:
        WHERE_A_BASE_GOES_ON[call](trio["gdn"], positions)
    assert jump in str(caught.value) or call == "padding"


@torch.no_grad()
def test_positions_that_jump_as_in_a_base(trio):
    """Without a mask and a cache they begin documents; after cached tokens and at padding they do not."""
    mask = torch.ones_like(IDS)
    mask[:, 5] = 0
    for given in ({"use_cache": False}, {"use_cache": False, "attention_mask": mask}):
        found, expected = (trio[name](IDS, position_ids=GAP, **given).logits for name in ("twin", "base"))
        close(found[mask.bool()], expected[mask.bool()])
    pieces = []
    for name in ("twin", "base"):
        cache = DynamicCache()
        trio[name](IDS, past_key_values=cache)
        pieces.append(trio[name](MORE, past_key_values=cache, position_ids=torch.tensor([[20, 21, 40, 41]])).logits)
    close(*pieces)


@pytest.mark.parametrize("given", [(), (None,) * 4], ids=["keyword", "position"])
def test_labels_of_a_fused_checkpoint_are_refused(given, trio):
    fused = fused_model(trio["base"], "*-GDN-*-GDN")
    with pytest.raises(HmfError, match="labels: a fused model is trained by distillation"):
        fused(IDS, *given, IDS) if given else fused(IDS, labels=IDS)
    assert inspect.signature(fused.forward) == inspect.signature(trio["base"].forward)


@torch.no_grad()
def test_an_offloaded_cache_fetches_the_next_attention_layer(trio, monkeypatch):
    """The order in which keys come back to the GPU; mixers' states are not sent away. See also the test with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Mock())
    cache, fetched = DynamicCache(config=trio["gdn"].config, offloading=True), []
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: fetched.append(cache.layers.index(layer)))
    found = generate(trio["gdn"], past_key_values=cache)
    assert found.tolist() == greedy(trio["gdn"], IDS).tolist()
    assert fetched == [2, 0] * NEW
    with pytest.raises(HmfError, match="'offloaded': needs at least two attention layers and the model has 1"):
        generate(drop_teacher(fused_model(trio["base"], "GDN-GDN-*-GDN")), cache_implementation="offloaded")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(HmfError, match="'offloaded': needs a CUDA device"):
            generate(trio["gdn"], cache_implementation="offloaded")


@pytest.mark.gpu
@torch.no_grad()
def test_an_offloaded_cache_on_a_gpu(trio):
    model = copy.deepcopy(trio["gdn"]).cuda()
    ids, mask = PADDED.cuda(), MASK.cuda()
    for given in ({}, {"num_beams": 3}):
        expected = generate(model, ids, attention_mask=mask, **given)
        found = generate(model, ids, attention_mask=mask, cache_implementation="offloaded", **given)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("symbol", ["GDN", "KDA", "GKA", "M2"])
def test_second_derivatives_are_refused(symbol, checkpointing, trio):
    """A base with eager attention has them. Gradients with a graph are those without one."""
    model = drop_teacher(fused_model(trio["base"], f"*-{symbol}-*-*"))
    model.set_attn_implementation("eager")
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    x = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with_graph, plain = (
        torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits.sum(), x, create_graph=graph)[0]
        for graph in (True, False)
    )
    close(with_graph / plain.abs().max(), plain / plain.abs().max())
    with pytest.raises(HmfError, match="create_graph: the ops of recurrent layers have first derivatives only"):
        torch.autograd.grad(with_graph.square().sum(), x)


@torch.no_grad()
def test_new_windows_count_real_tokens(trio):
    """As the base's attention under a mask in which padding between tokens does not count."""
    hybrid = drop_teacher(fused_model(trio["base"], "SWA-SWA-SWA-SWA", {"swa_config": {"window_size": 4}}))
    mask = torch.ones_like(ONE)
    mask[0, 4:7] = 0
    real, tokens = mask[0].bool(), mask[0].cumsum(0)
    distance = tokens[:, None] - tokens
    seen = (distance < 4) & real & torch.ones_like(distance).tril().bool() | torch.eye(len(tokens)).bool()
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    base = trio["base"](ONE, attention_mask=bias, position_ids=torch.arange(12)[None]).logits
    close(hybrid(ONE, attention_mask=mask).logits[0, real], base[0, real])
