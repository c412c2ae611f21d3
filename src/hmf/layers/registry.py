# SPDX-License-Identifier: Apache-2.0
"""The table of layer types: published symbol -> mixer class."""

from __future__ import annotations

from hmf.errors import HmfError, unknown_name

from .base import Mixer
from .bmojo import INNER_MIXERS, BMojoF
from .kda import KimiDeltaAttention
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
