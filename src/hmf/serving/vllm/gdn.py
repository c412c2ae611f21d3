# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet inside vLLM (arXiv 2412.06464; equations in `hmf.ops.gdn`).

States of a request: the last conv_size - 1 inputs of the short convolutions of q, k and v [conv_size - 1, channels],
and the recurrent state, in the layout of vLLM's kernels [H, V, K]. Heads are split over tensor-parallel ranks. With
fewer key/value heads than ranks, each rank holds the one that its heads use.

Legend: N tokens of the batch, S sequences, T tokens per sequence, H expanded heads (of this rank), D head_dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID

from hmf.config.layers import GDNOptions, layer_options
from hmf.layers.base import StateShape, split_heads
from hmf.layers.gdn import l2_normalise
from hmf.layers.linear import LowRank
from hmf.ops import gated_delta_rule, short_conv

from .backends import HAS_KERNELS, RecurrentMetadata, RecurrentMetadataBuilder
from .parts import NormWeight, ShortConvWeights, convolve, rms_norm
from .recurrent import RecurrentMixer, Tensors, started
from .start import PREFILL

logger = init_logger(f"vllm.{__name__}")  # under vLLM's logger, whose handler prints it

MANY_HEADS = 512  # several times the number of multiprocessors of a GPU
BUILDER = RecurrentMetadataBuilder


def states(symbol: str, config: Any, ranks: int) -> dict[str, StateShape]:
    """The states of one request on one of `ranks` ranks, in the order and layout that vLLM's kernels use."""
    options: GDNOptions = layer_options(config, symbol)
    conv = {}
    if options.use_short_conv:
        streams = (options.num_q_heads, options.num_k_heads, options.num_v_heads)
        channels = sum(split_heads(heads, ranks) for heads in streams) * options.head_dim
        conv["conv"] = StateShape((options.conv_size - 1, channels), "conv")
    shape = (split_heads(options.num_heads, ranks), options.head_dim, options.head_dim)
    return {**conv, "recurrent": StateShape(shape, "recurrent")}


def build(symbol: str, config: Any, quant_config: Any, prefix: str, attention: nn.Module) -> nn.Module:
    """The mixer that replaces `attention`."""
    return GatedDeltaNet(symbol, config, quant_config, prefix)


def has_flashinfer() -> bool:
    """Whether FlashInfer's GDN kernels can be imported. If it is installed without them, a warning has the reason."""
    if importlib.util.find_spec("flashinfer") is None:
        return False
    try:
        import flashinfer.gdn_prefill  # noqa: F401
    except Exception as error:  # its kernels need nvidia-cutlass-dsl, and load libraries when they are imported
        logger.warning_once(
            "FlashInfer is installed, but its GDN kernels cannot be imported (%s: %s). Prefill of GDN layers uses "
            "vLLM's Triton kernels. The kernels of FlashInfer need nvidia-cutlass-dsl.",
            type(error).__name__,
            " ".join(str(error).split()),
        )
        return False
    return True


def own_chunks(q, k, v, g, beta, initial_state, cu_seqlens, **_) -> tuple[torch.Tensor, torch.Tensor]:
    """`hmf.ops.gdn_chunk_triton` with the arguments of vLLM's kernels; heads are shared, and rows may have a stride."""
    from hmf.ops.gdn_chunk_triton import chunked

    o, after = chunked(q[0], k[0], v[0], g[0], beta[0], initial_state, cu_seqlens, eps=1e-6)
    return o[None], after


class GatedDeltaNet(RecurrentMixer):
    op = staticmethod(gated_delta_rule)
    activation = staticmethod(F.silu)  # of the gate

    def __init__(self, symbol: str, config: Any, quant_config: QuantizationConfig | None, prefix: str):
        ranks = get_tensor_model_parallel_world_size()
        super().__init__(symbol, states(symbol, config, ranks), prefix)
        self.options: GDNOptions = layer_options(config, symbol)
        options = self.options
        model_dim, head_dim, heads = options.hidden_size, options.head_dim, options.num_heads
        self.heads = heads // ranks
        streams = {"q": options.num_q_heads, "k": options.num_k_heads, "v": options.num_v_heads}
        self.widths = [split_heads(count, ranks) * head_dim for count in streams.values()]

        def column(outputs: int, name: str, quantised: bool = True) -> ColumnParallelLinear:
            quant = quant_config if quantised else None
            return ColumnParallelLinear(model_dim, outputs, bias=False, quant_config=quant, prefix=f"{prefix}.{name}")

        self.qkv_proj = QKVParallelLinear(
            model_dim,
            head_dim,
            options.num_q_heads,
            options.num_k_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=head_dim * (options.num_v_heads // options.num_k_heads),
        )
        self.b_proj = column(heads, "b_proj", quantised=False)
        decays = self._init_gates(column)
        self.o_proj = RowParallelLinear(
            heads * head_dim, model_dim, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        if options.use_short_conv:
            self.conv1d = ShortConvWeights(streams, head_dim, options.conv_size, options.conv_bias)
        # The decay is computed in float32 for any dtype of the model, and its parameters are float32.
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=torch.float32), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(decays, dtype=torch.float32), requires_grad=False)
        for parameter in (self.A_log, self.dt_bias):
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
        self.o_norm = NormWeight(head_dim)
        self._init_kernels()
        if options.kv_proj_rank:
            self.proj_k = LowRank(options.num_k_heads * head_dim, options.kv_proj_rank, heads * head_dim)
            self.proj_v = LowRank(options.num_v_heads * head_dim, options.kv_proj_rank, heads * head_dim)
            if options.kv_learnable_residual:
                self.k_rep = nn.Parameter(torch.empty(heads, options.num_k_heads), requires_grad=False)
                self.v_rep = nn.Parameter(torch.empty(heads, options.num_v_heads), requires_grad=False)

    def _init_gates(self, column: Callable[..., ColumnParallelLinear]) -> int:
        """Make the projections that `decay` and `gate` read. Returns the number of this rank's decays of a token.

        column(outputs, name, quantised): a projection of the hidden states whose outputs are split over the ranks.
        """
        self.gk_proj = column(self.options.num_heads, "gk_proj", quantised=False)
        if self.options.use_gate:
            self.g_proj = column(self.options.num_heads * self.options.head_dim, "g_proj")
        return self.heads

    def decay(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Log decays of each token in float32, in the shape that the op takes."""
        return -self.A_log.exp() * F.softplus(self.gk_proj(hidden_states)[0].float() + self.dt_bias)

    def gate(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[N, D] -> [N, H head_dim], before `activation`."""
        return self.g_proj(hidden_states)[0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.heads, self.options.head_dim)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        qkv, _ = self.qkv_proj(hidden_states)
        beta = self.b_proj(hidden_states)[0].float().sigmoid()
        if self.options.allow_neg_eigval:
            beta = beta * 2.0
        gate = self.gate(hidden_states) if self.options.use_gate else None
        return (qkv, self.decay(hidden_states), beta), gate

    def recur(self, inputs: Tensors, states: Tensors, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, Tensors]:
        qkv, decay, beta = inputs
        if self.options.use_short_conv:
            window = states[0].transpose(1, 2)
            qkv, window = short_conv(qkv, self.conv1d.weight, self.conv1d.bias, window, cu_seqlens)
            convs: Tensors = (window.transpose(1, 2),)
        else:
            qkv, convs = F.silu(qkv), ()
        q, k, v = self._streams(qkv)
        k, v = self._expand(k, "k"), self._expand(v, "v")
        o, after = self.op(l2_normalise(q), l2_normalise(k), v, decay, beta, states[-1].mT, cu_seqlens)
        return o, (*convs, after.mT)

    def _init_kernels(self) -> None:
        """Choose the prefill kernels: those of hmf; where these cannot run, FlashInfer's or else vLLM's in Triton. The
        first two share key and value heads, which are repeated for the third. None supports float32."""
        self.chunks: Callable | None = None  # the op for prefills
        self.shares_heads = False
        if not HAS_KERNELS:
            return
        vllm_config = get_current_vllm_config()
        option = (vllm_config.additional_config or {}).get(PREFILL)
        name, dtype = None, vllm_config.model_config.dtype
        if dtype != torch.float32:
            from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

            self.chunks, name = chunk_gated_delta_rule, "triton"
            automatic = option in (None, "auto")
            if (automatic or option == "hmf") and self._runs_own_kernels(dtype):
                self.chunks, self.shares_heads, name = own_chunks, True, "hmf"
            elif (automatic or option == "flashinfer") and self.options.head_dim == 128 and has_flashinfer():
                from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import ChunkGatedDeltaRule

                chosen = ChunkGatedDeltaRule()
                if chosen.gdn_prefill_backend == "flashinfer":
                    self.chunks, self.shares_heads, name = chosen, True, "flashinfer"
            if self.shares_heads:
                # Both compile one kernel for a small and one for a large number of heads summed over requests.
                self.rehearsals = (1, -(-MANY_HEADS // self.heads))
            logger.info_once("Prefill of GDN layers by %s.", name)
        if option not in (None, "auto", name):
            logger.warning_once(
                "The GDN prefill backend %s is not used: the choices are triton, hmf with head_dim up to 128 on GPUs "
                "like A100 and later, and flashinfer on Hopper with head_dim 128 and nvidia-cutlass-dsl, all in "
                "bfloat16 or float16.",
                option,
            )

    def _runs_own_kernels(self, dtype: torch.dtype) -> bool:
        from hmf.ops.gdn_chunk_triton import unsupported

        return unsupported(dtype, self.options.head_dim, self.A_log.device) is None

    def prefill(self, inputs: Tensors, pools: Tensors, metadata: RecurrentMetadata) -> torch.Tensor:
        if self.chunks is None:
            return super().prefill(inputs, pools, metadata)
        qkv, decay, beta = inputs
        if self.options.use_short_conv:
            qkv = convolve(qkv, self.conv1d.weight, self.conv1d.bias, pools[0].transpose(1, 2), metadata)
        else:
            qkv = F.silu(qkv)
        q, k, v = self._streams(qkv[None])
        own = self.chunks is own_chunks
        if not self.shares_heads or self.options.kv_proj_rank or (k.shape[2] != v.shape[2] and not own):
            k, v = self._expand(k, "k"), self._expand(v, "v")
        if not own:
            q, k, v = (x.contiguous() for x in (q, k, v))
        slots = metadata.state_indices_tensor_p.long()
        o, after = self.chunks(
            q=q,
            k=k,
            v=v,
            g=decay[None],
            beta=beta[None],
            initial_state=started(pools[-1][slots], metadata.has_initial_states_p),
            output_final_state=True,
            cu_seqlens=metadata.query_start_loc_p,
            use_qk_l2norm_in_kernel=True,
        )
        pools[-1][slots] = after.to(pools[-1].dtype)
        return o[0]

    def decode(self, inputs: Tensors, slots: torch.Tensor) -> torch.Tensor:
        if slots.device.type == "cpu":
            return super().decode(inputs, slots)
        # In place, without expanding key and value heads: see `hmf.ops.gdn_decode`.
        from hmf.ops.gdn_decode import decode

        qkv, decay, beta = inputs
        if self.options.use_short_conv:
            qkv = causal_conv1d_update(
                qkv,
                self.kv_cache[0].transpose(1, 2),
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                "silu",
                conv_state_indices=slots,
                null_block_id=NULL_BLOCK_ID,
                out=torch.empty_like(qkv),
            )
        else:
            qkv = F.silu(qkv)
        q, k, v = self._streams(qkv)
        if self.options.kv_proj_rank:
            k, v = (self._expand(x[:, None], stream)[:, 0].contiguous() for x, stream in ((k, "k"), (v, "v")))
        return decode(q, k, v, decay, beta, self.kv_cache[-1], slots, NULL_BLOCK_ID)

    def finish(self, mixed: torch.Tensor, rest: torch.Tensor | None) -> torch.Tensor:
        out = rms_norm(mixed, self.o_norm.weight, self.options.norm_eps)
        if rest is not None:
            out = out * self.activation(rest.float()).view_as(out)
        return self.o_proj(out.flatten(1).to(mixed.dtype))[0]

    def _streams(self, qkv: torch.Tensor) -> list[torch.Tensor]:
        """[..., channels] -> q for all heads, k and v for theirs, as views where no head is repeated."""
        q, k, v = (x.unflatten(-1, (-1, self.options.head_dim)) for x in qkv.split(self.widths, dim=-1))
        return [q if q.shape[-2] == self.heads else q.repeat_interleave(self.heads // q.shape[-2], dim=-2), k, v]

    def _expand(self, x: torch.Tensor, stream: str) -> torch.Tensor:
        """Key or value heads [S, T, Hkv, D] -> [S, T, H, D]."""
        if x.shape[2] == self.heads:
            return x
        if not self.options.kv_proj_rank:
            return x.repeat_interleave(self.heads // x.shape[2], dim=2)
        low_rank = getattr(self, f"proj_{stream}")
        learned = low_rank(x.flatten(2)).view(*x.shape[:2], self.heads, -1)
        if self.options.kv_learnable_residual:
            repeated = torch.einsum("stgd,hg->sthd", x, getattr(self, f"{stream}_rep"))
        else:
            repeated = x.repeat_interleave(self.heads // x.shape[2], dim=2)
        return repeated + learned
