# SPDX-License-Identifier: Apache-2.0
"""Draw docs/architecture.svg: `python tools/architecture.py`. Packages and their order come from the lint settings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
# Heading of each line of packages, and the highest package in it.
LINES = {
    "command line": "cli",
    "measure, serve": "bench",
    "train, score": "evaluation",
    "data": "data",
    "model": "model",
    "settings": "config",
}
BLUE, BROWN, GREY = ("#eef3fb", "#4a6fa5"), ("#fff", "#a5854a"), ("#fff", "#777")


def packages() -> dict[str, list[str]]:
    """Packages by line. Each package imports only packages after it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    order = [re.sub(r"[()]", "", name) for layer in contracts[0]["layers"] for name in re.split(r"[|:]", layer)]
    starts = [order.index(first) for first in LINES.values()]
    return {line: order[start:end] for line, start, end in zip(LINES, starts, [*starts[1:], len(order)], strict=True)}


def text(x: float, y: float, content: str, size: int = 12, anchor: str = "start", bold: bool = False) -> str:
    style = ' font-weight="bold" fill="#000"' if bold else ' fill="#444"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{style}>{content}</text>'


def box(x: float, y: float, width: float, height: float, title: str, note: str = "", colours=BLUE, size=14) -> str:
    fill, line = colours
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{fill}" stroke="{line}"/>'
    middle = x + width / 2
    parts = [shape, text(middle, y + height / 2 + (-5 if note else 5), title, size, "middle", colours == BLUE)]
    return "\n".join([*parts, text(middle, y + height / 2 + 14, note, 12, "middle")] if note else parts)


def arrow(path: str) -> str:
    return f'<path d="{path}" stroke="#555" fill="none" marker-end="url(#arrow)"/>'


def stages() -> list[str]:
    return [
        text(20, 24, "The stages", 15, bold=True),
        box(20, 40, 260, 58, "base Transformer", "any supported family"),
        box(370, 40, 260, 58, "fused checkpoint", "teacher and student in one model"),
        box(720, 40, 260, 58, "Hybrid", "published format"),
        *map(
            arrow,
            ("M280 69H368", "M630 69H718", "M450 100C450 132 550 132 550 102", "M800 100C800 132 900 132 900 102"),
        ),
        text(325, 61, "hmf init", 12, "middle"),
        text(674, 61, "hmf export", 12, "middle"),
        text(500, 142, "hmf distill (Stage 1): trains the mixers", 12, "middle"),
        text(850, 142, "hmf finetune (Stage 2)", 12, "middle"),
    ]


def fused_layer() -> list[str]:
    return [
        text(20, 180, "A replaced layer of the fused checkpoint", 15, bold=True),
        box(20, 226, 80, 40, "norm", colours=GREY),
        box(150, 192, 160, 40, "self_attn (frozen)", colours=("#f3f3f3", "#777")),
        box(150, 260, 160, 40, "mixer (trained)", colours=("#e7f6e7", "#777")),
        box(360, 226, 80, 40, "MLP", colours=GREY),
        *map(arrow, ("M100 240L148 214", "M100 252L148 278", "M310 212L358 240", "M310 280L358 252")),
        text(330, 206, "teacher"),
        text(330, 296, "student"),
        text(20, 325, "Norms, MLPs, embeddings and head are shared."),
        text(20, 342, "Layers before the first replaced one run once for both paths."),
    ]


def users() -> list[str]:
    return [
        text(20, 380, "Users of the Hybrid", 15, bold=True),
        box(20, 395, 420, 66, "transformers", "Auto classes, generate, Trainer: import hmf registers the Hybrids"),
        box(20, 475, 420, 66, "vLLM", "its decoder stacks, recurrent layers of hmf: an entry point"),
    ]


def layering() -> list[str]:
    parts = [text(500, 180, "Packages: each imports only packages below it", 15, bold=True)]
    width, gap, y = 74, 5, 195
    for line, names in packages().items():
        parts.append(f'<rect x="500" y="{y}" width="480" height="62" rx="8" fill="#fbf6ea" stroke="#d9c79a"/>')
        parts.append(text(508, y + 36, line, 11))
        left = 975 - len(names) * (width + gap)
        for number, name in enumerate(names):
            parts.append(box(left + number * (width + gap), y + 14, width, 34, name, colours=BROWN, size=12))
        y += 70
    return [*parts, text(500, y + 10, "In a line, a package imports those to its right. make lint checks the order.")]


def picture() -> str:
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 640" font-family="sans-serif">',
        '<rect width="1000" height="640" fill="white"/>',
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#555"/></marker></defs>',
    )
    return "\n".join([*head, *stages(), *fused_layer(), *users(), *layering(), "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
