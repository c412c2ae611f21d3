# SPDX-License-Identifier: Apache-2.0
"""Three tiny models of one family: the base, its twin, and a Hybrid with GDN layers.

The twin is a Hybrid whose sliding windows are longer than every text here, filled from the base's attention: it gives
the base's numbers.
"""

import copy

import torch

from hmf.config.pattern import Pattern
from hmf.model.convert import drop_teacher, hybridise
from hmf.model.families import FAMILIES
from hmf.priming.stage0 import initialise
from tests.hybrids import random_ids, randomise
from tests.model.test_families import BASES, EXPERTS, GEMMA, GRANITE, SIZES, TWO_TABLES, YARN

FIELDS = {
    "gemma2": GEMMA | {"attn_logit_softcapping": None, "sliding_window": 64},
    "gemma3_text": GEMMA | {"rope_parameters": TWO_TABLES, "sliding_window": 64, "sliding_window_pattern": 2},
    "granite": GRANITE,
    "ministral3": {"rope_parameters": YARN},
    "olmo3": {"rope_parameters": TWO_TABLES, "sliding_window": 64},
    "phi3": BASES["phi3"]["partial"],
    **{name: BASES[name]["listed"] for name, row in FAMILIES.items() if row.own_recurrence},
    "qwen3_moe": EXPERTS,
    "smollm3": BASES["smollm3"]["no-positions"],
}
NEW, PAD = 5, 0
IDS, ONE, MORE = random_ids(2, 12), random_ids(1, 12), random_ids(2, 4, seed=1)
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0
PADDED = IDS.masked_fill(MASK == 0, PAD)
POSITIONS = (MASK.cumsum(1) - 1).clamp_min(0)
SETTINGS = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [PAD]}


def fused_model(base, pattern, options=None):
    fused = hybridise(base, Pattern.parse(pattern), options)
    initialise(fused)
    return fused.eval()


def build(family):
    row = FAMILIES[family]
    base = row.class_named("ForCausalLM")(row.config_class()(**(SIZES | {"vocab_size": 300} | FIELDS.get(family, {}))))
    randomise(base)
    twin = drop_teacher(fused_model(base, "*-SWA-*-SWA", {"swa_config": {"window_size": 64}}))
    gdn = copy.deepcopy(drop_teacher(fused_model(base, "*-GDN-*-GDN")))
    randomise(gdn, seed=1)
    return {"base": base.eval(), "twin": twin.eval(), "gdn": gdn.eval()}


def generate(model, ids=IDS, **given):
    return model.generate(ids, **(SETTINGS | given))


def greedy(model, ids):
    """The definition: the whole text anew for every token."""
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits[:, -1].clone()
        logits[:, [PAD, model.config.eos_token_id]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def close(found, expected, atol=3e-5):
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)
