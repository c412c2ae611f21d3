# SPDX-License-Identifier: Apache-2.0
"""Stage 0: initialise every mixer of a fused model from the attention or the recurrent layer that it replaces."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hmf.config.pattern import Pattern
from hmf.config.runs import CalibrationSettings, DataSettings
from hmf.data.mixture import mixture
from hmf.data.tokenizer import check_tokenizer, load_tokenizer
from hmf.errors import HmfError, listed, notice, standing_for
from hmf.folders import require_unused
from hmf.layers.attention import separate
from hmf.layers.base import Start
from hmf.layers.own import base_mixer
from hmf.model.checkpoint import STORED, load_config, load_model, save_checkpoint
from hmf.model.convert import hybridise, mixers
from hmf.model.files import COMPUTED, reading, require_finite, stored_tensors
from hmf.model.text_only import language_config, require_language_model, take_text

from .calibrate import calibrate


@dataclass(frozen=True)
class Stage0Report:
    """The tensors of the new model by their origin."""

    pattern: Pattern
    kept: int  # number of tensors in the base's files, all of which are kept
    starts: dict[str, Start]  # by the mixer's name
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)  # of a calibrated start: `calibrate`

    def counts(self) -> dict[str, int]:
        starts = self.starts.values()
        return {
            "kept from the base": self.kept,
            "copied into mixers": sum(len(s.copied) for s in starts),
            "derived from attention": sum(len(s.derived) for s in starts),
            "initialised": sum(len(s.initialised) for s in starts),
        }

    def describe(self) -> str:
        """The report as lines of text."""
        lines = [f"pattern {self.pattern}"]
        lines += [f"{count:6d} tensor{'s' * (count != 1)} {what}" for what, count in self.counts().items()]
        unused = {name: why for start in self.starts.values() for name, why in start.unused.items()}
        lines += [f"       not used by the mixers: {name} ({why})" for name, why in sorted(unused.items())]
        lines += [
            f"       calibrated: {name}, relative squared error {before:.3f} -> {after:.3f}"
            for name, (before, after) in self.errors.items()
        ]
        return "\n".join(lines)


def initialise(model: PreTrainedModel, seed: int = 0, conv_start: str = "random") -> dict[str, Start]:
    """Initialise all mixers of a fused `model`. A layer's random tensors depend only on `seed` and the layer's index.

    `conv_start` "random" is the published initialisation. With "identity" every short convolution initially returns
    its current token, so that the projections copied from attention have their effect from the first step. Convolutions
    that come from a recurrent layer of the base stay as they are.

    Returns each mixer's report. HmfError if the report does not cover all tensors of the mixer and of the attention.
    """
    starts = {}
    for name, mixer in mixers(model):
        attention = separate(base_mixer(model.get_submodule(name.rpartition(".")[0])))
        recurs = mixer.layer_idx in model.config.pattern.from_recurrent
        start = mixer.init_from_recurrence if recurs else mixer.init_from_attention
        generator = torch.Generator().manual_seed(seed * 100_003 + mixer.layer_idx)
        starts[name] = start(attention, generator, model.config.initializer_range)
        if conv_start == "identity" and not recurs:
            _pass_through(mixer)
        try:
            starts[name].check(mixer, attention)
        except HmfError as error:
            raise HmfError(f"{name}: {error}") from None
    return starts


@torch.no_grad()
def _pass_through(mixer: nn.Module) -> None:
    for module in mixer.modules():
        if isinstance(module, nn.Conv1d):
            module.weight.zero_()
            module.weight[..., -1] = 1.0


def make_stage0(
    base: str | Path,
    pattern: Pattern,
    out: str | Path,
    options: dict[str, dict[str, Any]] | None = None,
    seed: int = 0,
    conv_start: str = "random",
    calibration: CalibrationSettings | None = None,
    data: DataSettings | None = None,
) -> Stage0Report:
    """`hmf init`: load `base`, make it a fused Hybrid, initialise the mixers, save it at `out` with its tokenizer.

    With `calibration`, the mixers are also fitted to the attention that they replace (`hmf.priming.calibrate`), on rows
    of `data` (None: Python's standard library) that `seed` selects.
    """
    require_unused(out)
    base_config(base)  # raises for an unsupported base before the weights are read
    require_finite(Path(base))
    check_tokenizer(base)
    base_model = load_model(base, dtype=STORED)
    model = hybridise(base_model, pattern, options)
    names = [name for name in stored_tensors(Path(base)) if not COMPUTED.search(name)]
    # Tensors that transformers ignores without a message, such as those of multi-token prediction (mtp.).
    ignored = getattr(type(base_model), "_keys_to_ignore_on_load_unexpected", None) or ()
    unread = [name for name in names if any(re.search(rule, name) for rule in ignored)]
    if unread:
        notice(f"{base}: not read, and not in the Hybrid: {listed(unread)}")
    starts, errors = initialise(model, seed, conv_start), {}
    if calibration is not None:
        errors = calibrate_on(model, starts, base, calibration, data or DataSettings(), seed)
    save_checkpoint(model, out, companions=base)
    return Stage0Report(model.config.pattern, len(names) - len(unread), starts, errors)


def calibrate_on(
    model: PreTrainedModel,
    starts: dict[str, Start],
    base: str | Path,
    calibration: CalibrationSettings,
    data: DataSettings,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """`calibrate` on the first rows that Stage 1 reads with the same `data` and `seed`."""
    rows = mixture(data, load_tokenizer(base), calibration.rows, seed)
    if rows.epoch is not None and rows.epoch < calibration.rows:  # rows of a second pass are not held out of the first
        raise HmfError(
            f"calibration.rows: {data.prepared} has {rows.epoch} rows, fewer than {calibration.rows}; lower it, or "
            "prepare more rows"
        )
    return calibrate(model, starts, [rows[index] for index in range(calibration.rows)], calibration)


@contextmanager
def text_of(base: str | Path, out: str | Path, say: Callable[[str], None]) -> Iterator[Path]:
    """During the block, a temporary checkpoint beside `out` with the language model of the multimodal `base`."""
    with reading(Path(out).parent):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=f".{Path(out).name}-text-", dir=Path(out).parent)
    with folder as path:
        text = Path(path, "text")
        say(f"{base}: {take_text(base, text).describe()}")
        with standing_for(text, base):
            yield text


def base_config(base: str | Path, text_only: bool = False, weights: bool = True) -> Any:
    """The config of a base checkpoint; HmfError for an unsupported architecture or a Hybrid.

    text_only: that of a multimodal checkpoint's language model. weights: whether the directory must have weights too.
    """
    config = load_config(base, weights)
    if text_only:
        return language_config(config, base)
    require_language_model(config)
    if config.model_type.startswith("hybrid_"):
        raise HmfError(f"{base}: is already a Hybrid ({config.hybrid_override_pattern}); give the base Transformer")
    if getattr(config, "auto_map", None):
        notice(f"{base}/config.json: auto_map: the code that it names is not run; transformers' own code is")
    return config
