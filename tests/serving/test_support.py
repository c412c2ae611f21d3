# SPDX-License-Identifier: Apache-2.0
"""What the plugin refuses, it refuses before anything is loaded, in one line; what it does not know it leaves alone."""

import pickle
import re
from pathlib import Path

import pytest
import torch

from hmf.errors import HmfError
from hmf.model.families import FAMILIES
from hmf.serving.vllm import configs, support, weights
from hmf.serving.vllm.start import Start
from hmf.serving.vllm.weights import account, expected_tensors, quantised_tensors
from tests.hybrids import Case, tiny_config
from tests.numerics import assert_same
from tests.serving import engines

ROOT = Path(__file__).resolve().parents[2]
GDN = Case("GDN", "vllm")
STACKS = re.compile(r"models\.(llama|mistral|qwen)")  # vLLM's modules that hold the families' stacks
ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture(scope="module")
def hybrid_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    engines.save_hybrid(path, GDN)
    return path


def engine_config(path, **options):
    """vLLM's checked configuration, as both `vllm serve` and `LLM` make it first."""
    from vllm import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    options = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True} | options
    return EngineArgs(model=str(path), **options).create_engine_config()


def refused(path, **options) -> str:
    with pytest.raises(HmfError) as caught:
        engine_config(path, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.vllm
class TestVersion:
    @pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0"])
    def test_untested_version_stops(self, monkeypatch, version):
        import vllm

        from hmf.serving.vllm import register

        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(HmfError, match=rf"tested with vLLM .*0\.32.* and this is {version}; install"):
            register()

    @pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu"])
    def test_tested_version(self, monkeypatch, version):
        import vllm

        monkeypatch.setattr(vllm, "__version__", version)
        support.check_version()


@pytest.mark.vllm
class TestRegistration:
    def test_again_changes_nothing(self):
        from vllm.model_executor.models import ModelRegistry

        from hmf.serving.vllm import register

        register()
        once = set(ModelRegistry.get_supported_archs())
        register()
        assert set(ModelRegistry.get_supported_archs()) == once
        assert "HybridQwen3ForCausalLM" in once

    def test_configurations_travel_between_processes(self, hybrid_dir):
        from multiprocessing.reduction import ForkingPickler

        import cloudpickle

        config = engine_config(hybrid_dir).model_config.hf_config
        for pickler in (ForkingPickler, cloudpickle):
            copy = pickle.loads(pickler.dumps(config))
            assert type(copy) is type(config)
            assert copy.to_dict() == config.to_dict()

    def test_every_family_has_a_model(self):
        from hmf.serving.vllm import models

        for family in FAMILIES.values():
            own = getattr(models, f"{family.hybrid_prefix}ForCausalLM", None)
            assert (own is not None) == (family.model_type in configs.READ_BY_VLLM)
            assert own is None or issubclass(own, models.HybridForCausalLM)

    @pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite", "olmo2", "olmo3"])
    def test_other_families_are_refused(self, tmp_path, family):
        fields = engines.DIMENSIONS | {"architectures": [f"{FAMILIES[family].hybrid_prefix}ForCausalLM"]}
        tiny_config(GDN, family=family, **fields).save_pretrained(tmp_path)
        assert f"vLLM's decoder for {family} does not take the layers of a Hybrid; use hmf chat" in refused(tmp_path)

    def test_plain_models_are_not_touched(self, tiny_qwen3_dir):
        config = engine_config(tiny_qwen3_dir, enable_prefix_caching=True)
        assert config.model_config.architecture == "Qwen3ForCausalLM"
        assert not config.model_config.is_hybrid
        assert config.cache_config.mamba_cache_dtype == "auto"
        assert "hmf::recurrent_mix" not in config.compilation_config._attention_ops


@pytest.mark.vllm
class TestStates:
    def test_dtype_comes_from_the_checkpoint(self, hybrid_dir):
        cache = engine_config(hybrid_dir, dtype="bfloat16").cache_config
        assert (cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype) == ("float32", "float32")

    def test_card_flags(self, hybrid_dir):
        flags = {"mamba_cache_mode": "align", "mamba_cache_dtype": "float32", "mamba_ssm_cache_dtype": "float32"}
        cache = engine_config(hybrid_dir, enable_prefix_caching=True, **flags).cache_config
        assert (cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype) == ("float32", "float32")
        assert cache.mamba_cache_mode == "align"

    def test_narrower_states_get_one_warning(self, hybrid_dir, monkeypatch):
        from hmf.serving.vllm import config

        lines = []
        monkeypatch.setattr(config.logger, "warning_once", lambda text, *values: lines.append(text % values))
        engine_config(hybrid_dir, mamba_ssm_cache_dtype="float32")
        assert lines == []
        engine_config(hybrid_dir, mamba_cache_dtype="bfloat16", mamba_ssm_cache_dtype="bfloat16")
        (line,) = lines
        assert "--mamba-cache-dtype bfloat16 and --mamba-ssm-cache-dtype bfloat16" in line
        assert "state_dtype, float32" in line and config.DRIFT in line
        assert config.DRIFT in " ".join((ROOT / "docs" / "serving.md").read_text().split())

    def test_prefix_caching_without_flags(self, hybrid_dir):
        assert engine_config(hybrid_dir, enable_prefix_caching=True).cache_config.mamba_cache_mode == "align"


@pytest.mark.vllm
class TestRefusals:
    def test_speculative_decoding(self, hybrid_dir):
        options = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
        assert "drop --speculative-config" in refused(hybrid_dir, speculative_config=options)

    def test_lora(self, hybrid_dir):
        assert "merge the adapter" in refused(hybrid_dir, enable_lora=True)

    def test_kv_transfer(self, hybrid_dir):
        from vllm.config import KVTransferConfig

        options = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
        for given in ({"kv_transfer_config": options}, {"kv_offloading_size": 1.0}):
            assert "--kv-transfer-config and --kv-offloading-size" in refused(hybrid_dir, **given)

    def test_one_kind_of_cache_blocks(self, hybrid_dir):
        line = refused(hybrid_dir, disable_hybrid_kv_cache_manager=True)
        assert line.endswith("drop --disable-hybrid-kv-cache-manager")

    def test_cache_mode_all(self, hybrid_dir):
        config = engine_config(hybrid_dir, enable_prefix_caching=True)
        config.cache_config.mamba_cache_mode = "all"  # vLLM 0.32's own command line no longer offers it
        with pytest.raises(HmfError, match="--mamba-cache-mode align"):
            support.check(config)

    def test_stochastic_rounding(self, hybrid_dir):
        config = engine_config(hybrid_dir)
        config.mamba_config.enable_stochastic_rounding = True  # vLLM's command line takes it on some GPUs only
        with pytest.raises(HmfError, match="drop --enable-mamba-cache-stochastic-rounding"):
            support.check(config)

    @engines.on_cpu
    def test_pipeline_on_a_cpu(self, hybrid_dir):
        options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
        assert "use --tensor-parallel-size instead" in refused(hybrid_dir, **options)

    def test_stage_without_states(self, tmp_path):
        """vLLM looks for recurrent layers in every stage when it caches prefixes."""
        config = tiny_config(GDN, "*-*-SWA-*-GDN-*", architectures=["HybridQwen3ForCausalLM"], **engines.DIMENSIONS)
        config.save_pretrained(tmp_path)
        checked = engine_config(tmp_path, enable_prefix_caching=True)
        checked.parallel_config.pipeline_parallel_size = 2
        with pytest.raises(HmfError, match="stage 1 of 2 has no recurrent layer.* use --no-enable-prefix-caching"):
            support.check(checked)

    def test_fused_checkpoint(self, tmp_path):
        tiny_config(GDN, **engines.DIMENSIONS, architectures=["HybridQwen3ForCausalLM"]).save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        for plain, fused in (('"GDN-*-GDN"', '"GDN*-*DA-GDN*"'), ('"*"', '"*DA"'), ('"GDN"', '"GDN*"')):
            assert plain in text
            text = text.replace(plain, fused)
        (tmp_path / "config.json").write_text(text)
        assert "hmf export" in refused(tmp_path)

    def test_layer_type_without_a_vllm_layer(self, hybrid_dir, monkeypatch):
        monkeypatch.setattr(support, "SERVED_BY", {})
        assert "layers of type GDN have no row in SERVED_BY" in refused(hybrid_dir)

    @pytest.mark.parametrize(
        ("method", "line"),
        [
            ("fp8_per_block", "--quantization fp8_per_block is not supported; use compressed-tensors,"),
            pytest.param(
                "fp8_per_tensor",
                "vLLM's CPU build cannot quantise to fp8_per_tensor; use fp8_per_channel",
                marks=engines.on_cpu,
            ),
        ],
    )
    def test_quantisation(self, hybrid_dir, method, line):
        assert line in refused(hybrid_dir, quantization=method, dtype="bfloat16")

    @pytest.mark.parametrize("backend", ["Triton", ["hmf"]])
    def test_prefill_kernels(self, hybrid_dir, backend):
        line = "--additional-config: gdn_prefill_backend: unknown backend"
        assert line in refused(hybrid_dir, additional_config={"gdn_prefill_backend": backend})

    def test_experts(self, tmp_path):
        sizes = engines.DIMENSIONS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        config = tiny_config(GDN, family="qwen3_moe", architectures=["HybridQwen3MoeForCausalLM"], **sizes)
        config.save_pretrained(tmp_path)
        assert "quantised experts" in refused(tmp_path, quantization="fp8_per_channel", dtype="bfloat16")
        if not engines.CUDA:
            parallel = {"enable_expert_parallel": True, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
            assert "drop --enable-expert-parallel" in refused(tmp_path, **parallel)

    @engines.on_cpu
    def test_head_dim_without_a_kernel(self, tmp_path):
        tiny_config(GDN, architectures=["HybridQwen3ForCausalLM"]).save_pretrained(tmp_path)
        assert "no kernel for head_dim 8" in refused(tmp_path)

    @pytest.mark.parametrize(
        ("family", "fields", "line"),
        [
            ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': vLLM's MLPs support only silu; generate with"),
            ("llama", {"hidden_act": "swish"}, "hidden_act 'swish': vLLM's MLPs support only silu; write silu, which"),
            ("qwen2", {}, "head_dim 32: vLLM's Qwen2 assumes hidden_size / num_attention_heads, 16"),
            ("qwen3", {"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config in"),
            ("qwen3", {"rswa_window": 0}, "rswa_window in config.json"),
            ("llama", {"num_kv_heads": 1}, "num_kv_heads in config.json"),
            ("qwen3", {"head_dtype": "bfloat16"}, "head_dtype in config.json"),
            (
                "phi3",
                {"hidden_size": 128, "rope_parameters": ROPE | {"partial_rotary_factor": 0.3}},
                "partial_rotary_factor: it rotates an odd number of channels",
            ),
            ("ministral3", {"attention_bias": True}, "attention_bias in config.json"),
            ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling in config.json"),
            ("phi3", {"attention_bias": True}, "attention_bias in config.json"),
            ("llama", {"qkv_bias": False, "attention_bias": True}, "qkv_bias in config.json"),
            ("qwen3", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
            (
                "llama",
                {
                    "rope_parameters": ROPE
                    | {
                        "rope_type": "longrope",
                        "short_factor": [1.0] * 16,
                        "factor": 2.0,
                        "long_factor": [2.0] * 16,
                        "original_max_position_embeddings": 64,
                    }
                },
                "rope_type 'longrope'",
            ),
            ("qwen3", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
            ("qwen3", {"rope_parameters": ROPE | {"rope_dim": 16}}, "rope_parameters.rope_dim"),
            (
                "qwen3",
                {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 512}},
                "(yarn) ends at 1024, before the 4096 of the longest sequence; use --max-model-len 1024",
            ),
        ],
    )
    def test_what_vllm_computes_otherwise(self, tmp_path, family, fields, line):
        architecture = f"{FAMILIES[family].hybrid_prefix}ForCausalLM"
        fields = engines.DIMENSIONS | fields | {"architectures": [architecture]}
        tiny_config(GDN, family=family, **fields).save_pretrained(tmp_path)
        assert line in refused(tmp_path)

    @pytest.mark.parametrize(
        ("overrides", "line"),
        [
            (
                {"rope_parameters": LINEAR},
                "rope_parameters.rope_theta: is missing; the table replaces that of config.json",
            ),
            ({"rope_scaling": LINEAR}, "rope_parameters.rope_theta: is missing"),
            ({"rope_theta": 5e5}, "rope_theta: 500000.0 is not read, because rope_parameters has 10000.0"),
            ({"sliding_window": 8}, "sliding_window: 8 contradicts other keys, from which None follows"),
            ({"gka_overrides": {"num_iter": 3}}, "gka_overrides: no layer of the pattern .* has this type"),
            ({"gdn_config": {"conv_size": 3}}, "gdn_config.allow_neg_eigval: is missing"),
        ],
    )
    def test_overrides_that_do_not_fit(self, hybrid_dir, overrides, line):
        """vLLM would take its default of 10000 for a rope_theta that is not there."""
        assert re.search(f"^{hybrid_dir}: --hf-overrides: {line}", refused(hybrid_dir, hf_overrides=overrides))

    def test_overrides_that_fit(self, hybrid_dir):
        for overrides in ({"rope_parameters": ROPE | LINEAR}, {"gdn_overrides": {"use_gate": False}}):
            engine_config(hybrid_dir, hf_overrides=overrides)

    @pytest.mark.parametrize(
        "rope",
        [
            {},
            {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.3, "original_max_position_embeddings": 16},
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            YARN,
            YARN | {"original_max_position_embeddings": 128},
            YARN | {"attention_factor": 1.5, "mscale": 0.7, "mscale_all_dim": 0.5},
            YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False},
            YARN | {"mscale": 0.7, "beta_fast": 8, "beta_slow": 2.0},
            YARN | {"mscale": 0.0, "mscale_all_dim": 0.5, "factor": 2.5},
        ],
        ids=str,
    )
    def test_rotary_tables_are_those_of_transformers(self, rope):
        """Every served type with every key that it reads, and with keys that it does not. Factors divide exactly."""
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.layers.rotary_embedding import get_rope

        config = tiny_config(GDN, family="llama", **engines.DIMENSIONS, rope_parameters=ROPE | rope)
        with set_current_vllm_config(VllmConfig()):
            rotary = get_rope(32, 64, rope_parameters=dict(config.rope_parameters), dtype=torch.float32)
        table = rotary.cos_sin_cache
        stock = FAMILIES["llama"].class_named("RotaryEmbedding")(config)
        cos, sin = stock(torch.zeros(1, len(table), 1), torch.arange(len(table))[None])
        assert_same(table, torch.cat([cos[0, :, :16], sin[0, :, :16]], 1))

    def test_vllms_layers_read_no_other_keys(self):
        """Each key that the stock stacks take from a config is one that transformers computes with, or refused."""
        import inspect
        import sys

        from hmf.serving.vllm import models

        # Those that `hybrid_layer`, `_suit_stock_layers` or a Hybrid's config sees to, and what every config has.
        handled = {
            "llama_4_scaling",
            "max_window_layers",
            "sliding_window",
            "is_causal",
            "layer_types",
            "attn_output_gate",
            *models.QWEN3_NEXT,
            "ada_rms_norm_t_cond_dim",  # only with `ada_rms_norm_t_cond`
        }
        for family in (FAMILIES[name] for name in configs.READ_BY_VLLM):
            served = getattr(models, f"{family.hybrid_prefix}ForCausalLM").stack
            used = {cls for cls in (*served.model.__mro__, *served.layer.__mro__) if STACKS.search(cls.__module__)}
            for module in {cls.__module__ for cls in used}:  # and what they are built of
                used |= {
                    cls
                    for cls in vars(sys.modules[module]).values()
                    if inspect.isclass(cls)
                    and STACKS.search(cls.__module__)
                    and not cls.__name__.endswith(("DecoderLayer", "Model", "ForCausalLM"))
                }
            text = "".join(map(inspect.getsource, used))
            read = {*re.findall(r'\bconfig,\s*"(\w+)"', text), *re.findall(r"\bconfig\.(\w+)", text)}
            assert "hidden_size" in read
            config = tiny_config(GDN, family=family.model_type)
            known = {name for name in read if hasattr(config, name)}
            if family.model_type == "qwen3_5_text":  # without experts
                known |= {"num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}
            assert read - known - handled - set(configs.READ_BY_VLLM[family.model_type]) == set(), family.prefix

    def test_what_vllm_reads_of_every_config(self):
        """Each key is one of the Hybrid's own, or refused, or does not change what the model computes."""
        import inspect

        from vllm.config.model import ModelConfig
        from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase as Reader

        text = inspect.getsource(ModelConfig) + inspect.getsource(Reader)
        read = {
            *re.findall(r'(?:getattr|hasattr)\(\s*(?:self\.)?(?:hf_(?:text_)?)?config,\s*"(\w+)"', text),
            *re.findall(r"\bhf_(?:text_)?config\.(\w+)", text),
        }
        lists = ("get_total_num_kv_heads", "get_num_experts", "get_num_experts_per_token")
        for name in (*lists, "derive_max_model_len_and_key"):
            read |= set(re.findall(r'^ +"([a-z_]+)",', inspect.getsource(getattr(Reader, name)), re.MULTILINE))
        assert {"rswa_window", "num_kv_heads"} <= read
        harmless = {
            # lengths of a sequence, which limit and do not change it
            *("max_seq_len", "max_seq_length", "max_sequence_length", "max_target_positions", "model_max_length"),
            *("n_positions", "seq_len", "seq_length"),
            # numbers of experts, which the layers do not take from here, and names after those that a Hybrid has
            *("block_configs", "moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts"),
            *("moe_top_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
            *("hidden_size_per_head", "multi_query_group_num", "num_attention_groups"),
            # other architectures, models with images, and pooling
            *("attn_type_list", "chunk_size", "compress_ratios", "kv_lora_rank", "layers_block_type"),
            *("mamba_chunk_size", "model", "qk_nope_head_dim", "encoder_config", "is_mm_prefix_lm", "text_config"),
            *("vision_config", "embedding_size", "is_matryoshka", "matryoshka_dimensions", "position_embedding_type"),
            *("use_pad_token", "use_sep_token"),
            # checked elsewhere: with the weights, in a Hybrid's config, and for the families that have it
            *("compression_config", "quantization_config", "is_causal", "dual_chunk_attention_config"),
        }
        config = tiny_config(GDN)
        assert {name for name in read if not hasattr(config, name)} - harmless <= set(configs.READ_BY_VLLM_ALWAYS)

    def test_heads_that_do_not_split(self, hybrid_dir):
        assert "do not split over 3 ranks" in refused(
            hybrid_dir, tensor_parallel_size=3, distributed_executor_backend="mp"
        )

    @pytest.mark.parametrize(
        ("keys", "ranks", "fits"), [(6, 2, True), (6, 4, False), (2, 4, True), (3, 2, False), (1, 12, True)]
    )
    def test_ranks_share_a_key_head_or_hold_equally_many(self, keys, ranks, fits):
        config = tiny_config(GDN, num_attention_heads=12, num_key_value_heads=keys)
        problem = support.split_problem(config, ranks)
        assert problem is None if fits else f"12 query and {keys} key/value heads do not split over {ranks}" in problem

    def test_what_mixes_all_heads_does_not_split(self, tmp_path):
        """The recurrent layer inside B'MOJO-F included."""
        inner = {"gdn_config": {"kv_proj_rank": 4}, "bmojo_config": {"ssm_mixer": "gdn", "window_size": 5}}
        config = tiny_config(Case("BMF", "low-rank"), **inner)
        assert "gdn_config.kv_proj_rank" in support.split_problem(config, 2)
        assert support.split_problem(config, 1) is None
        assert "intermediate_size 27" in support.split_problem(tiny_config(GDN, intermediate_size=27), 2)


class TestWeights:
    @pytest.fixture
    def tensors(self, hybrid_dir):
        from safetensors.torch import load_file

        return load_file(hybrid_dir / "model.safetensors")

    @pytest.fixture
    def expected(self, hybrid_dir):
        from transformers import AutoConfig

        return expected_tensors(AutoConfig.from_pretrained(hybrid_dir))

    def test_whole(self, tensors, expected):
        assert dict(account(tensors.items(), *expected)).keys() == tensors.keys()

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            (lambda t: t.pop("model.layers.0.gdn.k_proj.weight"), r"missing: model\.layers\.0\.gdn\.k_proj\.weight$"),
            (lambda t: t.update({"model.layers.0.gdn.k_proj.bias": torch.ones(64)}), r"unexpected: .*k_proj\.bias$"),
            (
                lambda t: t.update({"model.layers.0.gdn.A_log": torch.ones(7)}),
                r"wrong shape: model\.layers\.0\.gdn\.A_log \[7\] instead of \[4\]$",
            ),
            (
                lambda t: t.update({"model.layers.2.gdn.g.weight": t.pop("model.layers.2.gdn.g_proj.weight")}),
                r"missing: model\.layers\.2\.gdn\.g_proj\.weight; unexpected: model\.layers\.2\.gdn\.g\.weight$",
            ),
            (lambda t: t["model.norm.weight"].view(-1)[3:5].fill_(torch.inf), r"infinite: model\.norm.* \(2 of 64 "),
        ],
    )
    def test_damaged(self, tensors, expected, change, line):
        change(tensors)
        with pytest.raises(HmfError, match=line):
            dict(account(tensors.items(), *expected))

    def test_quantised_where_we_serve_unquantised(self, tensors, expected):
        name = "model.layers.0.gdn.b_proj"
        tensors |= {
            f"{name}.weight": tensors[f"{name}.weight"].to(torch.int8),
            f"{name}.weight_scale": torch.ones(4, 1),
        }
        with pytest.raises(HmfError, match=rf"config.json; quantised but .* ignore list: {name}$"):
            dict(account(tensors.items(), *expected))

    def test_quantised_projections_have_their_scales(self, tensors, expected):
        """As the serving model has them: a scale beside the weight, or other tensors in its place."""
        held = {
            "model.layers.1.mlp.up_proj": ["weight", "weight_scale"],
            "model.layers.1.mlp.down_proj": ["weight_packed", "weight_scale"],
            "model.layers.1.mlp.gate_proj": ["weight"],
        }
        wanted = quantised_tensors(expected[0], held.get)
        with pytest.raises(HmfError) as caught:
            dict(account(tensors.items(), wanted))
        assert str(caught.value).split("; ", 1)[1] == (
            "missing: model.layers.1.mlp.up_proj.weight_scale, model.layers.1.mlp.down_proj.weight_packed, "
            "model.layers.1.mlp.down_proj.weight_scale; unexpected: model.layers.1.mlp.down_proj.weight"
        )
        tensors["model.layers.1.mlp.up_proj.weight_scale"] = torch.ones(48, 1)
        tensors["model.layers.1.mlp.down_proj.weight_packed"] = tensors.pop("model.layers.1.mlp.down_proj.weight")
        tensors["model.layers.1.mlp.down_proj.weight_scale"] = torch.ones(64, 1)
        assert dict(account(tensors.items(), wanted)).keys() == tensors.keys()

    @pytest.mark.vllm
    @engines.on_cpu
    @pytest.mark.parametrize("vnni", [False, True])
    def test_products_that_overflow(self, monkeypatch, vnni):
        found = {"architecture": "x86_64", "avx512_vnni": vnni}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        weights._adds_in_32_bits.cache_clear()
        try:
            weights.require_exact_products("up_proj.weight", torch.tensor([64, -64], dtype=torch.int8))
            largest = torch.tensor([3, -128], dtype=torch.int8)
            if vnni:
                weights.require_exact_products("up_proj.weight", largest)
            else:
                with pytest.raises(HmfError, match=r"up_proj.weight: int8 weights up to 128 overflow"):
                    weights.require_exact_products("up_proj.weight", largest)
        finally:
            weights._adds_in_32_bits.cache_clear()

    @pytest.mark.vllm
    @engines.on_cpu
    @pytest.mark.parametrize("amx", [False, True])
    def test_products_of_inputs_in_two_bytes(self, monkeypatch, amx):
        from vllm.model_executor.layers import utils

        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        weight = torch.ones(32, 64, dtype=torch.int8)
        assert utils.check_cpu_sgl_kernel(*weight.shape, weight.dtype) == amx
        if amx:
            with pytest.raises(
                HmfError, match=r"up_proj.weight: int8 products do not support float32.* --dtype bfloat16"
            ):
                weights.require_exact_products("up_proj.weight", weight)
        else:
            weights.require_exact_products("up_proj.weight", weight)
        weights.require_exact_products("up_proj.weight", weight[:, :31])  # vLLM has another kernel for these
        monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
        weights.require_exact_products("up_proj.weight", weight)

    def test_tied_head_may_be_absent(self, tensors, tmp_path):
        config = tiny_config(GDN, "X-*-X-*", tie_word_embeddings=True, **engines.DIMENSIONS)
        expected = expected_tensors(config)
        with pytest.raises(HmfError, match=r"tie_word_embeddings must be false: lm_head\.weight$"):
            dict(account(tensors.items(), *expected))
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(torch.float64)
        dict(account(tensors.items(), *expected))
        del tensors["lm_head.weight"]
        dict(account(tensors.items(), *expected))


@pytest.mark.parametrize(
    ("case", "family", "fields", "line"),
    [
        (Case("GDN", "x"), "qwen3", {"gdn_config": {"conv_size": 5}}, "gdn_config.conv_size 5: vLLM's kernels"),
        (Case("KDA", "x"), "qwen3", {"kda_config": {"conv_size": 1}}, "kda_config.conv_size 1: vLLM cannot keep"),
        (Case("BMF", "x"), "qwen3", {"bmojo_config": {"ssm_mixer": "gka"}, "gka_config": {"conv_size": 8}}, "gka_conf"),
        (Case("SWA", "x"), "qwen3_next", {"linear_conv_kernel_dim": 5}, "linear_conv_kernel_dim 5: vLLM's kernels"),
        (Case("GDN", "x"), "qwen3", {"gdn_config": {"conv_size": 5, "use_short_conv": False}}, None),
        (Case("GDN", "x"), "qwen3", {"gdn_config": {"conv_size": 2}}, None),
        (Case("M2", "x"), "qwen3", {}, None),
    ],
)
def test_widths_of_convolutions_on_a_gpu(case, family, fields, line):
    """vLLM's kernel for prefills adds the oldest input's product several times in place of inputs that it does not
    have in a width above 4."""
    config = tiny_config(case, family=family, **fields)
    found = configs.convolutions(Start(config, longest=64, on_cpu=False))
    assert found is None if line is None else found.startswith(line)
    on_cpu = configs.convolutions(Start(config, longest=64, on_cpu=True))
    assert on_cpu == (found if line and "cannot keep" in line else None)


def test_documentation_prints_the_table():
    assert support.markdown() in (ROOT / "docs" / "serving.md").read_text()
