# SPDX-License-Identifier: Apache-2.0
"""What a recipe's reader reports, and the names that it takes."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from hmf.config.data import DataRecipe
from hmf.config.recipes import SHOWN, load_recipe
from hmf.config.runs import DistillRecipe, FinetuneRecipe, PrimeRecipe
from hmf.config.strict import parse_yaml
from hmf.config.training import RENAMED, OptimiserSettings
from hmf.errors import HmfError, print_once
from hmf.training.pretrain import PretrainOptimiserSettings
from hmf.training.run import arguments

WRONG = {  # section, key and value, and the words of the error
    ("training", "precision"): ("int4", "training.precision: Input should be"),
    ("training", "learning_rate"): (
        -1,
        "training.learning_rate: Input should be greater than or equal to 0.000000000001 (got -1)",
    ),
    ("training", "divergence_factor"): (0.5, "training.divergence_factor: losses that do not grow would stop the run"),
    ("training", "weight_decay"): (1e300, "training.weight_decay: Input should be less than or equal to 1000"),
    ("objective", "kl"): (1e300, "objective.kl.0: Input should be less than or equal to 1000000"),
    ("training", "warmpu_steps"): (3, "training: unknown key 'warmpu_steps'; did you mean 'warmup_steps'?"),
    ("data", "sequence_length"): ("long", "data.sequence_length: 'long' is not a number of tokens"),
    ("objective", "kl_top_k"): (0, "objective.kl_top_k: Input should be greater than or equal to 1 (got 0)"),
    ("objective", "kl_temperature"): (1e300, "objective.kl_temperature: Input should be less than or equal to 1000"),
    ("objective", "kl_drection"): ("forward", "objective: unknown key 'kl_drection'; did you mean 'kl_direction'?"),
}
TRAINING = {"max_steps": 1, "per_device_train_batch_size": 1}


def error_of(folder, kind, content):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(HmfError) as caught:
        load_recipe(file, kind)
    line = str(caught.value)
    assert line.startswith(f"{file}: ") and "\n" not in line
    return line


@given(st.sets(st.sampled_from(sorted(WRONG)), min_size=1))
def test_every_error_of_a_recipe_is_in_the_one_line(tmp_path_factory, chosen):
    content = {"model": "a", "output": "b", "training": dict(TRAINING), "data": {}, "objective": {}}
    for section, key in chosen:
        content[section][key] = WRONG[section, key][0]
    line = error_of(tmp_path_factory.mktemp("recipe"), DistillRecipe, content)
    assert all(WRONG[place][1] in line for place in chosen)
    assert (f"{len(chosen)} errors: (1) " in line) == (len(chosen) > 1)


def test_keys_that_do_not_fit_together_are_all_named(tmp_path):
    content = {"method": "dpo", "model": "a", "output": "b", "data": {}, "training": {**TRAINING, "learning_rate": 1}}
    line = error_of(tmp_path, FinetuneRecipe, content)
    for words in ("method dpo needs pairs and no data", "no parameters are trained", "each group has its own"):
        assert words in line


def test_a_file_of_errors_alone_is_cut(tmp_path):
    line = error_of(tmp_path, DistillRecipe, {f"wrong {number}": 1 for number in range(100)})
    assert "103 errors: (1) " in line and f"({SHOWN}) " in line and line.endswith(f" and {103 - SHOWN} more")


SWITCHES = ["yes", "no", "on", "off", "true", "false"]
NUMBERS = [
    "training.max_steps",
    "training.learning_rate",
    "data.sequence_length",
    "data.text_share",
    "seed",
    "objective.kl_top_k",
]


@pytest.mark.parametrize("key", NUMBERS)
@given(value=st.sampled_from(SWITCHES))
def test_a_switch_is_not_a_number(tmp_path_factory, key, value):
    """pydantic takes true for 1, so `kl_top_k: yes` would be a run with the one most likely token."""
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text("{model: a, output: b, training: {max_steps: 1, per_device_train_batch_size: 1}}")
    with pytest.raises(HmfError, match=f"{key}: a number is expected, not true or false"):
        load_recipe(file, DistillRecipe, [f"{key}={value}"])
    read = load_recipe(file, DistillRecipe, [f"training.gradient_checkpointing={value}", "objective.pre_lm_head=yes"])
    assert read.training.gradient_checkpointing is (value in ("yes", "on", "true"))
    assert read.objective.pre_lm_head == {0: 1.0}  # a documented meaning


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (FinetuneRecipe, "trainable={mixers: 1e-4, norms: yes}", "trainable: norms: a number is expected, not true"),
        (FinetuneRecipe, "data.tasks={recall: on}", "data.tasks: recall: a number is expected, not true or false"),
        (DistillRecipe, "objective.kl={0: 1, 9: off}", "objective.kl: 9: a number is expected, not true or false"),
        (PrimeRecipe, "hybrid.layers=[2, yes]", "hybrid.layers: 1: a number is expected, not true or false"),
        (DistillRecipe, "data.prepared=", "data: prepared: has no value; give the folder of the prepared rows"),
        (DistillRecipe, "output=''", "output: a path is expected, not an empty text"),
    ],
)
def test_a_switch_among_numbers_and_a_place_without_a_name_are_refused(tmp_path, kind, change, said):
    """`norms: yes` would be a learning rate of 1, `prepared:` the standard library, and an empty output this folder."""
    file = tmp_path / "recipe.yaml"
    file.write_text("{output: b}")
    with pytest.raises(HmfError, match=re.escape(said)):
        load_recipe(file, kind, [change])


def test_a_weight_may_have_an_exponent(tmp_path):
    """YAML 1.1 reads 1e-2 as text."""
    file = tmp_path / "recipe.yaml"
    file.write_text("{model: a, output: b, objective: {kl: 1e-2}, training: {max_steps: 1, rows_per_step: 1}}")
    assert load_recipe(file, DistillRecipe).objective.kl == {0: 0.01}


@given(st.integers(0, 10**6), st.sampled_from(["0{}", "00{}", "{}:30", "{}_0"]))
def test_a_number_is_the_decimal_one_that_is_written_or_refused(number, written):
    """YAML 1.1 reads 0512 in base 8 and 5:12 in base 60."""
    text = written.format(number)
    if yaml.safe_load(text) not in (text, int(text.partition(":")[0])):
        with pytest.raises(ValueError, match=f"{text} in line 1 is a number in base"):
            parse_yaml(f"seed: {text}")
    for other in (f"'{text}'", f"x{text}"):
        assert parse_yaml(f"name: {other}") == {"name": other.strip("'")}


@pytest.mark.parametrize("line", ["on: 3", "data: {no: 3}", "training: {y: 1, yes: 2}"])
def test_a_key_that_yaml_reads_as_a_switch_is_named(tmp_path, line):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: a\n{line}\n")
    key = next(key for key in ("on", "no", "yes") if f"{key}:" in line)
    with pytest.raises(HmfError, match=f"the key '{key}' in line 2 means true or false in YAML; quote it"):
        load_recipe(file, DistillRecipe)


def test_a_date_among_variables_of_the_template_is_to_be_quoted(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("sources: [{path: a.jsonl, shape: alpaca, chat_template_kwargs: {date_string: 2024-07-26}}]")
    with pytest.raises(HmfError, match=r"sources.0.chat_template_kwargs.date_string: a value of JSON .*; quote it"):
        load_recipe(file, DataRecipe)


# ---- names

FORMER = {"steps": 7, "rows_per_step": 3, "schedule": "cosine"}
PRESENT = {RENAMED[name]: value for name, value in FORMER.items()}


def prime_recipe(folder, training):
    file = folder / "recipe.yaml"
    content = {"base": "teacher", "output": "b", "hybrid": {"ratio": 0.5}, "distill": {"training": training}}
    file.write_text(yaml.safe_dump(content))
    return file


@settings(deadline=None)  # each example reads several files
@given(st.sets(st.sampled_from(sorted(RENAMED))))
def test_former_names_mean_what_the_present_ones_do(tmp_path_factory, former):
    folder = tmp_path_factory.mktemp("recipe")
    mixed = {name if name in former else RENAMED[name]: value for name, value in FORMER.items()}
    present = load_recipe(prime_recipe(folder, PRESENT), PrimeRecipe)
    assert load_recipe(prime_recipe(folder, mixed), PrimeRecipe) == present
    # --set takes both names, and replaces what the file says under either.
    for given_names in (FORMER, PRESENT):
        values = [f"distill.training.{name}={value}" for name, value in given_names.items()]
        file = prime_recipe(folder, dict.fromkeys(mixed, 1))
        assert load_recipe(file, PrimeRecipe, values) == present


def test_former_names_are_told_once_with_the_file_and_the_present_names(tmp_path, capsys):
    print_once.cache_clear()
    file = prime_recipe(tmp_path, FORMER)
    for _ in range(2):
        load_recipe(file, PrimeRecipe)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hmf: {file}: training: ")
    assert all(f"{old} is now {new}" in line for old, new in RENAMED.items())
    load_recipe(prime_recipe(tmp_path, PRESENT), PrimeRecipe)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", RENAMED)
def test_a_former_name_beside_the_present_one_is_refused(name, tmp_path):
    training = PRESENT | {name: FORMER[name], "weight_decay": -1}
    line = error_of(tmp_path, DistillRecipe, {"model": "a", "output": "b", "training": training})
    assert f"training: {name} is the former name of {RENAMED[name]}; give only {RENAMED[name]}" in line
    assert "2 errors: " in line and "training.weight_decay: " in line


def test_the_trainer_gets_the_values_under_its_own_names(tmp_path):
    chosen = {
        "logging_steps": 3,
        "save_total_limit": 5,
        "save_steps": 4,
        "run_name": "one",
        "lr_scheduler_type": "linear",
    }
    args = arguments(OptimiserSettings(**PRESENT | chosen), tmp_path, 0, TrainingArguments)
    assert {name: getattr(args, name) for name in chosen} == chosen
    assert (args.max_steps, args.per_device_train_batch_size) == (7, 3)
    for kind, kept, logged in ((OptimiserSettings, 2, 10), (PretrainOptimiserSettings, 1, 50)):
        args = arguments(kind(**PRESENT), tmp_path, 0, TrainingArguments)
        assert (args.save_total_limit, args.logging_steps) == (kept, logged)


@pytest.mark.parametrize(("ratio", "steps"), [(0, 0), (0.1, 1), (0.5, 4), (1, 7)])
def test_a_warmup_by_its_share_of_the_steps(ratio, steps, tmp_path):
    settings = OptimiserSettings(**PRESENT, warmup_ratio=ratio)
    args = arguments(settings, tmp_path, 0, TrainingArguments)
    assert args.get_warmup_steps(settings.max_steps) == steps
    training = {**PRESENT, "warmup_ratio": ratio, "warmup_steps": 2}
    line = error_of(tmp_path, DistillRecipe, {"model": "a", "output": "b", "training": training})
    assert "training: give warmup_steps or warmup_ratio, not both" in line


@given(st.integers(0, 100), st.integers(1, 5000))
def test_a_share_of_the_steps_is_rounded_up_only_where_it_is_no_whole_number(percent, steps):
    settings = OptimiserSettings(max_steps=steps, per_device_train_batch_size=1, warmup_ratio=percent / 100)
    assert settings.warmup == -(-percent * steps // 100)


def test_unknown_gpus_are_refused_before_a_training(tmp_path):
    with pytest.raises(HmfError, match=r"training\.gpus: unknown GPU 'h20x8'; did you mean"):
        arguments(OptimiserSettings(**PRESENT, gpus="h20x8"), tmp_path, 0, TrainingArguments)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_warmup_as_long_as_the_run_is_named(steps, tmp_path, capsys):
    print_once.cache_clear()
    training = OptimiserSettings(max_steps=steps, per_device_train_batch_size=1, warmup_steps=steps)
    arguments(training, tmp_path, 0, TrainingArguments)
    effect = {1: "step is not shorter than the run of 1, so the learning rate is 0", 2: "the learning rate only rises"}
    assert effect[steps] in capsys.readouterr().err


def test_bf16_is_bfloat16():
    assert OptimiserSettings(**PRESENT, precision="bf16") == OptimiserSettings(**PRESENT, precision="bfloat16")


@pytest.mark.parametrize("rate", [0, 1e-300, 1e-40, 1e300, float("nan"), float("inf")])
def test_learning_rates_move_weights(tmp_path, rate):
    rates = {"trainable": {"mixers": rate}, "lora": {"groups": ["mlp"], "learning_rate": rate}}
    content = {"method": "cpt", "model": "a", "output": "b", "data": {}, "training": TRAINING} | rates
    line = error_of(tmp_path, FinetuneRecipe, content)
    assert "trainable.mixers: Input should be" in line and "lora.learning_rate: Input should be" in line
