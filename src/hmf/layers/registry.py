# SPDX-License-Identifier: Apache-2.0
"""The table of layer types: published symbol -> mixer class."""

from __future__ import annotations

from typing import Any

from hmf.config.pattern import ATTENTION
from hmf.errors import HmfError, unknown_name

from .base import Mixer, StateShape
from .bmojo import INNER_MIXERS, BMojoF
from .kda import KimiDeltaAttention
from .own import own_layers, own_state_shapes
from .swa import SlidingWindowAttention

MIXERS: dict[str, type[Mixer]] = INNER_MIXERS | {
    cls.symbol: cls for cls in (KimiDeltaAttention, BMojoF, SlidingWindowAttention)
}


def mixer_class(symbol: str) -> type[Mixer]:
    """The mixer class of a published symbol; HmfError for an unknown symbol."""
    try:
        return MIXERS[symbol]
    except KeyError:
        raise HmfError(unknown_name("layer type", symbol, MIXERS)) from None


def layer_states(config: Any, index: int, ranks: int = 1) -> dict[str, StateShape]:
    """The states of layer `index` of a hybrid config for one sequence on one of `ranks` tensor-parallel ranks; none for
    attention. The layer is a mixer, or has a recurrent layer of the base's own."""
    symbol = config.pattern.symbols[index]
    if symbol != ATTENTION:
        return mixer_class(symbol).state_shapes(config, ranks)
    return own_state_shapes(config, ranks) if index in own_layers(config) else {}
