# SPDX-License-Identifier: Apache-2.0
"""A family's decoder with mixers in place of some of its token mixers, which it keeps as the teacher until export.

The modules are the family's own. This file adds one forward for all families, and a decoder layer that runs the
family's layer code with a mixer in place of its attention or its own recurrent layer.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hmf.config.layers import LAYER_KINDS
from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError, naming_config
from hmf.layers.base import Mixer
from hmf.layers.layout import default_positions, packed_layout
from hmf.layers.own import OWN_MODULE, RECURRENT, base_mixer_name, own_layers, own_recurrence_class
from hmf.layers.registry import MIXERS, mixer_class

from .cache import adopt
from .checkpoint import StrictLoading
from .configuration import hybrid_config_class
from .families import FAMILIES, Family, Mixin, family_of
from .rope import check_length

STUDENT, TEACHER = "student", "teacher"


class _WithMixer:
    """A view of a decoder layer whose attention is a mixer; all other attributes are the layer's."""

    def __init__(self, layer: nn.Module, mixer: nn.Module):
        self._layer, self.self_attn = layer, mixer
        if getattr(layer, "block_type", None) == RECURRENT:  # a layer of Qwen3.5 that has no attention itself
            self.block_type = "full_attention"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@functools.cache
def hybrid_layer_class(stock: type[nn.Module]) -> type[nn.Module]:
    """A family's decoder layer with a mixer under its published name. In a fused model it also keeps the family's."""

    def __init__(self, config: Any, layer_idx: int):
        with config.as_base():
            super(cls, self).__init__(config, layer_idx)
        if not config.pattern.fused:
            delattr(self, base_mixer_name(self))
        symbol = config.pattern.symbols[layer_idx]
        self.mixer_name = LAYER_KINDS[symbol].module_name
        self.add_module(self.mixer_name, mixer_class(symbol)(config, layer_idx))

    def forward(self, hidden_states: torch.Tensor, *args: Any, path: str = STUDENT, layout: Any = None, **kwargs: Any):
        if path == TEACHER:
            if layout is not None:
                kwargs["layout"] = layout
            return super(cls, self).forward(hidden_states, *args, **kwargs)
        view = _WithMixer(self, self.get_submodule(self.mixer_name))
        return stock.forward(view, hidden_states, *args, layout=layout, **kwargs)

    cls: Any = type(
        f"Hybrid{stock.__name__}", (stock,), {"__init__": __init__, "forward": forward, "__module__": __name__}
    )
    return cls


@dataclass
class LayerInputs:
    """Inputs that the layers of one forward pass share."""

    hidden_states: torch.Tensor  # [B, T, D], the embeddings
    masks: dict[str, torch.Tensor | None]  # by entry of config.attention_types; none for parts of rows
    layout: Any
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]]  # (cos, sin) [B, T, head_dim], by entry of attention_types
    shared: dict[str, Any]  # position_ids, past_key_values, use_cache and further keywords


def _shape(x: Any) -> Any:
    """The shape of a tensor, or the name of the type of another value."""
    return list(x.shape) if hasattr(x, "shape") else type(x).__name__


def _own_class(family: Family) -> type[nn.Module]:
    cls = own_recurrence_class(family.class_named(family.own_recurrence or ""))
    cls.__module__ = __name__  # where pickle finds it
    return cls


class AsItsFamily(Mixin):
    """The implementation of experts. transformers decides by the source of the class's module; here the family's."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.family.class_named("PreTrainedModel")._can_set_experts_implementation()

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        if self.config.dtype == torch.float64 and requested_experts in (None, "grouped_mm"):
            requested_experts = "eager"  # grouped_mm does not support float64
        return super().get_correct_experts_implementation(requested_experts)


class HybridModelMixin(AsItsFamily, StrictLoading):
    """The first base class of a Hybrid's decoder; the second is the family's decoder (`Qwen3Model`, ...)."""

    returns_given_cache: bool  # `Family.returns_given_cache`, read once
    _other_tensors = ("lm_head.",)  # checkpoints of the causal language model can be loaded too

    def __init__(self, config: Any):
        config.check_finished()
        with config.as_base():
            super().__init__(config)
        stock = self.family.class_named("DecoderLayer")
        with naming_config(config.name_or_path):
            for index in config.pattern.replaced:
                self.layers[index] = hybrid_layer_class(stock)(config, index)
        if self.family.own_recurrence:
            own = _own_class(self.family)
            with config.as_base():
                for index in own_layers(config):
                    if hasattr(self.layers[index], OWN_MODULE):  # not replaced, or the teacher
                        setattr(self.layers[index], OWN_MODULE, own(config, index))
        self.post_init()

    def prepare(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> LayerInputs:
        """Embeddings, positions, masks and cache, from the arguments of a Hugging Face decoder's forward."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if hasattr(self, "embedding_multiplier"):  # Granite; it also scales embeddings that are passed
            inputs_embeds = inputs_embeds * self.embedding_multiplier
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch, tokens = inputs_embeds.shape[:2]
        if not batch * tokens:
            name = "inputs_embeds" if input_ids is None else "input_ids"
            raise HmfError(f"{name}: has no tokens, as its shape begins with {[batch, tokens]}; give one or more")
        if past_key_values is not None:
            adopt(past_key_values, self.config, batch)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and _shape(attention_mask) != [batch, past + tokens]:
            raise HmfError(
                f"attention_mask: recurrent layers need shape [batch, cached + new tokens], {[batch, past + tokens]}, "
                f"not {_shape(attention_mask)}"
            )
        may_jump = attention_mask is not None or past_key_values is not None
        if attention_mask is not None and tokens > 1 and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is not None and _shape(position_ids) not in ([1, tokens], [batch, tokens]):
            raise HmfError(
                f"position_ids: must be of shape [batch, new tokens], {[batch, tokens]}, not {_shape(position_ids)}; "
                "positions on the axes of images are not supported"
            )
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        given_positions = position_ids
        if position_ids is None:
            position_ids = default_positions(tokens, past, attention_mask, cu_seqlens, inputs_embeds.device)
        elif cu_seqlens is not None and bool(position_ids[0, cu_seqlens[:-1][cu_seqlens.diff() > 0].long()].any()):
            raise HmfError("position_ids: must restart at 0 at each document start in cu_seq_lens_q")
        if past:
            check_length(self.config, past, position_ids)
        shards = kwargs.get("shards")
        if shards is not None:  # sequence parallelism: parts of rows (hmf.parallel); attention receives `shards` too
            if attention_mask is not None or past_key_values is not None:
                raise HmfError(
                    "shards: sequence parallelism supports neither padding nor a cache; pass rows without padding and "
                    "use_cache=False"
                )
            layout = shards.layout
        else:
            # Positions from above begin no documents. Without a look at their values, torch.compile has one graph.
            layout = packed_layout((batch, tokens), attention_mask, given_positions, cu_seqlens, past > 0, may_jump)
        masks: dict[str, Any] = {}
        if shards is None:
            masks = self._masks(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values if past else None,
                position_ids=position_ids,
            )
        shared = {
            **kwargs,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        return LayerInputs(inputs_embeds, masks, layout, self._rotary(inputs_embeds, position_ids), shared)

    def _masks(self, **arguments: Any) -> dict[str, torch.Tensor | None]:
        """The masks of the attention layers that run, by entry of config.attention_types."""
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        kinds = self.config.attention_types if self.config.pattern.fused else self.config.layer_types
        return {kind: makers[kind](config=self.config, **arguments) for kind in set(kinds) if kind in makers}

    def _rotary(self, x: torch.Tensor, position_ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        kinds = set(self.config.attention_types)
        if (axes := self.family.position_axes()) > 1:
            position_ids = position_ids.expand(axes, *position_ids.shape)
        if self.family.positions_by_layer_type():
            return {kind: self.rotary_emb(x, position_ids, kind) for kind in kinds}
        return dict.fromkeys(kinds, self.rotary_emb(x, position_ids))

    def run_layers(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, layers: range, path: str | frozenset[int] = STUDENT
    ) -> torch.Tensor:
        """Run hidden_states [B, T, D] through `layers`. Replaced layers use their mixer, or on the teacher's path what
        the base has there. If `path` is a set of layers, these use their mixer and the others the base's."""
        symbols, types = self.config.pattern.symbols, self.config.attention_types
        for index in layers:
            mixed = symbols[index] != ATTENTION and (index in path if isinstance(path, frozenset) else path != TEACHER)
            own: dict[str, Any] = {"attention_mask": None if mixed else inputs.masks.get(types[index])}
            if mixed or types[index] == RECURRENT:
                own["layout"] = inputs.layout
            if symbols[index] != ATTENTION and not mixed:
                own["path"] = TEACHER
            own["position_embeddings"] = inputs.rotary[types[index]]
            hidden_states = self.layers[index](hidden_states, **own, **inputs.shared)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """A Hugging Face decoder's forward on the student's path: input_ids [B, T] -> last_hidden_state [B, T, D]."""
        inputs = self.prepare(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        hidden_states = self.run_layers(inputs.hidden_states, inputs, range(len(self.layers)))
        given = past_key_values is not None and self.returns_given_cache
        return self.family.output_class()(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=inputs.shared["past_key_values"] if use_cache or given else None,
        )


class _Projected:
    """A view of a causal language model whose decoder and head return given values."""

    def __init__(self, whole: nn.Module, decoded: Any):
        self._whole, self.model, self.lm_head = whole, lambda **kwargs: decoded, lambda hidden_states: hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def logits_of(model: Any, projected: torch.Tensor) -> torch.Tensor:
    """The logits of a base or Hybrid from its head's output, both [N, vocabulary]: Granite divides, Gemma 2 caps them.

    The family's own forward computes them, on a view whose decoder and head return `projected`.
    """
    family = family_of(model.config.model_type)
    decoded = family.output_class()(last_hidden_state=projected[None])
    stock: Any = family.class_named("ForCausalLM")
    return stock.forward(_Projected(model, decoded), return_dict=True).logits[0]


class HybridCausalLMMixin(AsItsFamily, StrictLoading):
    """The first base class of a Hybrid's causal language model; the second is `Qwen3ForCausalLM` or the like."""

    # Recurrent states cannot be rolled back. With this flag transformers refuses assisted generation.
    _is_stateful = True
    _can_compile_fullgraph = False

    def __init__(self, config: Any):
        with config.as_base():
            super().__init__(config)
        self.model = hybrid_classes(self.family).model(config)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any):
        if generation_config.cache_implementation not in (None, "dynamic", "offloaded"):
            raise HmfError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported with recurrent "
                "layers; leave it out, also of generation_config.json"
            )
        if generation_config.use_cache and self.training and self.is_gradient_checkpointing:
            raise HmfError(
                "generate: gradient checkpointing keeps no cache in training mode; call model.eval() first, or give "
                "use_cache=False"
            )
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise HmfError(
                "attention_mask: a row ends in padding, where recurrent layers have no output to generate from; pad on "
                "the left (padding_side='left'), or give an attention_mask if the last token is a real one"
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if (cache := model_kwargs.get("past_key_values")) is not None:
            adopt(cache, self.config)

    def init_continuous_batching(self, *args: Any, **kwargs: Any):
        raise HmfError(
            "generate_batch: transformers' continuous batching is not supported with recurrent layers; "
            "use generate, or `hmf serve`"
        )


def _causal_lm_forward(stock: Any) -> Any:
    """The family's forward `stock` with its signature, which transformers and its users inspect.

    Training passes the keyword `objective` (hmf.priming.objectives, hmf.training.losses); its result is then returned
    instead. Going through `forward` lets wrappers for several processes (DDP, FSDP2) see every forward pass.
    """
    names = list(inspect.signature(stock).parameters)[1:]

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, objective: Any = None, **kwargs: Any) -> Any:
        if objective is not None:
            return objective(self, *args, **kwargs)
        if self.config.pattern.fused and (dict(zip(names, args, strict=False)) | kwargs).get("labels") is not None:
            raise HmfError("labels: a fused model is trained by distillation; run `hmf export` to train on labels")
        return stock(self, *args, **kwargs)

    return forward


def _prepare_inputs_for_generation(stock: Any) -> Any:
    """The family's method `stock`. Where it drops the cache (Phi-3, as its positions change), all tokens are fed again.

    transformers would feed only the next token then.
    """

    @functools.wraps(stock)
    def prepare(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = stock(self, input_ids, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length() or inputs.get("past_key_values") is not None:
            return inputs
        anew = {"past_key_values": None, "position_ids": None, "next_sequence_length": None}
        return stock(self, input_ids, *args, **kwargs | anew)

    return prepare


@dataclass(frozen=True)
class HybridClasses:
    config: type
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


@functools.cache
def hybrid_classes(family: Family) -> HybridClasses:
    """`Hybrid<Family>Config`, `Hybrid<Family>Model` and `Hybrid<Family>ForCausalLM`."""
    config = hybrid_config_class(family)
    stock_layer = family.class_named("DecoderLayer").__name__

    def _init_weights(self, module: nn.Module) -> None:
        super(type(self), self)._init_weights(module)
        if isinstance(module, nn.RMSNorm):  # a mixer's; Gemma sets norms, whose weights are offsets from one, to zero
            initialization.ones_(module.weight)
        if isinstance(module, Mixer) and not any(p.is_meta for p in module.parameters(recurse=False)):
            module.init_recurrence()

    common = {
        "__module__": __name__,
        "config_class": config,
        "family": family,
        "_init_weights": _init_weights,
        "_no_split_modules": [stock_layer, f"Hybrid{stock_layer}"],
        "_keep_in_fp32_modules_strict": sorted(
            {name for mixer in MIXERS.values() for name in mixer.float32_parameters}
        ),
    }
    stock: Any = family.class_named("ForCausalLM")
    decoder = common | {"returns_given_cache": family.returns_given_cache()}
    model = type(f"{family.hybrid_prefix}Model", (HybridModelMixin, family.class_named("Model")), decoder)
    causal_lm = type(
        f"{family.hybrid_prefix}ForCausalLM",
        (HybridCausalLMMixin, stock),
        common
        | {
            "forward": _causal_lm_forward(stock.forward),
            "prepare_inputs_for_generation": _prepare_inputs_for_generation(stock.prepare_inputs_for_generation),
        },
    )
    return HybridClasses(config, model, causal_lm)


def __getattr__(name: str) -> type:
    """`Hybrid<Family>Model`, `...ForCausalLM`, `...DecoderLayer`, the base's own recurrence: for imports, pickle."""
    for family in FAMILIES.values():
        if name == f"{family.hybrid_prefix}DecoderLayer":
            return hybrid_layer_class(family.class_named("DecoderLayer"))
        if family.own_recurrence and name == f"Own{family.prefix}{family.own_recurrence}":
            return _own_class(family)
        if name in (f"{family.hybrid_prefix}Model", f"{family.hybrid_prefix}ForCausalLM"):
            classes = hybrid_classes(family)
            return classes.model if name.endswith("Model") else classes.causal_lm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
