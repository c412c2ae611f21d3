# SPDX-License-Identifier: Apache-2.0
"""Hybrids of bases that have recurrent layers of their own: Qwen3.5, with and without experts, and Qwen3-Next."""

import pytest

from tests.hybrids import Case
from tests.serving import engines
from tests.serving.test_layer_types import check

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KINDS = ["linear_attention", "full_attention"]
PATTERN, TYPES = "*-GDN-*-GKA-SWA-M2-KDA-*", ["linear_attention", "full_attention"] * 2 + ["full_attention"] * 4
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
FIELDS = {"base_layer_types": TYPES, "swa_config": {"window_size": 7}, "rope_parameters": ROPE}


def test_dense(tmp_path):
    model = engines.save_hybrid(tmp_path, Case("GDN", "own"), PATTERN, "qwen3_5_text", **FIELDS)
    check(tmp_path, model)
