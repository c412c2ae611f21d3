# SPDX-License-Identifier: Apache-2.0
"""Titles and papers of the layer types, for model cards."""

from __future__ import annotations

import re
from collections.abc import Sequence

import hmf
from hmf.config.layers import LayerKind

# By number on arXiv.
PAPERS = {
    "2412.06464": "Gated Delta Networks: Improving Mamba2 with Delta Rule",
    "2511.21016": "Gated KalmaNet: A Fading Memory Layer Through Test-Time Ridge Regression",
    "2405.21060": "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
    "Duality",
    "2407.06324": "B'MOJO: Hybrid State Space Realizations of Foundation Models with Eidetic and Fading Memory",
}


def citation(kinds: Sequence[LayerKind]) -> str:
    """BibTeX of this software and of the layer kinds' papers, as a block of Markdown."""
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
        f"@{sort}{{{key},\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"
        for sort, found in entries.items()
        for key, fields in found.items()
    ]
    return "```bibtex\n" + "\n\n".join(shown) + "\n```"


def reference(kind: LayerKind) -> tuple[str, str | None]:
    """(name, number on arXiv) of a layer kind, as its options state them."""
    first = (kind.options.__doc__ or kind.name).partition(",")[0]
    match = re.fullmatch(r"(.*?) ?\(arXiv (\d{4}\.\d{5})\)", first)
    return (match[1], match[2]) if match else (first, None)
