# SPDX-License-Identifier: Apache-2.0
"""The layer pattern of a Hybrid: parse, print and generate `hybrid_override_pattern`.

A pattern has one symbol per layer, joined by "-". `*` is the base's own layer, which is attention in most families. A
*fused* checkpoint (Stages 0 and 1) keeps the base's token mixer in every layer, as the teacher, and its pattern marks
all symbols: `*DA` is a layer of the base alone, `GDN*` a layer that holds both attention and mixer.

`GDN>GKA` is GKA in place of a recurrent layer of the base, which is Gated DeltaNet in all families that have one. The
pattern of a fused checkpoint keeps what was replaced, because that is the teacher; in a plain Hybrid the layer is GKA.
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
FROM_RECURRENT = "GDN>"


@dataclass(frozen=True)
class Pattern:
    """Symbols of the layers (`ATTENTION` or a key of `LAYER_KINDS`), and whether the checkpoint is fused.

    from_recurrent: indices of the new layers that replace a recurrent layer of the base.
    """

    symbols: tuple[str, ...]
    fused: bool = False
    from_recurrent: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.symbols)

    def __str__(self) -> str:
        return "-".join(self.as_list())

    def as_list(self) -> list[str]:
        """The symbols as in the published `layer_types`."""
        named = [FROM_RECURRENT * (i in self.from_recurrent) + symbol for i, symbol in enumerate(self.symbols)]
        if not self.fused:
            return named
        return [FUSED_ATTENTION if symbol == ATTENTION else f"{symbol}*" for symbol in named]

    @property
    def replaced(self) -> tuple[int, ...]:
        """Indices of the layers that are not the base's own."""
        return tuple(i for i, symbol in enumerate(self.symbols) if symbol != ATTENTION)

    def with_fused(self, fused: bool) -> Pattern:
        """The pattern of the fused checkpoint, or of its plain Hybrid, in which nothing is left of replaced layers."""
        return Pattern(self.symbols, fused, self.from_recurrent if fused else frozenset())

    @classmethod
    def parse(cls, text: str, num_layers: int | None = None, source: str = "hybrid_override_pattern") -> Pattern:
        """Parse a pattern.

        Args:
            source: file and key, which start the error message.
        Raises:
            HmfError: an unknown symbol, a mix of fused and plain symbols, or a length other than `num_layers`.
        """
        if not isinstance(text, str):
            raise HmfError(f'{source}: {text!r} is not a string; join the symbols by "-", for example *-GDN-*-GDN')
        symbols, fused_marks, from_recurrent = [], set(), set()
        for position, whole in enumerate(text.split("-")):
            raw = whole.removeprefix(FROM_RECURRENT)
            if raw != whole:
                from_recurrent.add(position)
            if ">" in raw or (raw != whole and raw.startswith(ATTENTION)):
                why = (
                    f"write for example {FROM_RECURRENT}GKA for GKA in place of a recurrent layer of the base, and GKA "
                    "for GKA in place of attention"
                )
                raise HmfError(f"{source}: layer {position}: {whole!r}: {why}")
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
            raise HmfError(
                f"{source}: {text!r} mixes fused (*DA, GDN*) and plain (*, GDN) symbols; use either of them alone"
            )
        if num_layers is not None and len(symbols) != num_layers:
            raise HmfError(
                f"{source}: has {len(symbols)} layers, but the model has {num_layers}; give one symbol per layer"
            )
        return cls(tuple(symbols), fused_marks.pop(), frozenset(from_recurrent))

    @classmethod
    def generate(
        cls,
        num_layers: int,
        mixer: str,
        ratio: float | None = None,
        layers: Collection[int] | None = None,
        attention: Sequence[int] | None = None,
    ) -> Pattern:
        """The pattern with `mixer` at `layers`, or at a share `ratio` of the attention layers, spread evenly.

        attention: the indices of the base's attention layers; None: all layers are.

        Raises:
            HmfError: the ratio is outside (0, 1] or selects no layer, or an index is out of range or not of attention.
        """
        symbol = mixer_symbol(mixer)
        if layers is None:
            if ratio is None or not 0 < ratio <= 1:
                raise HmfError(f"ratio: {ratio} is not in (0, 1]; 0.5 replaces half of the attention layers")
            attention = range(num_layers) if attention is None else attention
            if not attention:
                raise HmfError(f"ratio: none of the base's {num_layers} layers is attention; give another base")
            count = round(ratio * len(attention))
            if count == 0:
                least = math.ceil(1000 / len(attention)) / 1000
                raise HmfError(f"ratio: {ratio} of {len(attention)} layers replaces no layer; {least} replaces one")
            layers = [attention[(i + 1) * len(attention) // count - 1] for i in range(count)]
        chosen = set(layers)
        if not chosen:
            raise HmfError("layers: the list is empty; name at least one layer to replace")
        if outside := sorted(i for i in chosen if not 0 <= i < num_layers):
            raise HmfError(f"layers: {outside} are not layers of the model; its layers are 0 to {num_layers - 1}")
        if attention is not None and (recurrent := sorted(chosen - set(attention))):
            raise HmfError(
                f"layers: {recurrent} are recurrent in the base; its attention layers are {list(attention)}. To "
                f"replace a recurrent layer, write a pattern with {FROM_RECURRENT}GKA there"
            )
        return cls(tuple(symbol if i in chosen else ATTENTION for i in range(num_layers)))


def is_fused(config: Any) -> bool:
    """Whether the config of a base or a Hybrid is that of a fused checkpoint, which holds teacher and student."""
    return getattr(getattr(config, "pattern", None), "fused", False)


def require_fused(config: Any, source: object) -> None:
    """HmfError that starts with `source` unless the config is that of a fused checkpoint."""
    if not is_fused(config):
        raise HmfError(f"{source}: is not a fused checkpoint (with teacher and student); make one with `hmf init`")


def mixer_symbol(name: str) -> str:
    """The symbol of a layer type, given its symbol or its name on the command line (`gdn`, `mamba2`).

    Raises:
        HmfError: there is no such layer type.
    """
    for kind in LAYER_KINDS.values():
        if name.lower() in (kind.symbol.lower(), kind.name):
            return kind.symbol
    raise HmfError(f"mixer: {unknown_name('mixer', name, [kind.name for kind in LAYER_KINDS.values()])}")


def parse_layer_list(text: str) -> Sequence[int]:
    """`"1,3,5-7"` -> [1, 3, 5, 6, 7]. HmfError when a part is neither a number nor an ascending range."""
    indices: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span:
            raise HmfError(
                f"layers: {part!r} is neither a layer index nor an ascending range; write for example 1,3,5-7"
            )
        indices += span
    return indices
