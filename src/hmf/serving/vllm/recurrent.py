# SPDX-License-Identifier: Apache-2.0
"""The base class of recurrent layers inside vLLM: state slots, batches of mixed requests, and one opaque operator.

vLLM keeps the states of all requests in pools, with one row per slot. A forward pass gets a flat batch of tokens:
first the requests that decode (one token each), then those that prefill (any number, perhaps continuing an earlier
chunk or a cached prefix). A layer type defines its projections, its states and its recurrence. The base class reads and
writes slots, and handles new requests and padding.

Legend: N tokens of the batch, S sequences, T tokens per sequence, D model dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.library import Library
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hmf.layers.base import StateShape

from .backends import RecurrentMetadata, fresh_requests, state_backend

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handler prints it

Tensors = tuple[torch.Tensor, ...]


def state_dtypes(states: Iterable[StateShape], vllm_config: Any) -> tuple[torch.dtype, ...]:
    """The dtypes of states from vLLM's cache options, whose defaults `HybridConfig` sets from the checkpoint."""
    cache = vllm_config.cache_config
    recurrent, conv = (STR_DTYPE_TO_TORCH_DTYPE[x] for x in (cache.mamba_ssm_cache_dtype, cache.mamba_cache_dtype))
    return tuple(state.dtype(vllm_config.model_config.dtype, recurrent, conv) for state in states)


class RecurrentMixer(MambaBase, nn.Module):
    """A recurrent token mixer that replaces a decoder layer's attention.

    symbol: the symbol of the layer type; states: the states of one request on this rank, by name, in the order in which
    `recur` takes them. A subclass defines `output_shape`, `project`, `recur` and `finish`.
    """

    rehearsals: tuple[int, ...] = (1,)  # numbers of requests of the warm-up prefills, before vLLM measures memory

    def __init__(self, symbol: str, states: dict[str, StateShape], prefix: str):
        super().__init__()
        vllm_config = get_current_vllm_config()
        self.symbol, self.states, self.prefix = symbol, states, prefix
        self.kept_by = prefix  # name of the layer whose slots hold the states: this layer, or the one that contains it
        self._state_dtypes = state_dtypes(states.values(), vllm_config)
        self.kv_cache = tuple(torch.tensor([]) for _ in states)
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"duplicate layer name {prefix}")
        layers[prefix] = self

    # ---- methods of a layer type

    @abstractmethod
    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, Any]:
        """positions [N], hidden_states [N, D] -> (inputs of the recurrence, each [N, ...]; rest for `finish`)."""

    @abstractmethod
    def recur(self, inputs: Tensors, states: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        """Run the recurrence: over rows [S, 1, ...], or over S documents packed in one row [1, T, ...].

        `states` and the returned final states have one row per sequence. The output has the leading axes of the inputs,
        then `output_shape`.
        """

    @abstractmethod
    def finish(self, mixed: torch.Tensor, rest: Any) -> torch.Tensor:
        """The recurrence's output [N, *output_shape] -> [N, D]."""

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]: ...

    # ---- vLLM's interface

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(state.shape for state in self.states.values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self._state_dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return state_backend(self.symbol)

    @property
    def has_slots(self) -> bool:
        return self.kept_by == self.prefix

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        if not self.has_slots:
            return None
        cache = vllm_config.cache_config
        if cache.enable_prefix_caching:
            logger.info_once(
                "Prefix caching: the smallest cacheable prefix is %d tokens; shorter prompts are computed each time.",
                cache.mamba_block_size,
            )
        return super().get_kv_cache_spec(vllm_config)

    # ---- the forward pass

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [N, D] -> [N, D]. The signature is that of the stock attention modules."""
        inputs, rest = self.project(positions, hidden_states)
        mixed = hidden_states.new_empty(hidden_states.shape[0], *self.output_shape)
        torch.ops.hmf.recurrent_mix(list(inputs), mixed, self.prefix)
        return self.finish(mixed, rest)

    def mix(self, inputs: Tensors, output: torch.Tensor, metadata: RecurrentMetadata | None) -> None:
        """Write the recurrence's output of a whole batch, and advance the states of its requests."""
        if metadata is None:  # a profiling run without requests
            output.zero_()
            if output.device.type != "cpu" and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.NONE:
                self._rehearse(inputs)
            return
        decodes, tokens = metadata.num_decodes, metadata.num_decode_tokens + metadata.num_prefill_tokens
        output[tokens:].zero_()  # padding
        if decodes:
            output[:decodes] = self.decode(
                tuple(x[:decodes] for x in inputs), metadata.state_indices_tensor_d[:decodes, 0]
            )
        if metadata.num_prefills:
            at = slice(decodes, tokens)
            output[at] = self.prefill(tuple(x[at] for x in inputs), self.kv_cache, metadata)

    def _rehearse(self, inputs: Tensors) -> None:
        """Run new requests with all tokens of the inputs on temporary states. This compiles and tunes the kernels, and
        allocates the memory that the first long prompt will need."""
        tokens, device = inputs[0].shape[0], inputs[0].device
        for requests in dict.fromkeys(min(count, tokens) for count in self.rehearsals):
            pools = tuple(
                torch.zeros(1 + requests, *state.shape, dtype=dtype, device=device)
                for state, dtype in zip(self.states.values(), self._state_dtypes, strict=True)
            )
            self.prefill(inputs, pools, fresh_requests(tokens, requests, device))

    def prefill(self, inputs: Tensors, pools: Tensors, metadata: RecurrentMetadata) -> torch.Tensor:
        """The prefills of the metadata, packed in inputs [N, ...]: returns [N, *output_shape], updates the pools."""
        slots, known = metadata.state_indices_tensor_p.long(), metadata.has_initial_states_p
        before = tuple(started(pool[slots], known) for pool in pools)
        mixed, after = self.recur(tuple(x[None] for x in inputs), before, metadata.query_start_loc_p)
        store(pools, slots, after)
        return mixed[0]

    def decode(self, inputs: Tensors, slots: torch.Tensor) -> torch.Tensor:
        """One token of each of S requests, whose states are in `slots` [S]: inputs [S, ...] -> [S, *output_shape]."""
        return self.step(inputs, self.kv_cache, slots.long())

    def step(self, inputs: Tensors, pools: Tensors, slots: torch.Tensor) -> torch.Tensor:
        """`decode` with `recur`, on copies of the states."""
        mixed, after = self.recur(tuple(x[:, None] for x in inputs), tuple(pool[slots] for pool in pools), None)
        store(pools, slots, after)
        return mixed[:, 0]


def store(pools: Tensors, slots: torch.Tensor, states: Tensors) -> None:
    for pool, state in zip(pools, states, strict=True):
        state = state.to(pool.dtype)
        if pool.device.type != "cpu":  # the padding of a CUDA graph has the null slot, which must not change
            padding = (slots == NULL_BLOCK_ID).view(-1, *[1] * (state.dim() - 1))
            state = torch.where(padding, pool[slots], state)
        pool[slots] = state


def started(state: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """`state` with zeros for new requests, in place: their slots hold values of earlier requests, which may be NaN."""
    return state.masked_fill_(~known.view(-1, *[1] * (state.dim() - 1)), 0)


@eager_break_during_capture
def _recurrent_mix(inputs: list[torch.Tensor], output: torch.Tensor, layer_name: str) -> None:
    context = get_forward_context()
    layer = context.no_compile_layers[layer_name]
    metadata = context.attn_metadata
    if metadata is not None:
        metadata = metadata.get(layer.kept_by)  # a profiling run may have metadata only for attention
    layer.mix(tuple(inputs), output, metadata)


def _recurrent_mix_shape(inputs: list[torch.Tensor], output: torch.Tensor, layer_name: str) -> None:
    return


_LIBRARY = Library("hmf", "FRAGMENT")
# Opaque to torch.compile, and CUDA graphs are split here, because its work depends on the requests of the batch.
direct_register_custom_op(
    "recurrent_mix", _recurrent_mix, mutates_args=["output"], fake_impl=_recurrent_mix_shape, target_lib=_LIBRARY
)
