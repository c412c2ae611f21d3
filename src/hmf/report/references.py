# SPDX-License-Identifier: Apache-2.0
"""Names and papers of the layer types, for model cards."""

from __future__ import annotations

import re
from collections.abc import Sequence

import hmf
from hmf.config.layers import LayerKind

# Titles by arXiv number.
PAPERS = {
    "2412.06464": "Gated Delta Networks: Improving Mamba2 with Delta Rule",
    "2510.26692": "Kimi Linear: An Expressive, Efficient Attention Architecture",
    "2511.21016": "Gated KalmaNet: A Fading Memory Layer Through Test-Time Ridge Regression",
    "2405.21060": "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
    "Duality",
    "2407.06324": "B'MOJO: Hybrid State Space Realizations of Foundation Models with Eidetic and Fading Memory",
}


def citation(kinds: Sequence[LayerKind]) -> str:
    """BibTeX entries of this software and of the papers of the layer types, as a Markdown block."""
    entries = {"software": {"hybrid_model_factory": {"title": "Hybrid Model Factory", "version": hmf.__version__}}}
    entries["misc"] = {
        kind.name: {
            "title": PAPERS[paper],
            "eprint": paper,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{paper}",
        }
        for kind in kinds
        for _, paper in [reference(kind)]
        if paper
    }
    shown = [
        f"@{entry_type}{{{key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"
        for entry_type, entries_of_type in entries.items()
        for key, fields in entries_of_type.items()
    ]
    return "```bibtex\n" + "\n\n".join(shown) + "\n```"


def reference(kind: LayerKind) -> tuple[str, str | None]:
    """(name, arXiv number or None) of a layer type, from the docstring of its options."""
    first = (kind.options.__doc__ or kind.name).partition(",")[0]
    match = re.fullmatch(r"(.*?) ?\(arXiv (\d{4}\.\d{5})\)", first)
    return (match[1], match[2]) if match else (first, None)
