# SPDX-License-Identifier: Apache-2.0
"""Recipes: one YAML file says what a run does. Unknown keys are errors that name the nearest valid one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from hmf.errors import HmfError, listed, unknown_name

from .layers import LAYER_KINDS
from .pattern import Pattern
from .places import PairSettings
from .selection import SelectSettings
from .strict import Seed, Settings, TokenCount, Tokens, parse_yaml, require_none
from .training import RENAMED, ParallelSettings

TrainableGroup = Literal["mixers", "norms", "attention", "mlp", "embeddings"]
TrainableName = Literal["mixers", "norms", "attention", "mlp", "embeddings", "all"]
LayerTarget = Literal["none", "mixer", "decoder", "residuals", "all"]
Share = Annotated[float, Field(ge=0, le=1)]
Recipe = TypeVar("Recipe", bound="Settings")
SHOWN = 20  # errors of a recipe that one message names


class HybridSettings(Settings):
    """Which layers become what: exactly one of `pattern`, `layers` and `ratio`; the last two need `mixer`.

    `layers: auto` is chosen by the section `select`, and `ratio` beside it says how many layers are replaced.
    """

    mixer: str = "gdn"  # layer type: gdn, gka, mamba2, bmojo or swa
    ratio: float | None = None  # share of layers to replace, spread evenly
    # indices of the layers to replace, from 0; or auto: by the section select, as many as ratio says
    layers: list[int] | Literal["auto"] | None = None
    pattern: str | None = None  # one symbol a layer, joined by -, as *-GDN-*-GDN
    # options by layer type; see the end of docs/recipe-keys.md
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    # identity: short convolutions begin by passing the current token through
    conv_start: Literal["random", "identity"] = "random"

    @model_validator(mode="after")
    def _one_choice(self) -> HybridSettings:
        given = [name for name in ("ratio", "layers", "pattern") if getattr(self, name) is not None]
        if self.layers == "auto" and given != ["ratio", "layers"]:
            raise ValueError("layers: auto needs ratio, the share of layers to replace, and no pattern")
        if self.layers != "auto" and len(given) != 1:
            raise ValueError(f"give exactly one of ratio, layers and pattern, not {' and '.join(given) or 'none'}")
        return self

    def layer_pattern(self, num_layers: int) -> Pattern:
        """The pattern for a base of `num_layers`; HmfError when it does not fit."""
        if self.pattern is not None:
            pattern = Pattern.parse(self.pattern, num_layers, source="pattern").with_fused(False)
            if not pattern.replaced:
                raise HmfError("pattern: no layer is replaced; put at least one mixer symbol in")
            return pattern
        if self.layers == "auto":
            raise HmfError("layers: auto is chosen when `hmf prime` runs; give ratio alone to spread the layers evenly")
        return Pattern.generate(num_layers, self.mixer, self.ratio, self.layers)

    def spread_evenly(self) -> HybridSettings:
        """These settings with `ratio` alone where they have `layers: auto`: as many layers are replaced."""
        return self.model_copy(update={"layers": None}) if self.layers == "auto" else self

    def options_by_key(self) -> dict[str, dict[str, Any]]:
        """`options` under the names that config.json uses."""
        known = {kind.name: kind.config_key for kind in LAYER_KINDS.values()}
        for name in self.options:
            if name not in known:
                raise HmfError(f"options: {unknown_name('layer kind', name, known)}")
        return {known[name]: dict(values) for name, values in self.options.items()}


class DataSettings(Settings):
    """What the model reads: real text and generated tasks in conversations (weights by task name), in rows of
    `sequence_length` tokens; or `prepared`, the output of `hmf data prepare`, which has its own rows."""

    prepared: Path | None = None  # folder that `hmf data prepare` wrote; then no other key of this section
    text: str = "stdlib"  # "stdlib", or a folder or file of .py, .txt, .md
    sequence_length: Tokens = 1024  # tokens of a row
    text_share: float = Field(1.0, ge=0, le=1)  # share of rows with text alone; the others have tasks
    # generated tasks by name, with their weights
    tasks: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> DataSettings:
        if self.prepared is not None and (others := sorted(self.model_fields_set - {"prepared"})):
            raise ValueError(f"prepared rows are complete; leave out {', '.join(others)}")
        return self


def _as_schedule(value: Any) -> Any:
    return {0: value} if isinstance(value, int | float) else value


# A weight by step: straight lines between the steps that are named, constant before and after. One number is constant.
Schedule = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, allow_inf_nan=False)]],
    Field(min_length=1),
    BeforeValidator(_as_schedule),
]


def weight_at(schedule: Mapping[int, float], step: int) -> float:
    """The weight of a term at an optimiser step, a function of nothing else: a resumed run has the same."""
    steps = sorted(schedule)
    if step <= steps[0] or step >= steps[-1]:
        return schedule[steps[0] if step <= steps[0] else steps[-1]]
    after = next(later for later in steps if later > step)
    before = steps[steps.index(after) - 1]
    share = (step - before) / (after - before)
    return (1 - share) * schedule[before] + share * schedule[after]


class ObjectiveSettings(Settings):
    """Stage 1: MSE before the head, MSE of layer outputs, KL of the logits, each by a weight or a schedule of weights.

    In the first `layerwise_steps` each mixer learns alone instead, from the teacher's own inputs.
    """

    layerwise_steps: int = Field(0, ge=0)  # first steps in which each mixer learns alone
    pre_lm_head: Schedule = {0: 1.0}  # false is 0, true is 1
    layers: LayerTarget = "none"  # layer outputs that are compared
    layers_weight: Schedule = {0: 1.0}  # weight of that term
    kl: Schedule = {0: 0.0}  # weight of the KL divergence of next-token distributions
    # forward is KL(teacher, student), reverse is KL(student, teacher)
    kl_direction: Literal["forward", "reverse"] = "forward"
    kl_tokens: Literal["all", "supervised"] = "all"  # supervised: tokens with a label alone
    kl_top_k: int | None = Field(None, ge=1)  # tell apart the teacher's likeliest tokens only; the rest is one outcome
    kl_temperature: float = Field(1.0, gt=0)  # divides the logits; the term is multiplied by its square
    kl_chunk_size: TokenCount | None = Field(None, ge=1)  # tokens whose logits exist at once; left out: by their size

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights of pre_lm_head, layers and kl at a step."""
        return {
            "pre_lm_head": weight_at(self.pre_lm_head, step),
            "layers": weight_at(self.layers_weight, step) if self.layers != "none" else 0.0,
            "kl": weight_at(self.kl, step),
        }

    @model_validator(mode="after")
    def _always_something(self) -> ObjectiveSettings:
        # Between two of these steps all weights are straight lines: a sum that is not 0 at both ends is 0 nowhere.
        first = self.layerwise_steps
        for step in sorted({first, *(s for s in (*self.pre_lm_head, *self.layers_weight, *self.kl) if s > first)}):
            if not any(self.weights_at(step).values()):
                raise ValueError(f"nothing to compare at step {step}; give pre_lm_head, kl or layers a weight")
        return self


class OnPolicySettings(Settings):
    """Stage 1 on what the student writes itself: it goes on from prompts drawn from `data`, at most to its length."""

    max_new_tokens: TokenCount = Field(128, ge=1)  # longest continuation
    temperature: float = Field(1.0, gt=0)  # of sampling; the objective has its own
    top_p: float = Field(1.0, gt=0, le=1)  # of sampling


class DistillSettings(Settings):
    """Stage 1 as `hmf prime` runs it."""

    data: DataSettings = Field(default_factory=DataSettings)
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    training: ParallelSettings
    on_policy: OnPolicySettings | None = None  # left out: train on given rows

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSettings:
        require_none(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.on_policy is not None:
            if self.data.prepared is not None:
                yield "on_policy draws its prompts from data.text and data.tasks; leave out data.prepared"
            elif self.data.sequence_length - self.on_policy.max_new_tokens < 16:
                yield "on_policy.max_new_tokens must leave 16 of data.sequence_length for the prompt"
            if self.objective.layerwise_steps:
                yield "objective.layerwise_steps must be 0 with on_policy; train layer by layer first"
            if self.training.strategy != "ddp" or self.training.sequence_parallel > 1:
                yield "on_policy needs training.strategy ddp and training.sequence_parallel 1"
        yield from indivisible(self.data, self.training)


def indivisible(data: DataSettings, training: ParallelSettings) -> Iterator[str]:
    """The error of rows that do not divide among the processes which share them."""
    chunks = 2 * training.sequence_parallel
    if chunks > 2 and data.prepared is None and data.sequence_length % chunks:
        yield f"data.sequence_length must be a multiple of {chunks}, twice training.sequence_parallel"


class DistillRecipe(DistillSettings):
    """`hmf distill`: a fused checkpoint `model` is trained into `output`."""

    model: Path  # fused checkpoint, from `hmf init`
    output: Path  # run folder
    seed: Seed = 0  # of all random numbers


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]
# The keys of each scaling that a recipe can give: those that it needs, and the others.
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
    """Scaled positions, under transformers' names; "default" takes a scaling away."""

    rope_type: Literal["default", "linear", "yarn", "llama3"]  # each takes keys of its own alone
    factor: AtLeastOne | None = None  # from the length before any scaling
    original_max_position_embeddings: TokenCount | None = Field(None, ge=1)  # left out: as the model has it
    beta_fast: Positive | None = None  # of yarn
    beta_slow: Positive | None = None  # of yarn
    attention_factor: Positive | None = None  # of yarn
    mscale: NotNegative | None = None  # of yarn
    mscale_all_dim: NotNegative | None = None  # of yarn
    truncate: bool | None = None  # of yarn
    low_freq_factor: Positive | None = None  # of llama3
    high_freq_factor: Positive | None = None  # of llama3

    @model_validator(mode="after")
    def _keys_of_its_type(self) -> RopeScaling:
        needed, optional = ROPE_KEYS[self.rope_type]
        given = self.model_dump(exclude={"rope_type"}, exclude_none=True)
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{self.rope_type} needs {', '.join(missing)}")
        if extra := [name for name in given if name not in (*needed, *optional)]:
            raise ValueError(f"{self.rope_type} has no {', '.join(extra)}")
        low, high = (
            (self.beta_slow, self.beta_fast)
            if self.rope_type == "yarn"
            else (self.low_freq_factor, self.high_freq_factor)
        )
        if low is not None and high is not None and low >= high:
            raise ValueError("the low (slow) factor must be below the high (fast) one")
        return self


class RopeSettings(Settings):
    """What becomes of the attention layers' rotary positions; what is left out stays as the model has it."""

    theta: Positive | None = None  # base of the frequencies
    max_position_embeddings: TokenCount | None = Field(None, ge=1)  # longest context
    scaling: RopeScaling | None = None  # left out: as the model has it


class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685) on the linear layers of frozen groups, merged into them at the end."""

    groups: list[TrainableGroup] = Field(["attention", "mlp"], min_length=1)  # frozen groups that get adapters
    rank: int = Field(16, ge=1)  # of the adapters
    alpha: float = Field(32.0, gt=0)  # adapters are scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # on the adapters' inputs
    learning_rate: float = Field(gt=0)  # of the adapters


class FinetuneRecipe(Settings):
    """`hmf finetune`: Stage 2 of a plain Hybrid `model` into `output`/model.

    # see above
    method: "cpt" goes on with pretraining, "sft" learns the supervised tokens of `data`, "dpo" prefers one answer of
    each of `pairs`. trainable: learning rate by group of parameters; what is in no group named here is frozen, and
    "all" stands for every group that is not named beside it.
    """

    method: Literal["cpt", "sft", "dpo"]
    model: Path  # Hybrid without a teacher, from `hmf export`, `prime` or `finetune`
    output: Path  # run folder; the result is its `model`
    seed: Seed = 0  # of all random numbers
    data: DataSettings | None = None  # for cpt and sft
    pairs: PairSettings | None = None  # for dpo
    rope: RopeSettings = Field(default_factory=RopeSettings)  # changes to rotary positions
    # learning rate by group
    trainable: dict[TrainableName, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    lora: LoraSettings | None = None  # adapters on frozen groups
    training: ParallelSettings
    dtype: Literal["float32", "bfloat16"] | None = None  # of the result; left out: as `model` is stored

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneRecipe:
        require_none(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[str]:
        wanted, other = ("pairs", "data") if self.method == "dpo" else ("data", "pairs")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            yield f"method {self.method} needs {wanted} and no {other}"
        if not self.trainable and self.lora is None:
            yield "nothing to train; give trainable, for example {mixers: 5e-5, norms: 5e-5}, or lora"
        if "learning_rate" in self.training.model_fields_set:
            yield "training.learning_rate: every group has its own; give them in trainable"
        trained = set(get_args(TrainableGroup)) if "all" in self.trainable else set(self.trainable)
        if self.lora is not None and (both := sorted(trained & set(self.lora.groups))):
            yield f"lora.groups: {', '.join(both)} is trained as a whole; adapters are for frozen groups"
        if self.lora is not None and self.training.strategy == "fsdp2":
            yield "lora needs training.strategy ddp or deepspeed: adapters are merged into whole weights"
        if self.method == "dpo" and self.training.sequence_parallel > 1:
            yield "method dpo needs training.sequence_parallel 1: an answer is scored where all of it is"
        if self.data is not None:
            yield from indivisible(self.data, self.training)


class EvaluateSettings(Settings):
    """Held-out text and generated tasks."""

    tasks: list[str] = Field(default_factory=list)  # generated tasks
    samples: int = Field(50, ge=1)  # prompts of each task
    length: TokenCount = Field(1024, ge=96)  # tokens of the longest prompts and of the text window
    max_new_tokens: TokenCount = Field(160, ge=1)  # longest answer
    text_bytes: int = Field(100_000, ge=0)  # held-out text that is scored
    thinking: bool | None = None  # left out: as the task is defined
    batch_size: int = Field(16, ge=1)  # prompts that are answered together


class PrimeRecipe(Settings):
    """`hmf prime`: init, distill, export and evaluate under one run folder."""

    base: str  # a checkpoint directory, or "teacher" for the embedded one
    base_config: Path | None = None  # folder with its config.json, beside the recipe, to plan while base is not there
    output: Path  # run folder
    seed: Seed = 0  # of all random numbers
    hybrid: HybridSettings  # which layers are replaced, and by what
    select: SelectSettings = Field(default_factory=SelectSettings)  # how hybrid.layers: auto chooses
    distill: DistillSettings  # Stage 1
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)  # scores at the end


def load_recipe(path: str | Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a YAML recipe; HmfError names the file, the key and the fix."""
    return read_recipe(path, kind, overrides)[0]


def read_recipe(path: str | Path, kind: type[Recipe], overrides: Sequence[str] = ()) -> tuple[Recipe, str]:
    """A recipe and its text; `overrides` ("hybrid.mixer=gka", values in YAML) replace what the file says.

    The text is the file's own, or, with overrides, that of a recipe which says the same without them.
    """
    path = Path(path)
    if not path.is_file():
        raise HmfError(f"{path}: no such recipe")
    try:
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text)
    except OSError as error:
        raise HmfError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise HmfError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise HmfError(f"{path}: a recipe is a YAML mapping; it needs the keys {', '.join(kind.model_fields)}")
    for override in overrides:
        _override(content, override)
    if overrides:
        text = yaml.safe_dump(content, sort_keys=False)
    try:
        return kind.model_validate(content, context={"file": path}), text
    except ValidationError as error:
        changed = f" with {' '.join(overrides):.200}" if overrides else ""
        raise HmfError(f"{path}{changed}: {_problems(error, kind)}") from None


def _override(content: dict[str, Any], override: str) -> None:
    """Put the value of "a.b=value" at its place in `content`."""
    name, equals, value = override.partition("=")
    *sections, key = name.split(".")
    if not (equals and key and all(sections)):
        raise HmfError(f"--set {override:.200}: write KEY=VALUE with the key's path, as hybrid.mixer=gka")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise HmfError(f"--set {override:.200}: {section!r} is a value in this recipe and holds no keys")
    try:
        content[key] = parse_yaml(value)
    except ValueError:
        raise HmfError(f"--set {override:.200}: the value is not valid YAML; quote it") from None
    if sections[-1:] == ["training"]:  # a value replaces the file's under its other name too
        for pair in RENAMED.items():
            if key in pair:
                content.pop(pair[key == pair[0]], None)


def _problems(error: ValidationError, kind: type[BaseModel]) -> str:
    """All errors in one line, numbered where there are several."""
    # An unknown key explains a missing one better than the other way round.
    found = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    lines = list(dict.fromkeys(_problem(problem, kind) for problem in found))
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} errors: " + listed((f"({n}) {line}" for n, line in enumerate(lines, 1)), SHOWN, "; ")


def _problem(problem: Any, kind: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        section = _section(kind, problem["loc"][:-1])
        prefix = ".".join(str(part) for part in problem["loc"][:-1])
        name = str(problem["loc"][-1])
        if (present := RENAMED.get(name)) in section.model_fields:
            return f"{prefix}: {name} is the former name of {present}; give {present} alone"
        return f"{prefix + ': ' if prefix else ''}{unknown_name('key', name, section.model_fields)}"
    if problem["type"] == "missing":
        return f"{where}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = f" (got {given!r:.200})" if isinstance(given, str | int | float | bool | type(None)) else ""
    return f"{where + ': ' if where else ''}{message}{shown}"


def _section(kind: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for name in location:
        if isinstance(name, str):  # an item of a list has the section of the list
            annotation: Any = kind.model_fields[name].annotation
            while not isinstance(annotation, type):  # X | None, list[X]
                annotation = get_args(annotation)[0]
            kind = annotation
    return kind
