# SPDX-License-Identifier: Apache-2.0
"""Hybrids built on vLLM's stock decoder stacks. Each family is one row of a table; there is no forward code.

A Hybrid's layer is the stock layer of its family. Where the pattern has another symbol than attention, a mixer replaces
the layer's attention. Norms, MLP or experts, residuals and pipeline stages are vLLM's. Most stacks take their layer
class as a parameter; in the others the finished layers are changed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import regex as re
import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralModel
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeModel
from vllm.model_executor.models.qwen3_next import Qwen3NextDecoderLayer, Qwen3NextModel
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    maybe_prefix,
)

from hmf.config.layers import LAYER_KINDS
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError
from hmf.layers.attention import has_positions, stock_parameters
from hmf.layers.base import StateShape
from hmf.layers.own import OWN_MODULE, RECURRENT

from .configs import ELSEWHERE
from .hosted import HostedMixer
from .own import OWN_STACKED
from .recurrent import state_dtypes
from .support import layer_symbols, mixer_module, reported
from .weights import account, expected_tensors, quantised_tensors, require_exact_products
from .window import windowed, with_gates

_NAMES = "|".join(kind.module_name for kind in LAYER_KINDS.values())
MIXER_TENSOR = re.compile(rf"model\.layers\.(?P<layer>\d+)\.(?:{_NAMES})\.(?P<tensor>.+)")
IN_A_MIXER = re.compile(rf"model\.layers\.(?P<layer>\d+)\.(?P<mixer>self_attn|{OWN_MODULE})\.(?P<tensor>.+)")
PLACE = r"model.layers.\g<layer>.self_attn.\g<tensor>"  # of a new mixer's tensor in this model


@dataclass(frozen=True)
class Stack:
    """A stock decoder stack, its layer class, and the name of the stack's parameter that takes one, if it has one."""

    model: type[nn.Module]
    layer: type[nn.Module]
    parameter: str | None = None

    def build(self, vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """The decoder with the layers of a Hybrid."""
        if self.parameter is not None:
            return self.model(vllm_config=vllm_config, prefix=prefix, **{self.parameter: hybrid_layer(self.layer)})
        config = vllm_config.model_config.hf_config
        mixed = config.layer_types
        config.layer_types = [
            RECURRENT if symbol == RECURRENT else "full_attention" for symbol in layer_symbols(config)
        ]
        model = self.model(vllm_config=vllm_config, prefix=prefix)
        config.layer_types = mixed
        for index, layer in enumerate(model.layers):
            if isinstance(layer, self.layer):  # on this rank
                replace_mixer(layer, f"{prefix}.layers.{index}")
        return model


def hybrid_layer(stock: type[nn.Module]) -> type[nn.Module]:
    """`stock`, a vLLM decoder layer class, with mixers where the pattern says so, and the windows of the config."""

    class HybridDecoderLayer(stock):
        def __init__(self, *args: Any, prefix: str = "", **kwargs: Any):
            super().__init__(*args, prefix=prefix, **kwargs)
            replace_mixer(self, prefix)

    return HybridDecoderLayer


def replace_mixer(layer: Any, prefix: str) -> None:
    """Replace a stock decoder layer's attention by the mixer of its symbol, or set the attention's window."""
    vllm_config = get_current_vllm_config()
    config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
    index = extract_layer_index(prefix)
    symbol, window = layer_symbols(config)[index], config.attention_windows[index]
    stock_name = OWN_MODULE if symbol == RECURRENT else "self_attn"
    stock = layer.get_submodule(stock_name)
    if symbol != RECURRENT:
        _complete(stock, config, index, quant_config, f"{prefix}.self_attn")
        if not has_positions(config, index):
            stock.rotary_emb = NoPositions()
    if symbol == ATTENTION and stock.attn.sliding_window == window:
        return
    # The stock layer has registered its mixer, and vLLM would allocate a cache for it. Remove the entry.
    announced = vllm_config.compilation_config.static_forward_context
    for name in [name for name in announced if f"{name}.".startswith(f"{prefix}.{stock_name}.")]:
        del announced[name]
    if symbol == ATTENTION:  # the stock layers of Qwen have no windows of their own
        mixer = windowed(stock, window, quant_config, f"{prefix}.self_attn")
    else:
        name = OWN_MODULE if symbol == RECURRENT else LAYER_KINDS[symbol].module_name
        mixer = mixer_module(symbol).build(symbol, config, quant_config, f"{prefix}.{name}", stock)
    setattr(layer, stock_name, mixer)


def _place(published: str) -> str:
    """The place of a published tensor in this model, before projections are joined."""
    return MIXER_TENSOR.sub(PLACE, published)


class NoPositions(nn.Module):
    """Replaces rotary positions in layers that have none, such as some layers of SmolLM3."""

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        return query, key


def _complete(attention: Any, config: Any, index: int, quant_config: Any, prefix: str) -> None:
    """Add the output bias that transformers' attention has in Qwen3 and vLLM's does not."""
    if attention.o_proj.bias is None and "o_proj.bias" in stock_parameters(config, index):
        width = attention.total_num_heads * attention.head_dim
        attention.o_proj = RowParallelLinear(
            width, config.hidden_size, bias=True, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )


class HybridForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsPP):
    """A Hybrid of any family. A subclass sets its `stack`, and `READ_BY_VLLM` in configs.py has its family."""

    stack: ClassVar[Stack]
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    # Published names to the place of the mixer; the stock stack's mapper then joins q, k and v as for attention.
    weights_mapper = WeightsMapper(
        orig_to_new_regex={MIXER_TENSOR: PLACE},
        orig_to_new_stacked={f".{stream}_conv1d.": (".conv1d.", stream) for stream in "qkv"} | OWN_STACKED,
    )
    # For the ignore list of quantised checkpoints: in vLLM the projections of a sliding-window layer are attention's.
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr={".swa.": ".self_attn."})

    @reported()
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        _suit_stock_layers(config)
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = self.stack.build(vllm_config, maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            name = maybe_prefix(prefix, "lm_head")
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=self.quant_config, prefix=name
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """input_ids, positions [N] -> hidden states [N, D] after the last norm, or the inputs of the next stage."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    @reported()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load published tensors; HmfError names every missing, unexpected or misshapen tensor."""
        hosted: set[str] = set()
        expected, optional = expected_tensors(self.config)
        if getattr(self.config, "quantization_config", None):
            expected = quantised_tensors(expected, self._parameters_of)

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in with_gates(account(weights, expected, optional), expected, self.config):
                if (match := IN_A_MIXER.fullmatch(_place(name))) is not None:
                    mixer = getattr(self.model.layers[int(match["layer"])], match["mixer"], None)
                    if isinstance(mixer, HostedMixer) and (loaded := mixer.load(match["tensor"], tensor)):
                        hosted.add(f"model.layers.{match['layer']}.{match['mixer']}.{loaded}")
                        continue
                require_exact_products(name, tensor)
                linear = self._linear_of(name.removesuffix(".bias")) if name.endswith(".bias") else None
                if linear is not None and linear.bias is None:  # vLLM's loaders would skip this tensor
                    raise HmfError(f"{name}: vLLM's layer has no bias; {ELSEWHERE}")
                yield name, tensor

        return AutoWeightsLoader(self).load_weights(others(), mapper=self.weights_mapper) | hosted

    def _linear_of(self, published: str) -> LinearBase | None:
        """vLLM's linear layer for a published one, or None if there is none on this rank."""
        parent, _, child = _place(published).rpartition(".")
        for name in (child, *(name for name, parts in self.packed_modules_mapping.items() if child in parts)):
            with suppress(AttributeError):  # no such module
                if isinstance(module := self.get_submodule(f"{parent}.{name}".lstrip(".")), LinearBase):
                    return module
        return None

    def _parameters_of(self, published: str) -> list[str] | None:
        """The names of the linear layer's parameters except the bias; None if there is no such layer on this rank."""
        if (module := self._linear_of(published)) is None:
            return None
        return [name for name, _ in module.named_parameters(recurse=False) if name != "bias"]

    # ---- vLLM's interface for states; it calls the first two before the model exists

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return tuple(state.shape for state in _largest_states(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return state_dtypes(_largest_states(vllm_config), vllm_config)

    def get_mamba_state_copy_funcs(self, mamba_types: set) -> dict:
        """How the states of each type are copied between blocks: as a whole, because speculation is not supported."""
        mixers = [x for x in self.modules() if isinstance(x, MambaBase) and getattr(x, "has_slots", True)]
        return {mixer.mamba_type: (get_temporal_copy_spec,) * len(tuple(mixer.get_state_shape())) for mixer in mixers}


def _largest_states(vllm_config: VllmConfig) -> list[StateShape]:
    """The states of the layer type that needs the most bytes, from which vLLM computes the size of blocks."""
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size

    def bytes_of(states: list[StateShape]) -> int:
        dtypes = state_dtypes(states, vllm_config)
        return sum(math.prod(state.shape) * dtype.itemsize for state, dtype in zip(states, dtypes, strict=True))

    symbols = set(layer_symbols(config)) - {ATTENTION}
    return max((list(mixer_module(s).states(s, config, ranks).values()) for s in symbols), key=bytes_of, default=[])


# Keys of Qwen3-Next, and what the layers of Qwen3.5 do, whose config does not have them.
QWEN3_NEXT = {"num_experts": 0, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


def _suit_stock_layers(config: Any) -> None:
    """Set attributes that vLLM's stock layers read under other names or in other forms than transformers'."""
    # Qwen2's stack rejects differing layer types as windows that its layers do not have, unless this says that no layer
    # has one. The attention of `hybrid_layer` has them.
    config.max_window_layers = config.num_hidden_layers
    rope = config.rope_parameters
    if config.family.own_recurrence:  # served by the stack of Qwen3-Next
        config.qkv_bias = config.attention_bias
        known = {field.name for field in dataclasses.fields(config.family.config_class())}
        for name, value in QWEN3_NEXT.items():
            if name not in known:
                setattr(config, name, value)
    if config.family.query_growth() is not None:  # Ministral 3
        keys = {"beta": "llama_4_scaling_beta", "original_max_position_embeddings": "original_max_position_embeddings"}
        config.llama_4_scaling = {name: rope[key] for name, key in keys.items()}
    if rope["rope_type"] == "linear":  # vLLM treats a factor that is not a float as a list
        config.rope_parameters = rope | {"factor": float(rope["factor"])}


class HybridQwen2ForCausalLM(HybridForCausalLM):
    stack = Stack(Qwen2Model, Qwen2DecoderLayer, "decoder_layer_type")


class HybridQwen3ForCausalLM(HybridForCausalLM):
    # vLLM's Qwen3 stack is Qwen2's with this layer
    stack = Stack(Qwen2Model, Qwen3DecoderLayer, "decoder_layer_type")


class HybridQwen3MoeForCausalLM(HybridForCausalLM):
    stack = Stack(Qwen3MoeModel, Qwen3MoeDecoderLayer, "decoder_layer_type")


class HybridLlamaForCausalLM(HybridForCausalLM):
    stack = Stack(LlamaModel, LlamaDecoderLayer, "layer_type")


class HybridMinistral3ForCausalLM(HybridForCausalLM):
    stack = Stack(MistralModel, MistralDecoderLayer, "layer_type")


class HybridMistralForCausalLM(HybridMinistral3ForCausalLM):
    pass


# vLLM's stack for Phi-3 is Llama's. It has none for SmolLM3, whose layers are Llama's but for those without positions.
class HybridPhi3ForCausalLM(HybridLlamaForCausalLM):
    pass


class HybridSmolLM3ForCausalLM(HybridLlamaForCausalLM):
    pass


# The decoders of these three are the same in vLLM; the classes that are called Qwen3.5 also import those for images.
class HybridQwen3NextForCausalLM(HybridForCausalLM):
    stack = Stack(Qwen3NextModel, Qwen3NextDecoderLayer)


class HybridQwen3_5ForCausalLM(HybridQwen3NextForCausalLM):
    pass


class HybridQwen3_5MoeForCausalLM(HybridQwen3NextForCausalLM):
    pass
