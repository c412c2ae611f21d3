# SPDX-License-Identifier: Apache-2.0
"""`training.strategy`: how a Trainer distributes a model over processes, by accelerate."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from packaging.version import Version
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainingArguments

from hmf.config.training import ParallelSettings
from hmf.errors import HmfError
from hmf.layers.base import Mixer


def strategy_arguments(training: ParallelSettings, model: PreTrainedModel) -> dict[str, Any]:
    """The Trainer's arguments for a recipe's strategy; HmfError if it needs more processes or another package."""
    if training.strategy == "fsdp2":
        if int(os.environ.get("WORLD_SIZE", 1)) < 2:
            raise HmfError("training.strategy: fsdp2 needs several processes; start 2 or more with torchrun")
        # FSDP units are the decoder layers and, because they may be trained on their own, the mixers in them.
        units = {type(layer).__name__ for layer in model.model.layers}
        units |= {type(module).__name__ for module in model.modules() if isinstance(module, Mixer)}
        sharding = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": sharding | {"transformer_layer_cls_to_wrap": sorted(units)}}
    if training.strategy == "deepspeed":
        if not importlib.util.find_spec("deepspeed"):
            raise HmfError("training.strategy: deepspeed is not installed; `pip install deepspeed`, or choose fsdp2")
        return {"deepspeed": deepspeed_config(training), "bf16": False}  # its autocast replaces the Trainer's
    return {}


def deepspeed_config(training: ParallelSettings) -> dict[str, Any]:
    """ZeRO 2 with the Trainer's own optimiser. With bfloat16, products use autocast and parameters stay in float32."""
    return {
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "gradient_clipping": training.max_grad_norm,
        "torch_autocast": {"enabled": training.precision == "bfloat16", "dtype": "bfloat16"},
    }


def keep_parameter_dtypes(args: TrainingArguments) -> None:
    """Make FSDP2 keep the dtypes of parameters. Call it before the Trainer creates its accelerator.

    accelerate's mixed precision would cast all parameters, and decays must stay in float32. Products use autocast
    instead (`autocast_forward`), as without FSDP.
    """
    if args.fsdp:
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()


def complete_accelerator(args: TrainingArguments, state: AcceleratorState) -> bool:
    """Enable FSDP on CPUs, which accelerate does not. Call it after the Trainer created its accelerator.

    Returns whether FSDP is in use.

    Raises:
        HmfError: deepspeed on CPUs.
    """
    if args.deepspeed and getattr(state, "deepspeed_plugin", None) is None:
        raise HmfError("training.strategy: accelerate does not support deepspeed on CPUs; choose ddp or fsdp2")
    if args.fsdp and getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        state.distributed_type = DistributedType.FSDP
    return getattr(state, "fsdp_plugin", None) is not None


def reach_inner_mixers(model: nn.Module) -> None:
    """Make FSDP2 gather the parameters of a mixer inside another mixer, which calls its `mix`, not its `forward`."""
    for module in model.modules():
        if isinstance(module, Mixer):
            for inner in module.children():
                if isinstance(inner, Mixer) and isinstance(inner, FSDPModule):
                    register_fsdp_forward_method(inner, "mix")


def complete_units(model: PreTrainedModel) -> None:
    """Make every forward pass run the final norm and the head as often as each other, and tied embeddings, too.

    accelerate shards these as one unit. Before torch 2.13, FSDP2 takes the next forward pass for a part of this one if
    a module of a unit did not run, and does not gather the unit's parameters. Stage 1 does not call the head.
    """
    if Version(torch.__version__).release >= (2, 13):
        return
    head, embeddings, norm = model.get_output_embeddings(), model.get_input_embeddings(), model.get_decoder().norm
    unit = {norm, head, embeddings} if embeddings.weight is head.weight else {norm, head}
    if not all(isinstance(module, FSDPModule) for module in unit):
        return
    missing: set[nn.Module] = set()  # what FSDP2 waits for

    def ran(module: nn.Module, *args: Any) -> None:
        if not missing:
            missing.update(unit)
        missing.discard(module)

    @torch.no_grad()
    def run_missing(*args: Any) -> None:
        for module in list(missing):
            weight = module.weight
            nothing = torch.zeros(1, 0, weight.shape[-1], dtype=weight.dtype, device=weight.device)
            module(nothing[..., 0].long() if module is embeddings else nothing)

    for module in unit:
        module.register_forward_hook(ran)
    model.register_forward_pre_hook(lambda *args: missing.clear())
    model.register_forward_hook(run_missing, prepend=True)  # before the hook of FSDP2 that ends the forward pass


def autocast_forward(model: nn.Module, device_type: str) -> None:
    """Autocast the forward pass of `model` to bfloat16, as accelerate does without FSDP2.

    The cache of autocast would keep copies of all gathered weights until the end of the forward pass.
    """
    model.forward = torch.autocast(device_type, torch.bfloat16, cache_enabled=False)(model.forward)


def whole_weights(model: nn.Module) -> dict[str, Any] | None:
    """All tensors of a sharded model, on the CPU of the main process; None if the model is not sharded.

    All processes must call it.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    return {name: x.detach().clone() for name, x in weights.items() if name not in tied}
