# SPDX-License-Identifier: Apache-2.0
"""The keys of the recipes of runs: `hmf distill`, `hmf finetune` and `hmf prime`. `recipes.py` reads the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from hmf.errors import HmfError, unknown_name

from .layers import LAYER_KINDS
from .pattern import Pattern, mixer_symbol
from .places import EvalPairSettings, PairSettings
from .rope import RopeSettings
from .selection import SelectSettings
from .strict import Rate, Seed, Settings, TokenCount, Tokens, require_none
from .training import OptimiserSettings, ParallelSettings

TrainableGroup = Literal["mixers", "norms", "attention", "mlp", "embeddings"]
TrainableName = Literal["mixers", "norms", "attention", "mlp", "embeddings", "all"]
LayerTarget = Literal["none", "mixer", "decoder", "residuals", "all"]
Share = Annotated[float, Field(ge=0, le=1)]


class CalibrationSettings(Settings):
    """Calibrated start: each new layer is fitted, on its own, to the output of the attention that it replaces."""

    # rows of the training data; a quarter is held out, and a fit is kept only if it lowers the error there
    rows: int = Field(16, ge=4, le=2**16)
    # steps of Adam on decay, gates and convolutions; 0: only the output projection is fitted
    steps: int = Field(100, ge=0, le=10**9)
    # learning rate of Adam at the first step; for matrices with more than 256 inputs, it is multiplied by 256 / inputs
    learning_rate: Rate = 0.01


class HybridSettings(Settings):
    """Which layers are replaced, and by which mixers. Exactly one of `pattern`, `layers` and `ratio` is given; with the
    last two, `mixer` is the type of the new layers.

    With `layers: auto` the section `select` chooses the layers, and `ratio` says how many are replaced.
    """

    mixer: str = "gdn"  # layer type: gdn, kda, gka, mamba2, bmojo or swa
    ratio: float | None = None  # share of the attention layers to replace, spread evenly
    # indices of the layers to replace, from 0; auto: the section select chooses as many layers as ratio says
    layers: list[int] | Literal["auto"] | None = None
    pattern: str | None = None  # one symbol per layer, joined by -, for example *-GDN-*-GDN
    # options by layer type; see the end of docs/recipe-keys.md
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    # initial weights of short convolutions; identity: each convolution returns its current token
    conv_start: Literal["random", "identity"] = "random"
    # initial weights of mixers. copied: tensors of the attention; calibrated: then fitted to the attention's output on
    # rows of distill.data
    start: Literal["copied", "calibrated"] = "copied"
    # settings of the fit, with start: calibrated
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings)

    @model_validator(mode="after")
    def _one_choice(self) -> HybridSettings:
        present = [name for name in ("ratio", "layers", "pattern") if getattr(self, name) is not None]
        if self.layers == "auto" and present != ["ratio", "layers"]:
            raise ValueError("layers: auto needs ratio, the share of layers to replace, and no pattern")
        if self.layers != "auto" and len(present) != 1:
            raise ValueError(f"give exactly one of ratio, layers and pattern, not {' and '.join(present) or 'none'}")
        if self.start != "calibrated" and "calibration" in self.model_fields_set:
            raise ValueError("calibration is read with start: calibrated; set that, or leave calibration out")
        return self

    def layer_pattern(self, num_layers: int, attention: Sequence[int] | None = None) -> Pattern:
        """The pattern for a base with `num_layers` layers. HmfError when the settings do not fit that number.

        attention: the indices of the layers that are attention, of which `ratio` is a share; None: all are.
        """
        if self.pattern is not None:
            pattern = replace(Pattern.parse(self.pattern, num_layers, source="pattern"), fused=False)
            if not pattern.replaced:
                raise HmfError("pattern: no layer is replaced; name at least one mixer")
            if (
                self.mixer != type(self).model_fields["mixer"].default
                and mixer_symbol(self.mixer) not in pattern.symbols
            ):
                raise HmfError(
                    f"mixer: {self.mixer} is in no layer of the pattern {pattern}, which names the types itself; leave "
                    "mixer out"
                )
            return pattern
        if self.layers == "auto":
            raise HmfError("layers: auto is chosen when `hmf prime` runs; give ratio alone to spread the layers evenly")
        return Pattern.generate(num_layers, self.mixer, self.ratio, self.layers, attention)

    def spread_evenly(self) -> HybridSettings:
        """These settings with `ratio` alone where they have `layers: auto`: as many layers are replaced."""
        return self.model_copy(update={"layers": None}) if self.layers == "auto" else self

    @property
    def calibrated(self) -> CalibrationSettings | None:
        """The settings of a calibrated start; None with any other."""
        return self.calibration if self.start == "calibrated" else None

    def options_by_key(self) -> dict[str, dict[str, Any]]:
        """`options` by the keys of config.json."""
        known = {kind.name: kind.config_key for kind in LAYER_KINDS.values()}
        for name in self.options:
            if name not in known:
                raise HmfError(f"options: {unknown_name('layer type', name, known)}")
        return {known[name]: dict(values) for name, values in self.options.items()}


class DataSettings(Settings):
    """Training data: text and generated conversations in rows of `sequence_length` tokens, or `prepared`, rows that
    `hmf data prepare` wrote."""

    # output folder of `hmf data prepare`; given in place of all other keys of this section
    prepared: Path | None = None
    text: str = "stdlib"  # "stdlib", or a folder or file with .py, .txt or .md text
    sequence_length: Tokens = 1024  # tokens in a row
    # share of rows that hold text only; the other rows hold tasks, too. Required with tasks
    text_share: float = Field(1.0, ge=0, le=1)
    # weights of the generated tasks, by name; they need a sequence_length of at least 96
    tasks: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_origin(self) -> DataSettings:
        if self.prepared is not None and (others := sorted(self.model_fields_set - {"prepared"})):
            raise ValueError(f"prepared: the rows are complete and take no other keys; leave out {', '.join(others)}")
        if self.prepared is None and "prepared" in self.model_fields_set and "text" not in self.model_fields_set:
            raise ValueError("prepared: has no value; give the folder of the prepared rows, or give text in its place")
        return self

    @model_validator(mode="after")
    def _tasks_are_read(self) -> DataSettings:
        if self.tasks and not 0 < sum(self.tasks.values()) < math.inf:
            raise ValueError("tasks: the weights must have a finite sum above 0; change them, or leave tasks out")
        if self.tasks and "text_share" not in self.model_fields_set:
            raise ValueError(
                "tasks: text_share, the share of rows without tasks, is 1 if it is left out; give it, for example 0.5"
            )
        return self


def _as_schedule(value: Any) -> Any:
    return {0: value} if isinstance(value, int | float | str) else value  # YAML reads 1e-3 as text


# Weights by step: linear between the given steps, constant before the first and after the last. A number is a constant
# weight.
Schedule = Annotated[
    dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)]],
    Field(min_length=1),
    BeforeValidator(_as_schedule),
]


def weight_at(schedule: Mapping[int, float], step: int) -> float:
    """The weight at an optimiser step. It depends on nothing else, so a resumed run has the same weights."""
    steps = sorted(schedule)
    if step <= steps[0] or step >= steps[-1]:
        return schedule[steps[0] if step <= steps[0] else steps[-1]]
    after = next(later for later in steps if later > step)
    before = steps[steps.index(after) - 1]
    share = (step - before) / (after - before)
    return (1 - share) * schedule[before] + share * schedule[after]


class ObjectiveSettings(Settings):
    """Stage 1's loss: MSE of the hidden states before the LM head, MSE of layer outputs, and KL divergence of the
    logits, each with a weight or a schedule of weights.

    In the first `layerwise_steps` steps, each mixer is trained on its own instead, on the inputs of the teacher's
    layers.
    """

    layerwise_steps: int = Field(0, ge=0, le=10**9)  # number of first steps in which each mixer is trained on its own
    pre_lm_head: Schedule = {0: 1.0}  # weight of the MSE before the LM head; false is 0, true is 1
    # layer outputs that are compared; residuals: those of mixers and MLPs; all: these and those of decoder layers
    layers: LayerTarget = "none"
    layers_weight: Schedule = {0: 1.0}  # weight of the MSE of layer outputs
    kl: Schedule = {0: 0.0}  # weight of the KL divergence of next-token distributions
    # direction of the divergence; forward: KL(teacher, student); reverse: KL(student, teacher)
    kl_direction: Literal["forward", "reverse"] = "forward"
    # tokens on which the divergence is computed; supervised: those with a label
    kl_tokens: Literal["all", "supervised"] = "all"
    # number of the teacher's most likely tokens that are compared; all others count as one outcome. Left out: all
    kl_top_k: int | None = Field(None, ge=1)
    # temperature that divides the logits; the term is multiplied by its square
    kl_temperature: float = Field(1.0, ge=1e-3, le=10**3)
    # weight of tokens where the student's likeliest token is not the teacher's, relative to the other tokens
    kl_differing_weight: float = Field(1.0, gt=0, le=10**6)
    # tokens whose logits are computed at a time; left out: chosen by the size of the vocabulary
    kl_chunk_size: TokenCount | None = Field(None, ge=1)

    def weights_at(self, step: int) -> dict[str, float]:
        """Weights of the terms pre_lm_head, layers and kl at a step."""
        return {
            "pre_lm_head": weight_at(self.pre_lm_head, step),
            "layers": weight_at(self.layers_weight, step) if self.layers != "none" else 0.0,
            "kl": weight_at(self.kl, step),
        }

    @model_validator(mode="after")
    def _terms_are_on(self) -> ObjectiveSettings:
        # A term that its own key turns off may keep its other keys, so that `--set objective.kl=0` is enough.
        for term in ("kl", "layers"):
            unread = sorted(name for name in self.model_fields_set if name.startswith(f"{term}_"))
            if unread and term not in self.model_fields_set:
                raise ValueError(f"{', '.join(unread)}: read with {term}, which is off by default; give {term} too")
        return self

    @model_validator(mode="after")
    def _always_something(self) -> ObjectiveSettings:
        # Between two of these steps, all weights are linear: a sum that is positive at both ends is so throughout.
        first = self.layerwise_steps
        for step in sorted({first, *(s for s in (*self.pre_lm_head, *self.layers_weight, *self.kl) if s > first)}):
            if not any(self.weights_at(step).values()):
                raise ValueError(f"all weights are 0 at step {step}; give pre_lm_head, kl or layers a positive weight")
        return self


class OnPolicySettings(Settings):
    """Stage 1 on texts that the student generates: it continues prompts from `data`, up to `data.sequence_length`."""

    max_new_tokens: TokenCount = Field(128, ge=1)  # largest number of tokens of a continuation
    temperature: float = Field(1.0, ge=1e-6, le=10**3)  # temperature of sampling, independent of kl_temperature
    top_p: float = Field(1.0, gt=0, le=1)  # top-p of sampling


class DistillSettings(Settings):
    """Stage 1 in `hmf prime`."""

    data: DataSettings = Field(default_factory=DataSettings)  # training data
    # data to evaluate on, with training.eval_strategy; left out: rows held out of data
    eval_data: DataSettings | None = None
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)  # terms of the loss
    training: ParallelSettings  # optimiser, log, checkpoints, processes
    # training on texts that the student generates; left out: training on the rows of data
    on_policy: OnPolicySettings | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> DistillSettings:
        require_none(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.on_policy is not None:
            if self.data.prepared is not None:
                yield "on_policy takes its prompts from data.text and data.tasks; leave out data.prepared"
            elif self.data.sequence_length - self.on_policy.max_new_tokens < 16:
                yield "on_policy.max_new_tokens must be at most data.sequence_length - 16, to leave room for a prompt"
            if self.objective.layerwise_steps:
                yield "objective.layerwise_steps must be 0 with on_policy; train layer by layer in an earlier run"
            if self.training.strategy != "ddp" or self.training.sequence_parallel > 1:
                yield "on_policy needs training.strategy ddp and training.sequence_parallel 1"
            if self.training.torch_compile:
                yield "on_policy is not supported with training.torch_compile; leave one of them out"
            if self.training.eval_strategy != "no":
                yield "on_policy needs training.eval_strategy no: its loss is that of texts written at the step"
        yield from indivisible(self.data, self.training)
        yield from evaluation_conflicts(self.data, self.eval_data, self.training)


def indivisible(data: DataSettings, training: ParallelSettings, key: str = "data") -> Iterator[str]:
    """The error of rows that do not divide among the processes which share them."""
    chunks = 2 * training.sequence_parallel
    if chunks > 2 and data.prepared is None and data.sequence_length % chunks:
        yield f"{key}.sequence_length must be a multiple of {chunks}, twice training.sequence_parallel"


def evaluation_conflicts(
    data: DataSettings, eval_data: DataSettings | None, training: OptimiserSettings
) -> Iterator[str]:
    """What is wrong with the epochs of `data` and with the rows of an evaluation."""
    if data.prepared is None:
        for key, value in (("num_train_epochs", training.num_train_epochs), ("eval_strategy", training.eval_strategy)):
            if value not in (None, "no", "steps"):
                yield f"training.{key}: rows of text and tasks are drawn without end and have no epochs; " + (
                    "give max_steps, or data.prepared" if key == "num_train_epochs" else "give steps, or data.prepared"
                )
    if eval_data is None:
        return
    if training.eval_strategy == "no":
        yield "eval_data is read with training.eval_strategy steps or epoch; set that, or leave eval_data out"
    if data.prepared is not None and eval_data.prepared is not None and data.prepared == eval_data.prepared:
        yield "eval_data.prepared is what training reads; leave eval_data out, and rows are held out of it"
    if isinstance(training, ParallelSettings):
        yield from indivisible(eval_data, training, "eval_data")


class DistillRecipe(DistillSettings):
    """`hmf distill`: train the fused checkpoint `model`, and write the result under `output`."""

    model: Path  # fused checkpoint, from `hmf init`
    output: Path  # run folder
    seed: Seed = 0  # seed of all random numbers


class LoraSettings(Settings):
    """Low-rank adapters (arXiv 2106.09685) on the linear layers of frozen groups. They are merged at the end."""

    groups: list[TrainableGroup] = Field(["attention", "mlp"], min_length=1)  # frozen groups that get adapters
    rank: int = Field(16, ge=1, le=2**16)  # rank of the adapters
    alpha: float = Field(32.0, ge=1e-6, le=10**6)  # adapters are scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # dropout of the adapters' inputs
    learning_rate: Rate  # learning rate of the adapters


class EvaluateSettings(Settings):
    """Evaluation on held-out text and generated tasks."""

    tasks: list[str] = Field(default_factory=list)  # names of generated tasks
    samples: int = Field(50, ge=1, le=10**6)  # prompts per task
    # length of the longest prompts and of the windows of text, in tokens
    length: TokenCount = Field(1024, ge=96, le=2**24)
    max_new_tokens: TokenCount = Field(160, ge=1, le=2**24)  # largest number of tokens of an answer
    text_bytes: int = Field(100_000, ge=0)  # bytes of held-out text that are scored
    thinking: bool | None = None  # whether prompts enable thinking; left out: true
    batch_size: int = Field(16, ge=1, le=2**16)  # prompts per batch


class FinetuneRecipe(Settings):
    """`hmf finetune`: Stage 2 of the plain Hybrid `model`. The result is written to `output`/model.

    The method "cpt" continues pretraining, "sft" trains on the supervised tokens of `data`, and "dpo" trains on the
    preferences in `pairs`. Groups of parameters that `trainable` does not name are frozen. The group "all" stands for
    every group that is not named beside it.
    """

    method: Literal["cpt", "sft", "dpo"]  # continued pretraining, supervised fine-tuning or preference optimisation
    model: Path  # plain Hybrid, from `hmf export`, `prime` or `finetune`
    output: Path  # run folder; the result is its `model`
    seed: Seed = 0  # seed of all random numbers
    data: DataSettings | None = None  # training data, for cpt and sft
    pairs: PairSettings | None = None  # preference pairs, for dpo
    # data to evaluate on, with training.eval_strategy; left out: rows held out of data
    eval_data: DataSettings | None = None
    eval_pairs: EvalPairSettings | None = None  # pairs to evaluate on, for dpo; left out: rows held out of pairs
    rope: RopeSettings = Field(default_factory=RopeSettings)  # changes to rotary positions
    # learning rate of each trained group
    trainable: dict[TrainableName, Rate] = Field(default_factory=dict)
    lora: LoraSettings | None = None  # adapters on frozen groups
    training: ParallelSettings  # optimiser, log, checkpoints, processes
    dtype: Literal["float32", "bfloat16"] | None = None  # dtype of the result; left out: the dtype of `model`
    evaluate: EvaluateSettings | None = None  # evaluation of the result and of `model` at the end; left out: none

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneRecipe:
        require_none(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[str]:
        required, excluded = ("pairs", "data") if self.method == "dpo" else ("data", "pairs")
        if getattr(self, required) is None or getattr(self, excluded) is not None:
            yield f"method {self.method} needs {required} and no {excluded}"
        if not self.trainable and self.lora is None:
            yield "no parameters are trained; give trainable, for example {mixers: 5e-5, norms: 5e-5}, or lora"
        if "learning_rate" in self.training.model_fields_set:
            yield "training.learning_rate: each group has its own learning rate; give them in trainable"
        trained = set(get_args(TrainableGroup)) if "all" in self.trainable else set(self.trainable)
        if self.lora is not None and (both := sorted(trained & set(self.lora.groups))):
            names = ", ".join(both)
            yield f"lora.groups: {names} is in trainable too, but adapters are for frozen groups; remove one of them"
        if self.lora is not None and self.training.strategy == "fsdp2":
            yield "lora needs training.strategy ddp or deepspeed, because adapters are merged into unsharded weights"
        if self.method == "dpo" and self.training.sequence_parallel > 1:
            yield "method dpo needs training.sequence_parallel 1, because an answer is scored on one process"
        if self.data is not None:
            yield from indivisible(self.data, self.training)
            yield from evaluation_conflicts(self.data, self.eval_data, self.training)
        if self.data is None and self.eval_data is not None:
            yield "eval_data is for cpt and sft; give eval_pairs"
        if self.eval_pairs is not None and self.pairs is None:
            yield "eval_pairs is for dpo; give eval_data"
        if self.eval_pairs is not None and self.training.eval_strategy == "no":
            yield "eval_pairs is read with training.eval_strategy steps or epoch; set that, or leave eval_pairs out"


class PrimeRecipe(Settings):
    """`hmf prime`: init, distill, export and evaluate in one run folder."""

    base: str  # a checkpoint directory, or "teacher" for the embedded one
    # folder with the config.json of base, relative to the recipe; `hmf plan-training` reads it if base is not a folder
    base_config: Path | None = None
    text_only: bool = False  # use the language model of a base that also reads images
    output: Path  # run folder
    seed: Seed = 0  # seed of all random numbers
    hybrid: HybridSettings  # which layers are replaced, and by what
    select: SelectSettings = Field(default_factory=SelectSettings)  # how layers are chosen, with hybrid.layers: auto
    distill: DistillSettings  # Stage 1
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)  # evaluation at the end
