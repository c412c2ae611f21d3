# SPDX-License-Identifier: Apache-2.0
"""The keys of a recipe's section `rope`: changes of rotary positions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .strict import Settings, TokenCount

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]
# Keys of each type of scaling that a recipe can name: (required, optional).
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
}
ROPE_SCALING_KEYS = frozenset(key for needed, optional in ROPE_KEYS.values() for key in (*needed, *optional))


class RopeScaling(Settings):
    """Scaling of rotary positions, with the names of transformers. The type "default" removes a scaling."""

    rope_type: Literal["default", "linear", "yarn", "llama3"]  # type of scaling; each type has its own keys
    factor: AtLeastOne | None = None  # scaling factor, relative to the length before any scaling
    # context length before any scaling; left out: the model's value
    original_max_position_embeddings: TokenCount | None = Field(None, ge=1)
    # for yarn: frequencies with more rotations than this in the original context are not scaled
    beta_fast: Positive | None = None
    # for yarn: frequencies with fewer rotations than this in the original context are scaled by factor
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None  # for yarn: multiplies cosines and sines; left out: follows from factor
    mscale: NotNegative | None = None  # for yarn: with mscale_all_dim, determines attention_factor
    mscale_all_dim: NotNegative | None = None  # for yarn: see mscale
    # for yarn: whether the range between beta_slow and beta_fast is rounded to whole dimensions
    truncate: bool | None = None
    # for llama3: wavelengths above the original context divided by this are scaled by factor
    low_freq_factor: Positive | None = None
    # for llama3: wavelengths below the original context divided by this are not scaled
    high_freq_factor: Positive | None = None

    @model_validator(mode="after")
    def _keys_of_its_type(self) -> RopeScaling:
        needed, optional = ROPE_KEYS[self.rope_type]
        options = self.model_dump(exclude={"rope_type"}, exclude_none=True)
        if missing := [name for name in needed if name not in options]:
            raise ValueError(f"{self.rope_type} needs {', '.join(missing)}")
        if extra := [name for name in options if name not in (*needed, *optional)]:
            raise ValueError(f"{self.rope_type} has no {', '.join(extra)}; leave it out")
        low, high = (
            (self.beta_slow, self.beta_fast)
            if self.rope_type == "yarn"
            else (self.low_freq_factor, self.high_freq_factor)
        )
        if low is not None and high is not None and low >= high:
            raise ValueError("the low (slow) factor must be smaller than the high (fast) one")
        return self


class RopeSettings(Settings):
    """Changes of the rotary positions of attention layers. A key that is left out keeps the model's value."""

    theta: Positive | None = None  # base of the rotary frequencies
    max_position_embeddings: TokenCount | None = Field(None, ge=1)  # longest context
    scaling: RopeScaling | None = None  # scaling of the positions; left out: the model's scaling
