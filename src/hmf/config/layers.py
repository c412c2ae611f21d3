# SPDX-License-Identifier: Apache-2.0
"""Options of every layer type. Their defaults are defined here and nowhere else.

Each options class mirrors one dict of the published `config.json` (`gdn_config`, ...). The *derived* fields repeat
dimensions of the base model. They are written for readers of the file; loading ignores them and computes them again.
A notice names those that differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
)

from hmf.errors import HmfError, notice, unknown_name

# The upper bounds are far above every use: they turn a typing error into a message in place of exhausted memory.
Window = Annotated[int, Field(ge=1, le=2**24)]
Epsilon = Annotated[float, Field(ge=0, le=1)]


class LayerOptions(BaseModel):
    """Base of the options classes.

    A default is the value that a published checkpoint means if it does not name the option.

    Attributes:
        derived: fields that are computed from the base model's config.
        format_only: fields of published checkpoints that have no effect here; they are checked, kept and written again.
        new_where_queries_grow: values for newly made layers on a base that scales its queries by position, in place of
            the defaults.
        new_from_base: options that newly made layers copy from the base's config, with the config's key for each, where
            the config has that key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
    derived: ClassVar[frozenset[str]] = frozenset()
    format_only: ClassVar[frozenset[str]] = frozenset()
    new_where_queries_grow: ClassVar[Mapping[str, Any]] = {}
    new_from_base: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def dimensions(cls, base: Any, own_shape: bool = False) -> dict[str, Any]:
        """The derived fields, from a base model's config; own_shape: the option of that name, if there is one."""
        raise NotImplementedError

    @classmethod
    def new_values(cls, base: Any, queries_grow: bool, from_recurrent: bool) -> dict[str, Any]:
        """Values in place of the defaults for newly made layers on a base with this config.

        queries_grow: the base scales its queries by position; from_recurrent: some replace a recurrent layer of it.
        """
        new = {key: getattr(base, name) for key, name in cls.new_from_base.items() if has_key(base, name)}
        return new | (dict(cls.new_where_queries_grow) if queries_grow else {})

    @classmethod
    def from_base(cls, base: Any, options: Mapping[str, Any] | None = None, source: str = "config.json") -> Any:
        """Options for the model described by `base` (a Hugging Face config).

        Raises:
            HmfError: an unknown option, or one with an invalid value.
        """
        if not isinstance(options or {}, Mapping):
            raise HmfError(f'{source}: {options!r} is not a mapping of options; write {{"name": value, ...}}')
        user = {key: value for key, value in (options or {}).items() if key not in cls.derived}
        known = cls.model_fields.keys() - cls.derived
        for key in user:
            if key not in known:
                raise HmfError(f"{source}: {unknown_name('key', key, known)}")
        check_heads(base)
        own = user.get("own_shape") is True
        if own and (why := own_shape_problem(base)):
            raise HmfError(f"{source}: own_shape: true, but {why}; correct that, or leave own_shape out")
        dimensions = cls.dimensions(base, own)
        for key in cls.derived & (options or {}).keys():
            if (stored := (options or {})[key]) is not None and stored != dimensions[key]:
                notice(
                    f"{source}: {key}: {stored!r} is not read; {dimensions[key]!r} follows from the keys of the base"
                )
        try:
            return cls(**user, **dimensions)
        except ValidationError as error:
            first = error.errors()[0]
            raise HmfError(
                f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})"
            ) from None


def base_head_dim(base: Any) -> int:
    return getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads


def base_intermediate_size(base: Any) -> int:
    """The width of a base's MLPs, or of its experts where no layer is without (Qwen3.5-MoE)."""
    return getattr(base, "intermediate_size", None) or base.moe_intermediate_size


SILU = ("silu", "swish")  # the names of this activation in transformers


def base_activation(base: Any) -> str:
    """The activation of a base's MLPs; Gemma's configs may have `hidden_act` too, which its modules do not read."""
    return base.hidden_activation if has_key(base, "hidden_activation") else base.hidden_act


def experts_per_token(base: Any) -> int:
    """The number of experts that compute a token; 0 for a base without experts."""
    experts = next((getattr(base, name) for name in ("num_experts", "num_local_experts") if has_key(base, name)), 0)
    return base.num_experts_per_tok if experts else 0


def check_heads(base: Any, source: str = "config.json") -> None:
    """HmfError unless the query heads of a base's attention can share its key/value heads evenly."""
    heads, kv_heads = base.num_attention_heads, base.num_key_value_heads
    if heads % kv_heads:
        raise HmfError(f"{source}: num_key_value_heads: {kv_heads} does not divide num_attention_heads, {heads}")


def has_key(base: Any, name: str) -> bool:
    """Whether `name` is a key of the base's family. A config.json may hold others too, which nothing reads."""
    return name in getattr(type(base), "__dataclass_fields__", vars(base))


def own_shape_problem(base: Any) -> str | None:
    """The reason why a new layer cannot have the heads of the base's own recurrent layers, or None.

    It needs one head_dim for keys and values, and as many channels of values as attention has.
    """
    if not has_key(base, "linear_num_value_heads"):
        return "the base has no recurrent layers of its own"
    values, keys, size = base.linear_num_value_heads, base.linear_num_key_heads, base.linear_value_head_dim
    if keys < 1 or values % keys:
        return f"linear_num_value_heads, {values}, is not a multiple of linear_num_key_heads, {keys}"
    if base.linear_key_head_dim != size:
        return f"linear_key_head_dim, {base.linear_key_head_dim}, differs from linear_value_head_dim, {size}"
    if values * size != (channels := base.num_attention_heads * base_head_dim(base)):
        return f"the base's recurrent layers have {values} x {size} channels of values, and its attention {channels}"
    return None


class _LinearOptions(LayerOptions):
    """Options shared by GDN, KDA and GKA. Expanded heads H = max(num_q_heads, num_k_heads, num_v_heads)."""

    new_from_base = {"conv_size": "linear_conv_kernel_dim"}
    new_in_own_shape: ClassVar[bool] = False  # whether new layers have `own_shape` in place of attention, too
    derived = frozenset({"hidden_size", "head_dim", "num_q_heads", "num_k_heads", "num_v_heads"})
    hidden_size: int
    head_dim: int
    num_q_heads: int
    num_k_heads: int
    num_v_heads: int
    use_gate: bool = True  # whether the output is gated
    conv_size: int = Field(4, ge=1, le=2**10)  # width of the short convolutions
    # rank of the correction that is added to the repeated heads of k and v
    kv_proj_rank: int | None = Field(None, ge=0, le=2**14)
    kv_learnable_residual: bool = False  # with kv_proj_rank: repeated heads have learned factors
    # Heads as in the base's own recurrent layers (Qwen3.5), not as in attention. Written only if it is true.
    own_shape: StrictBool = Field(False, exclude_if=lambda value: not value)

    @property
    def num_heads(self) -> int:
        return max(self.num_q_heads, self.num_k_heads, self.num_v_heads)

    @classmethod
    def new_values(cls, base: Any, queries_grow: bool, from_recurrent: bool) -> dict[str, Any]:
        new = super().new_values(base, queries_grow, from_recurrent)
        own = (from_recurrent or cls.new_in_own_shape) and own_shape_problem(base) is None
        return new | ({"own_shape": True} if own else {})

    @classmethod
    def dimensions(cls, base: Any, own_shape: bool = False) -> dict[str, Any]:
        heads, kv_heads = base.num_attention_heads, base.num_key_value_heads
        shape = (base_head_dim(base), heads, kv_heads, kv_heads)
        if own_shape:
            keys = base.linear_num_key_heads
            shape = (base.linear_value_head_dim, keys, keys, base.linear_num_value_heads)
        names = ("head_dim", "num_q_heads", "num_k_heads", "num_v_heads")
        return {"hidden_size": base.hidden_size, **dict(zip(names, shape, strict=True))}


class GDNOptions(_LinearOptions):
    """Gated DeltaNet (arXiv 2412.06464), `gdn_config`."""

    # As in Qwen3.5: one epsilon for all norms.
    new_from_base = {"norm_eps": "rms_norm_eps", **_LinearOptions.new_from_base}
    new_in_own_shape = True  # so that a Hybrid of Qwen3.5 can become a stock Qwen3.5
    use_short_conv: bool = True  # short convolutions on q, k and v
    allow_neg_eigval: bool = False  # whether beta is doubled, so that transitions can have negative eigenvalues
    conv_bias: bool = False  # biases in the short convolutions
    norm_eps: Epsilon = 1e-5  # epsilon of the norm over each head; new layers use the base's rms_norm_eps


class KDAOptions(GDNOptions):
    """Kimi Delta Attention (arXiv 2510.26692), `kda_config`. It has the options of GDN, with the same meaning."""

    new_in_own_shape = False


class GKAOptions(_LinearOptions):
    """Gated KalmaNet (arXiv 2511.21016), `gka_config`."""

    # Chunk length of the published kernels. The kernels here have their own chunk length; the results are the same.
    format_only = frozenset({"chunk_size"})
    use_alpha_connection: bool = True  # whether the query is mixed with the solution by a learned alpha
    use_v_conv: bool = True  # short convolution on v, too
    use_forgetting_gate: bool = True  # decay of the value state
    use_forgetting_gate_kk: bool = True  # decay of the covariance
    use_beta_gate: bool = True  # learned weight of each key and value
    gla_rescale: bool = True  # whether outputs are scaled by 1 / sqrt(head_dim)
    solver_type: Literal["chebyshev"] = "chebyshev"  # the only solver
    bp_lambda: bool = True  # whether gradients flow through lambda
    num_iter: int = Field(30, ge=0, le=10**4)  # Chebyshev iterations of the solver
    ridge_strength: float = Field(0.02, ge=0, le=10**6)  # lambda relative to the norm of the covariance
    norm_eps: Epsilon = 1e-6  # epsilon of the norm over each head
    chunk_size: Window = 64  # kept for readers of config.json; it has no effect


class Mamba2Options(LayerOptions):
    """Mamba2 in attention's shape (arXiv 2405.21060), `mamba2_config`."""

    derived = frozenset(
        {"d_model", "d_inner", "d_xb", "intermediate_size", "hidden_act", "rms_norm_eps", "n_layer", "ssm_cfg"}
    )
    d_model: int
    d_inner: int
    d_xb: int
    intermediate_size: int
    hidden_act: str
    rms_norm_eps: float
    n_layer: int
    ssm_cfg: dict[str, int]
    use_qk_norm: bool = True  # whether the base's norms of queries and keys are used, if it has them
    use_pos_emb: bool = False  # whether queries and keys have rotary positions

    @classmethod
    def dimensions(cls, base: Any, own_shape: bool = False) -> dict[str, Any]:
        head_dim = base_head_dim(base)
        return {
            "d_model": base.hidden_size,
            "d_inner": base.num_attention_heads * head_dim,
            "d_xb": base.num_key_value_heads * head_dim,
            "intermediate_size": base_intermediate_size(base),
            "hidden_act": base_activation(base),
            "rms_norm_eps": base.rms_norm_eps,
            "n_layer": base.num_hidden_layers,
            "ssm_cfg": {"expand": 1, "ngroups": base.num_attention_heads, "d_state": head_dim},
        }


class BMojoFOptions(LayerOptions):
    """B'MOJO-F (arXiv 2407.06324), `bmojo_config`. The options of the inner layer are in the dict of its own type."""

    derived = frozenset({"hidden_size", "num_heads", "num_key_value_heads", "head_dim", "rms_norm_eps"})
    new_where_queries_grow = {"scale_queries": True}
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    window_size: Window = 2048  # tokens of the window
    tie_attn_weights: bool = True  # whether fading tokens use the projections of the input
    # Scales queries by their position, as the base does (Ministral 3). The published software does not know this key,
    # so it is written only if it is true.
    scale_queries: bool = Field(False, exclude_if=lambda value: not value)
    ssm_mixer: Literal["mamba2", "gdn", "gka", "gated_deltanet", "gated_kalmanet"] = "mamba2"  # inner recurrent layer

    @property
    def inner_symbol(self) -> str:
        """Symbol of the recurrent layer that makes the fading tokens."""
        return {"mamba2": "M2", "gdn": "GDN", "gated_deltanet": "GDN"}.get(self.ssm_mixer, "GKA")

    @classmethod
    def dimensions(cls, base: Any, own_shape: bool = False) -> dict[str, Any]:
        return {
            "hidden_size": base.hidden_size,
            "num_heads": base.num_attention_heads,
            "num_key_value_heads": base.num_key_value_heads,
            "head_dim": base_head_dim(base),
            "rms_norm_eps": base.rms_norm_eps,
        }


class SWAOptions(LayerOptions):
    """Sliding-window attention, `swa_config`."""

    window_size: Window = 2048  # tokens of the window

    @classmethod
    def dimensions(cls, base: Any, own_shape: bool = False) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class LayerKind:
    """Names of one layer type in the published format, on the command line and in a decoder layer."""

    symbol: str
    name: str
    config_key: str
    module_name: str
    options: type[LayerOptions]

    @property
    def overrides_key(self) -> str:
        return f"{self.name}_overrides"


LAYER_KINDS: dict[str, LayerKind] = {
    kind.symbol: kind
    for kind in (
        LayerKind("GDN", "gdn", "gdn_config", "gdn", GDNOptions),
        LayerKind("KDA", "kda", "kda_config", "kda", KDAOptions),
        LayerKind("GKA", "gka", "gka_config", "gka", GKAOptions),
        LayerKind("M2", "mamba2", "mamba2_config", "mamba", Mamba2Options),
        LayerKind("BMF", "bmojo", "bmojo_config", "bmojo_f", BMojoFOptions),
        LayerKind("SWA", "swa", "swa_config", "swa", SWAOptions),
    )
}


def layer_options(config: Any, symbol: str) -> Any:
    """Options of layer type `symbol` for a hybrid config (any object with the config's attributes).

    The optional top-level dict `<name>_overrides` (published: `gka_overrides`) is merged over the stored one.
    """
    kind = LAYER_KINDS[symbol]
    stored: dict[str, Any] = {}
    for key in (kind.config_key, kind.overrides_key):
        given = getattr(config, key, None)
        if not isinstance(given, dict | None):
            raise HmfError(f"config.json: {key}: {given!r} is not an object of options such as {{}}; correct it")
        stored |= given or {}
    return kind.options.from_base(config, stored, source=f"config.json: {kind.config_key}")


def needed_kinds(config: Any, symbols: tuple[str, ...]) -> list[LayerKind]:
    """The layer types whose options a config with these `symbols` must hold; B'MOJO-F adds its inner layer's type."""
    kinds = [LAYER_KINDS[symbol] for symbol in dict.fromkeys(symbols) if symbol in LAYER_KINDS]
    for kind in list(kinds):
        if issubclass(kind.options, BMojoFOptions):
            inner = LAYER_KINDS[layer_options(config, kind.symbol).inner_symbol]
            if inner not in kinds:
                kinds.append(inner)
    return kinds
