# SPDX-License-Identifier: Apache-2.0
"""Calibrated starts: each new mixer is fitted to the output of the attention that it replaces, on a few rows of data.

The teacher runs once, layer by layer. Each mixer is fitted alone, from the attention's own inputs: first everything
that is not copied from the attention (decay, gates, convolutions, norms) by a short run of Adam, then the output
projection in closed form, by ridge regression. A fit is kept only if it lowers the error on held-out rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hmf.config.runs import CalibrationSettings
from hmf.data.packing import PackedRow
from hmf.data.progress import Progress
from hmf.layers.base import Mixer, Start
from hmf.layers.own import base_mixer
from hmf.model.convert import mixers
from hmf.model.modeling import TEACHER

ROWS_AT_ONCE, TOKENS_AT_ONCE = 4, 8192  # upper bounds of a batch, which has at least one row
# Adam changes each weight of a matrix about as much, so its effect grows with the number of inputs. Up to this number
# of inputs the learning rate is the setting's, above it is divided by their ratio.
INPUTS = 256
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean square of a feature


@dataclass
class Batch:
    """Rows at one layer of the teacher, and the input and output of this layer's attention."""

    inputs: Any  # the decoder's inputs that all layers share
    types: list[str]  # the type of each layer's attention
    hidden_states: torch.Tensor  # [B, T, D], the input of the next layer
    read: torch.Tensor | None = None  # float32 [B, T, D], the attention's input
    returned: torch.Tensor | None = None  # float32 [B, T, D], the attention's output

    def output(self, mixer: Mixer) -> torch.Tensor:
        """The mixer's output for the attention's input, float32 [B, T, D]."""
        assert self.read is not None
        return mixer(
            self.read,
            layout=self.inputs.layout,
            position_ids=self.inputs.shared["position_ids"],
            position_embeddings=self.inputs.rotary[self.types[mixer.layer_idx]],
        )[0]


def calibrate(
    model: PreTrainedModel, starts: Mapping[str, Start], rows: Sequence[PackedRow], settings: CalibrationSettings
) -> dict[str, tuple[float, float]]:
    """Fit the mixers of a fused `model` in place. It needs memory for one float32 layer and the rows' hidden states.

    Args:
        starts: the report of each mixer, from `hmf.priming.stage0.initialise`.
        rows: rows of equal length. The last quarter is held out: a fit is kept if it lowers the error on these rows.
    Returns:
        For each mixer's name, its relative squared error on the held-out rows before and after the fit.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    decoder, by_layer, errors = model.model, {mixer.layer_idx: (name, mixer) for name, mixer in mixers(model)}, {}
    batches = _embedded(decoder, rows, device)
    held = max(1, len(batches) // 4)
    progress = Progress("calibrate", len(by_layer), unit=" layers")
    for index in range(max(by_layer) + 1):
        layer, home = decoder.layers[index], next(decoder.layers[index].parameters()).device
        layer.to(device)
        for batch in batches:
            _step(decoder, index, batch)
        if index in by_layer:
            name, mixer = by_layer[index]
            free = [*starts[name].initialised, *starts[name].derived]
            errors[name] = _fit(mixer, free, batches[:-held], batches[-held:], settings)
            progress.add(1, len(rows) * rows[0]["input_ids"].numel())
        layer.to(home)
    progress.close()
    return errors


def _embedded(decoder: Any, rows: Sequence[PackedRow], device: torch.device) -> list[Batch]:
    """Batches of equal size, so that a quarter of the batches has a quarter of the rows."""
    size = max(1, min(ROWS_AT_ONCE, len(rows) // 4, TOKENS_AT_ONCE // rows[0]["input_ids"].numel()))
    batches = []
    for first in range(0, len(rows), size):
        batch = torch.utils.data.default_collate(list(rows[first : first + size]))
        embedded = decoder.embed_tokens(batch["input_ids"].to(decoder.embed_tokens.weight.device)).to(device)
        inputs = decoder.prepare(
            inputs_embeds=embedded.detach(), position_ids=batch["position_ids"].to(device), use_cache=False
        )
        batches.append(Batch(inputs, decoder.config.attention_types, inputs.hidden_states))
    return batches


@torch.no_grad()
def _step(decoder: Any, index: int, batch: Batch) -> None:
    """Run one layer of the teacher, and store the input and output of its token mixer in `batch`."""

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        batch.read = kwargs["hidden_states"].float()
        batch.returned = (output[0] if isinstance(output, tuple) else output).float()

    hook = base_mixer(decoder.layers[index]).register_forward_hook(keep, with_kwargs=True)
    try:
        batch.hidden_states = decoder.run_layers(batch.hidden_states, batch.inputs, range(index, index + 1), TEACHER)
    finally:
        hook.remove()


def _fit(
    mixer: Mixer, free: Sequence[str], fitted: Sequence[Batch], held: Sequence[Batch], settings: CalibrationSettings
) -> tuple[float, float]:
    """Fit one mixer in float32 and write the best weights into it. Returns its error on `held` before and after."""
    work = copy.deepcopy(mixer).float().requires_grad_(False)
    best, before = _weights(work), _error(work, held)
    least = before
    for improve in (_descend(free, settings), _solve_output):
        for candidate in improve(work, fitted):
            work.load_state_dict(candidate)
            if (error := _error(work, held)) < least:
                least, best = error, candidate
        work.load_state_dict(best)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(best[name])
    return before, least


def _weights(mixer: Mixer) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in mixer.state_dict().items()}


@torch.no_grad()
def _error(mixer: Mixer, batches: Sequence[Batch]) -> float:
    wrong = sum((batch.output(mixer) - batch.returned).square().sum().double() for batch in batches)
    whole = sum(batch.returned.square().sum().double() for batch in batches)  # type: ignore[union-attr]
    return float(wrong / whole)


Improve = Callable[[Mixer, Sequence[Batch]], list[dict[str, torch.Tensor]]]


def _descend(free: Sequence[str], settings: CalibrationSettings) -> Improve:
    """Adam on the parameters `free`, with a cosine schedule of the learning rate that ends at 0."""

    def improve(mixer: Mixer, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
        chosen = [mixer.get_parameter(name).requires_grad_() for name in free]
        if not chosen or not settings.steps:
            return []
        rate = settings.learning_rate
        groups = [{"params": [x], "lr": rate * (min(1, INPUTS / x.shape[1]) if x.ndim == 2 else 1)} for x in chosen]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
        for step in range(settings.steps):
            batch = batches[step % len(batches)]
            assert batch.returned is not None
            loss = (batch.output(mixer) - batch.returned).square().mean() / batch.returned.square().mean()
            if not loss.requires_grad:  # B'MOJO-F's recurrent layer, if the rows fit into the window
                return []
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimiser.step()
            schedule.step()
        mixer.requires_grad_(False)
        return [_weights(mixer)]

    return improve


@torch.no_grad()
def _solve_output(mixer: Mixer, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """Ridge regression of the output projection around its present weights, once for each strength in RIDGES."""
    projection, features = mixer.output_projection, []
    hook = projection.register_forward_pre_hook(lambda module, args: features.append(args[0].flatten(0, -2)))
    gram, correlation = 0.0, 0.0
    try:
        for batch in batches:
            residual = (batch.returned - batch.output(mixer)).flatten(0, -2)
            x = features.pop()
            gram, correlation = gram + x.T.double() @ x.double(), correlation + x.T.double() @ residual.double()
    finally:
        hook.remove()
    assert isinstance(gram, torch.Tensor) and isinstance(correlation, torch.Tensor)
    name = next(name for name, module in mixer.named_modules() if module is projection)
    weights, size, candidates = _weights(mixer), gram.diagonal().mean(), []
    for ridge in RIDGES:
        change = torch.linalg.solve(gram + ridge * size * torch.eye(len(gram), device=gram.device), correlation)
        candidates.append(weights | {f"{name}.weight": weights[f"{name}.weight"] + change.T.float()})
    return candidates
