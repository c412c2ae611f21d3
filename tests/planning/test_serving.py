# SPDX-License-Identifier: Apache-2.0
"""Plans agree with what was measured on an H100, and with what vLLM says of itself on a CPU."""

import functools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import NemotronHConfig

from hmf.cli import app
from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.gpus import GPUS, cpu, parse_gpus
from hmf.model.convert import hybrid_config
from hmf.model.families import FAMILIES
from hmf.planning import serving as planner
from hmf.planning.memory import weights, working_bytes
from tests.hybrids import Case, tiny_config
from tests.serving import engines

QWEN3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}
CONTEXT = QWEN3_8B["max_position_embeddings"]


@functools.cache
def qwen3_8b():
    return FAMILIES["qwen3"].config_class()(**QWEN3_8B)


def half(mixer="gdn"):
    return hybrid_config(qwen3_8b(), Pattern.generate(36, mixer, 0.5))


@functools.cache
def half_plan(mixer="gdn", gpu="h100", ranks=1, room=None):
    return planner.make_plan(half(mixer), GPUS[gpu], ranks, room=room)


@pytest.fixture(scope="module")
def h100():
    """Plans for the 18 + 18 Hybrid and its base."""
    return planner.plans(half(), "h100")


class TestMeasured:
    """Qwen3-8B's shape on one H100 80GB, vLLM 0.32, utilisation 0.9."""

    def test_capacity(self, h100):
        hybrid, transformer = (plan.capacity(CONTEXT) for plan in h100)
        assert transformer == pytest.approx(390_592, rel=0.03)
        assert hybrid == pytest.approx(745_194, rel=0.03)
        assert hybrid / transformer == pytest.approx(1.91, rel=0.03)

    @pytest.mark.parametrize(
        ("sequences", "context", "measured"),
        [
            (20, 16384, ((1141.0, 1176.3), (830.6, 807.7, 813.8))),
            (10, 32768, ((584.8, 593.9), (414.4, 403.7, 404.2))),
        ],
    )
    def test_decode(self, h100, sequences, context, measured):
        for plan, rates in zip(h100, measured, strict=True):
            assert [plan.decode_rate(sequences, context)] * len(rates) == pytest.approx(rates, rel=0.03)


class TestBytes:
    def test_keys_and_values(self, h100):
        assert [plan.sequence_bytes(1000)[0] for plan in h100] == [73_728_000, 147_456_000]

    def test_states(self):
        """18 layers of 32 heads of 128 x 128 in float32, for GKA two of them, beside the short convolutions."""
        convs = 18 * 3 * (32 + 8 + 8) * 128 * 4
        for mixer, states in (("gdn", 1), ("gka", 2), ("mamba2", 1)):
            assert half_plan(mixer).sequence_bytes(1)[1] == states * 37_748_736 + convs

    def test_states_in_half_precision(self):
        config = half()
        config.state_dtype = "bfloat16"
        assert planner.make_plan(config, GPUS["h100"]).sequence_bytes(1)[1] * 2 == 18 * 2_170_880

    def test_fewer_bits_of_keys_and_states(self):
        """fp8 keys alone do not double what fits: a block is as large as a float32 state."""
        plans = [
            planner.make_plan(half(), GPUS["h200"], settings=planner.ServingSettings(kv_cache_dtype=kv, **states))
            for kv, states in (("auto", {}), ("fp8", {}), ("fp8", {"mamba_ssm_cache_dtype": "bfloat16"}))
        ]
        kv, states = zip(*(plan.sequence_bytes(16384) for plan in plans), strict=True)
        assert kv[0] == 2 * kv[1] == 2 * kv[2]
        assert states[0] == states[1] == states[2] + 18 * 32 * 128 * 128 * 2
        fit = [plan.sequences(16384) for plan in plans]
        assert fit[0] < fit[1] < fit[2] <= 2 * fit[0] + 2
        assert plans[2].step_bytes(1, 16384) < plans[1].step_bytes(1, 16384) < plans[0].step_bytes(1, 16384)

    def test_windows_stop_growing(self):
        plan = half_plan("swa")
        assert plan.sequence_bytes(2048)[0] == 2048 * 147_456
        assert plan.sequence_bytes(4096)[0] == 4096 * 73_728 + 2048 * 73_728

    def test_fading_windows_are_states(self):
        """B'MOJO-F: 2047 and 4095 positions of keys and values, in bfloat16, beside Mamba2's states."""
        windows = 18 * ((2047 + 4095) * 4096 + 8)
        inner = half_plan("mamba2").sequence_bytes(1)[1]
        assert half_plan("bmojo").sequence_bytes(10_000) == (10_000 * 73_728, inner + windows)

    def test_a_step_reads_windows_once_and_states_twice(self):
        """Of B'MOJO-F's windows the 2047 latest positions and the 2048 before them, and the count of tokens."""
        moved = {
            mixer: half_plan(mixer).step_bytes(1, 1000) - half_plan(mixer).weights.read(1)
            for mixer in ("mamba2", "bmojo")
        }
        assert moved["mamba2"] == 1000 * 73_728 + 2 * half_plan("mamba2").sequence_bytes(1)[1]
        assert moved["bmojo"] - moved["mamba2"] == 18 * ((2047 + 2048) * 4096 + 2 * 8)

    def test_ranks_share(self):
        one, eight, sixteen = (half_plan(gpu="h200", ranks=ranks) for ranks in (1, 8, 16))
        assert [value * 8 for value in eight.sequence_bytes(512)] == list(one.sequence_bytes(512))
        assert sixteen.sequence_bytes(512)[0] == eight.sequence_bytes(512)[0]  # 8 key heads: two ranks hold the same
        assert eight.blocks.tokens == one.blocks.tokens == 544

    def test_ranks_share_the_weights(self):
        """In memory, beside what every rank needs, and in what a decode step reads."""
        total = 2 * 8_190_735_360
        base = planner.base_of(qwen3_8b())
        one, eight = (planner.make_plan(base, GPUS["h200"], ranks) for ranks in (1, 8))
        working = [working_bytes(base, torch.bfloat16, ranks, 8192, GPUS["h200"].max_num_seqs) for ranks in (1, 8)]
        assert eight.cache_bytes - one.cache_bytes == total - total // 8 + working[0] - working[1]
        assert [plan.step_bytes(0, 1) for plan in (one, eight)] == [total, total / 8]
        with pytest.raises(HmfError, match=r"the weights, 1.9 GiB on each of 8 l4, leave no room"):
            planner.make_plan(base, GPUS["l4"], 8, room=1)

    def test_weights_are_the_models(self):
        assert weights(planner.as_hybrid(qwen3_8b()), torch.bfloat16).total == 2 * 8_190_735_360
        config = tiny_config(Case("GDN", "plan"), tie_word_embeddings=True)
        from hmf.model.families import family_of
        from hmf.model.modeling import hybrid_classes

        model = hybrid_classes(family_of("qwen3")).causal_lm(config).to(torch.bfloat16)
        assert weights(config, torch.bfloat16).total == sum(p.numel() * p.element_size() for p in model.parameters())

    def test_few_sequences_read_few_experts(self):
        config = tiny_config(
            Case("GDN", "plan"), family="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
        )
        found = weights(config, torch.float32)
        assert found.experts == 3 * 8 * 3 * 32 * 16 * 4
        assert found.read(1) == found.total - found.experts * 3 / 4
        assert found.read(1) < found.read(2) < found.read(10**4) == found.total


class TestBlocks:
    def test_a_block_holds_the_largest_state(self):
        for mixer, tokens in (("gdn", 544), ("mamba2", 544), ("gka", 1056), ("swa", 16)):
            plan = half_plan(mixer)
            assert plan.smallest_prefix == plan.blocks.tokens == tokens
            assert plan.blocks.bytes == 18 * tokens * 4096

    def test_uneven_layers_make_more_groups(self):
        config = hybrid_config(qwen3_8b(), Pattern.generate(36, "gdn", layers=range(27)))
        blocks = planner.make_plan(config, GPUS["h100"]).blocks
        assert sorted(blocks.groups.values()) == [1, 3] and blocks.bytes == 9 * 544 * 4096

    def test_two_layer_types_keep_their_own_blocks(self):
        config = hybrid_config(qwen3_8b(), Pattern(("*", "GDN", "GKA") * 12))
        blocks = planner.make_plan(config, GPUS["h100"]).blocks
        assert list(blocks.groups.values()) == [1, 1, 1] and blocks.tokens == 1056
        assert blocks.of_sequence(1056) == 1 + 2 + 2
        assert blocks.of_sequence(1057, prefix_caching=False) == 2 + 1 + 1

    def test_no_attention_at_all(self):
        plan = planner.make_plan(hybrid_config(qwen3_8b(), Pattern(("GDN",) * 36)), GPUS["h100"])
        assert plan.blocks.bytes == 36 * 2_170_880
        assert plan.sequences(10**6) == plan.sequences(1) == (plan.num_blocks - 1) // 2

    def test_graphs_stay_below_the_state_slots(self):
        small = half_plan(room=25 * 40_108_032)
        assert (small.num_blocks, small.most_requests, small.capture_size) == (25, 8, 16)

    @given(st.integers(1, 200_000), st.integers(1, 1000))
    def test_longer_sequences_are_fewer(self, context, more):
        plan = half_plan("bmojo")
        assert plan.sequences(context + more) <= plan.sequences(context)

    def test_longest(self):
        plan = planner.plans(qwen3_8b(), "l4")[0]
        longest = plan.longest(131072)
        assert plan.sequences(longest) == 1 and plan.sequences(longest + 1) == 0


class TestInput:
    def test_names(self):
        assert parse_gpus("H200x8") == (GPUS["h200"], 8)
        assert parse_gpus("a100-40") == (GPUS["a100-40"], 1)
        assert parse_gpus("rtx4090") == (GPUS["rtx4090"], 1)

    @pytest.mark.parametrize(
        ("gpus", "line"),
        [
            ("h20", "did you mean 'h200'"),
            ("h100x0", "at least one GPU"),
            ("h100x3", "32 query and 8 key/value heads do not split over 3 GPUs"),
            ("", "unknown GPU"),
            ("rtx5090", "unknown GPU 'rtx5090'; did you mean 'rtx4090'"),
        ],
    )
    def test_refused_names(self, gpus, line):
        with pytest.raises(HmfError, match=line):
            planner.plans(qwen3_8b(), gpus)

    def test_key_heads_that_do_not_split(self):
        """Ranks hold equally many, or share one evenly: vLLM takes nothing else."""
        config = FAMILIES["qwen3"].config_class()(**QWEN3_8B | {"num_attention_heads": 24, "num_key_value_heads": 6})
        for gpus in ("h200x4", "h200x8"):
            with pytest.raises(HmfError, match="24 query and 6 key/value heads do not split over"):
                planner.plans(config, gpus)
        assert planner.plans(config, "h200x12")[0].ranks == 12

    def test_too_small(self):
        config = FAMILIES["qwen3"].config_class()(**QWEN3_8B | {"num_hidden_layers": 72})
        with pytest.raises(HmfError, match="leave no room for a cache; use more GPUs, for example l4x2"):
            planner.plans(config, "l4")
        with pytest.raises(HmfError, match="use more GPUs, for example l4x4, or"):
            planner.plans(FAMILIES["qwen3"].config_class()(**QWEN3_8B | {"num_hidden_layers": 150}), "l4")
        with pytest.raises(HmfError, match="no room for a cache; use larger GPUs"):
            planner.plans(FAMILIES["qwen3"].config_class()(**QWEN3_8B | {"num_hidden_layers": 1000}), "l4")

    def test_quantised(self):
        config = FAMILIES["qwen3"].config_class()(**QWEN3_8B, quantization_config={"quant_method": "fp8"})
        with pytest.raises(HmfError, match="quantization_config"):
            planner.plans(config, "h100")

    @pytest.mark.parametrize("name", ["kv_cache_dtype", "mamba_ssm_cache_dtype"])
    def test_unknown_dtypes_of_caches(self, name):
        with pytest.raises(HmfError, match=f"--{name.replace('_', '-')}: unknown dtype 'fp7'"):
            planner.ServingSettings(**{name: "fp7"})

    def test_shares(self):
        with pytest.raises(HmfError, match="--gpu-memory-utilization: 90"):
            planner.ServingSettings(utilisation=90)


def test_a_model_with_another_hybrid_override_pattern_is_refused():
    """Nemotron-H has this key for its own layers, and is no Hybrid of ours."""
    with pytest.raises(HmfError, match="model_type 'nemotron_h' cannot be a base, because its layers have recurrences"):
        planner.plans(NemotronHConfig(), "h100")


def test_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **QWEN3_8B}))
    picture = tmp_path / "plan.png"
    arguments = [str(tmp_path), "--ratio", "0.5", "--gpu", "h200x8", "--context", "131072", "--plot", str(picture)]
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    assert "Hybrid, 18 + 18" in result.output and "Transformer" in result.output
    assert "544 tokens" in result.output and "sequences that fit" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **given: drawn.append(figure))
    CliRunner().invoke(app, ["plan", *arguments])
    assert drawn[0].get_suptitle().startswith(f"{tmp_path.name} on 8 x h200, ")
    notes = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    assert len(notes) == 2 * 8 and notes[-1] == "1.98×"  # as the table above has it for the longest
    arguments[-1] = str(tmp_path / "nowhere" / "plan.png")
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, HmfError) and "create it or choose another" in str(result.exception)


OWN_RECURRENCE = {
    "family": "qwen3_5_text",
    "base_layer_types": ["linear_attention", "full_attention"] * 3,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 384,
}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("case", "pattern", "fields"),
    [
        (Case("GDN", "even"), "X-*-X-*", {}),
        (Case("M2", "fp8"), "X-*-X-*", {"kv_cache_dtype": "fp8"}),
        (Case("GKA", "uneven"), "X-X-X-*", {}),
        (Case("SWA", "windows"), "GDN-*-X-M2-*", {"swa_config": {"window_size": 300}}),
        (Case("GKA", "beside recurrent layers of the base"), "*-X-*-*-*-M2", OWN_RECURRENCE),
        (None, "*-*-*", {}),
    ],
    ids=["gdn", "fp8 keys", "gka", "mixed", "own recurrence", "transformer"],
)
def test_vllm_agrees(tmp_path, case, pattern, fields):
    """The pool that vLLM makes of 1 GiB is the planned one."""
    # large heads: the smallest block would hold the states of small ones, and hide how it is chosen
    stored = {key: fields[key] for key in fields if key == "kv_cache_dtype"}
    fields = {key: fields[key] for key in fields if key not in stored}
    model = engines.save_hybrid(tmp_path, case or Case("GDN", "none"), pattern, head_dim=128, **fields)
    with engines.engine(tmp_path, max_num_batched_tokens=256, **stored) as llm:
        config = llm.llm_engine.vllm_config
        cache = config.cache_config
        caching = cache.enable_prefix_caching
        settings = planner.ServingSettings(batched_tokens=256, prefix_caching=caching, **stored)
        device = GPUS["h100"] if engines.CUDA else cpu()  # what counts here is the same for all GPUs
        plan = planner.make_plan(model.config, device, dtype=torch.float32, settings=settings, room=engines.POOL)
        assert cache.block_size == plan.blocks.tokens
        assert cache.num_gpu_blocks == plan.num_blocks
        assert plan.capacity(1024) == pytest.approx(cache.kv_cache_size_tokens, rel=0.02)
