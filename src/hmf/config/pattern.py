# SPDX-License-Identifier: Apache-2.0
"""The layer pattern of a Hybrid: parse, print and generate `hybrid_override_pattern`.

One symbol a layer joined by "-". `*` is attention. A *fused* pattern (Stage 0 and 1) keeps the teacher's attention in
every layer and marks it: `*DA` for an attention layer, `GDN*` for a layer that holds both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from hmf.errors import HmfError, unknown_name

from .layers import LAYER_KINDS

ATTENTION = "*"
FUSED_ATTENTION = "*DA"


@dataclass(frozen=True)
class Pattern:
    """Symbols of the layers (`ATTENTION` or a key of `LAYER_KINDS`), and whether the teacher's attention is kept."""

    symbols: tuple[str, ...]
    fused: bool = False

    def __len__(self) -> int:
        return len(self.symbols)

    def __str__(self) -> str:
        return "-".join(self.as_list())

    def as_list(self) -> list[str]:
        """The symbols as the published `layer_types` lists them."""
        if not self.fused:
            return list(self.symbols)
        return [FUSED_ATTENTION if symbol == ATTENTION else f"{symbol}*" for symbol in self.symbols]

    @property
    def replaced(self) -> tuple[int, ...]:
        """Indices of the layers that are not plain attention."""
        return tuple(i for i, symbol in enumerate(self.symbols) if symbol != ATTENTION)

    def with_fused(self, fused: bool) -> Pattern:
        return Pattern(self.symbols, fused)

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None, source: str = "hybrid_override_pattern") -> Pattern:
        """Parse `text`; `source` (file and key) opens the error line.

        Raises HmfError for an unknown symbol, a mix of fused and plain symbols, or a length other than `num_layers`.
        """
        if not isinstance(text, str):
            raise HmfError(f'{source}: {text!r} is no text; join the symbols by "-", for example *-GDN-*-GDN')
        symbols, fused_marks = [], set()
        for position, raw in enumerate(text.split("-")):
            if ">" in raw:
                why = "recurrent to recurrent is not supported; prime from attention instead"
                raise HmfError(f"{source}: layer {position}: {raw!r}: {why}")
            if raw == FUSED_ATTENTION:
                symbol, fused = ATTENTION, True
            elif raw != ATTENTION and raw.endswith("*"):
                symbol, fused = raw[:-1], True
            else:
                symbol, fused = raw, False
            if symbol != ATTENTION and symbol not in LAYER_KINDS:
                raise HmfError(
                    f"{source}: layer {position}: {unknown_name('layer symbol', raw, [ATTENTION, *LAYER_KINDS])}"
                )
            symbols.append(symbol)
            fused_marks.add(fused)
        if len(fused_marks) > 1:
            raise HmfError(f"{source}: {text!r} mixes fused (*DA, GDN*) and plain (*, GDN) symbols; use one kind")
        if num_layers is not None and len(symbols) != num_layers:
            raise HmfError(f"{source}: has {len(symbols)} layers, the model has {num_layers}; give one symbol a layer")
        return cls(tuple(symbols), fused_marks.pop())

    @classmethod
    def generate(
        cls, num_layers: int, mixer: str, ratio: float | None = None, layers: Collection[int] | None = None
    ) -> Pattern:
        """`mixer` at the given `layers`, or spread evenly over a share `ratio` of all layers (attention comes first).

        Raises HmfError when the ratio is outside (0, 1] or gives no layer, or an index is out of range.
        """
        symbol = mixer_symbol(mixer)
        if layers is None:
            if ratio is None or not 0 < ratio <= 1:
                raise HmfError(f"ratio: {ratio} is not in (0, 1]; 0.5 replaces half of the attention layers")
            count = round(ratio * num_layers)
            if count == 0:
                least = math.ceil(1000 / num_layers) / 1000
                raise HmfError(f"ratio: {ratio} of {num_layers} layers gives no layer; {least} gives one")
            layers = [(i + 1) * num_layers // count - 1 for i in range(count)]
        chosen = set(layers)
        if not chosen:
            raise HmfError("layers: the list is empty; name at least one layer to replace")
        if outside := sorted(i for i in chosen if not 0 <= i < num_layers):
            raise HmfError(f"layers: {outside} not among the model's layers 0 to {num_layers - 1}")
        return cls(tuple(symbol if i in chosen else ATTENTION for i in range(num_layers)))


def is_fused(config: Any) -> bool:
    """Whether a base's or a Hybrid's config is of a fused checkpoint: teacher and student in one."""
    return getattr(getattr(config, "pattern", None), "fused", False)


def require_fused(config: Any, source: object) -> None:
    """HmfError, which `source` opens, for a config that holds no teacher."""
    if not is_fused(config):
        raise HmfError(f"{source}: is no fused checkpoint (teacher and student); make one with `hmf init`")


def mixer_symbol(name: str) -> str:
    """Symbol of a layer kind by its symbol or its command-line name (`gdn`, `mamba2`); HmfError if unknown."""
    for kind in LAYER_KINDS.values():
        if name.lower() in (kind.symbol.lower(), kind.name):
            return kind.symbol
    raise HmfError(unknown_name("mixer", name, [kind.name for kind in LAYER_KINDS.values()]))


def parse_layer_list(text: str) -> Sequence[int]:
    """`"1,3,5-7"` -> [1, 3, 5, 6, 7]; HmfError when a part is no number or range."""
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not found:
            raise HmfError(f"layers: {part!r} is no layer index or rising range; write for example 1,3,5-7")
        indices += found
    return indices
