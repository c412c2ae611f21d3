# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it: help, examples, and bad input in one line with exit code 2."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig
from typer.testing import CliRunner

import hmf
from hmf.cli import app, main
from hmf.config.pattern import Pattern
from hmf.config.recipes import read_recipe, read_run
from hmf.config.runs import EvaluateSettings, PrimeRecipe
from hmf.config.strict import parse_tokens
from hmf.errors import HmfError
from hmf.pipeline import scored
from hmf.priming.stage0 import make_stage0
from tests.conftest import ROOT
from tests.training.cutting import make_tiny_stage0

DATA = {"text": str(ROOT / "docs"), "sequence_length": 96}  # small: the standard library takes seconds to encode
PRIME = {
    "base": "teacher",
    "hybrid": {"mixer": "gdn", "ratio": 0.5},
    "distill": {"training": {"max_steps": 1, "per_device_train_batch_size": 1}, "data": DATA},
}


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hmf", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def commands() -> list[str]:
    groups = [(f"{info.name} " if info.name else "", info.typer_instance) for info in app.registered_groups]
    return [
        prefix + (info.name or info.callback.__name__) for prefix, group in groups for info in group.registered_commands
    ]


@pytest.mark.parametrize("command", commands())
def test_every_command_explains_itself_with_an_example(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"hmf {command} " in result.output.split("Examples:")[1]
    recipes = [word for word in result.output.replace("`", " ").split() if word.startswith("recipes/")]
    assert all((ROOT / recipe).exists() for recipe in recipes), recipes


@pytest.mark.parametrize("command", [["plan", "--gpu", "h100"], ["plan", "--gpu", "h100", "--ratio", "0.5"]])
@pytest.mark.parametrize("model_type", ["bloom", "mamba", "paligemma", "clip_vision_model"])
def test_a_model_that_cannot_be_planned_is_named(monkeypatch, capsys, tmp_path, command, model_type):
    """Their configs have no max_position_embeddings, which was read first."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    code, _, err = run(monkeypatch, capsys, command[0], str(tmp_path), *command[1:])
    assert code == 2
    assert re.fullmatch(rf"hmf: {tmp_path}/config.json: model_type '\w+' (cannot be a base|is not among).*\n", err)


@pytest.mark.parametrize("command", ["", "data", "bench", *commands()])
def test_help_is_whole_at_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = CliRunner().invoke(app, [*command.split(), "--help"]).output
    assert "…" not in output and not re.search(r"\w\.\.\.$", output, re.MULTILINE)
    options = [parameter for parameter in command_object(command).params if parameter.param_type_name == "option"]
    names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    assert names <= set(re.findall(r"-[\w-]+", output))


def command_object(path: str):
    found = typer.main.get_command(app)
    for name in path.split():
        found = found.commands[name]
    return found


@pytest.mark.parametrize("command", commands())
def test_json_is_a_flag_wherever_it_is_an_option(command):
    for parameter in command_object(command).params:
        assert "--json" not in parameter.opts or parameter.is_flag


WRONG = [
    *(
        f"{name} nowhere{rest}"
        for name, rest in (
            ("init", " --ratio 0.5 --out new"),
            ("export", " --out new"),
            ("evaluate teacher", ""),
            ("chat", ""),
            ("convert", " --to qwen3_5 --out new"),
            ("serve", " --dry-run"),
            ("plan", " --gpu h100"),
            ("card", ""),
            ("push", " --repo me/it"),
            ("plan teacher --gpu h100 --plot", "/plan.png"),
            ("bench distill", ""),
            ("bench states", ""),
            ("bench serving teacher", " --context 16:1"),
            ("bench serving teacher --context 16:1 --json-file", "/rows.json"),
            ("bench solver --plot", "/solver.png"),
        )
    ),
    *(
        f"{name} nowhere.yaml"
        for name in (
            "distill",
            "finetune",
            "prime",
            "pretrain",
            "plan-training",
            "data prepare",
            "data show",
        )
    ),
    "distill distill --set model=nowhere",
    "finetune quickstart/sft --set model=nowhere",
    "prime quickstart --set base=nowhere",
    "data prepare data --set tokenizer=nowhere",
    "data show data --set tokenizer=nowhere",
    "prime quickstart --set distill.data.text=nowhere",
    "data prepare in.yaml",
    "data show in.yaml",
    "data answers nobody/nowhere --out new.jsonl",
    "finetune in-pairs.yaml",
    "plan teacher --gpu nowhere",
    "plan-training quickstart --gpu nowhere",
    "evaluate nobody/nowhere",
    "select nobody/nowhere --keep 2 --out new",
    "harness lm-eval nobody/nowhere --tasks short --run .",
    "harness nemo teacher --url http://localhost:1 --run nowhere",
    "harness read nowhere.json --suite s --run .",
    "report nowhere",
    "init teacher --ratio 0.5 --out used-nowhere",
]


def test_a_wrong_path_or_gpu_is_told_before_torch_is_imported(tmp_path):
    """Of every command that takes one; all in one process, which then has imported nothing that takes seconds."""
    used = {command for command in commands() for line in WRONG if line.startswith(command)}
    assert used == {*commands()} - {"doctor", "bench ops"}
    (tmp_path / "used-nowhere/mine").mkdir(parents=True)
    sources = {"tokenizer": "teacher", "sequence_length": 64, "output": "new", "sources": [{"path": "nowhere"}]}
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(sources))
    pairs = {
        "method": "dpo",
        "model": "teacher",
        "output": "new",
        "pairs": {"path": "nowhere"},
        "trainable": {"all": 1},
    }
    (tmp_path / "in-pairs.yaml").write_text(yaml.safe_dump(pairs | {"training": PRIME["distill"]["training"]}))
    code = f"""
import contextlib, io, sys, time
from hmf.cli import main
for line in {WRONG!r}:
    sys.argv, start = ["hmf", *line.split()], time.process_time()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    shown, heavy = err.getvalue(), {{"torch", "transformers", "vllm", "datasets"}} & set(sys.modules)
    assert code == 2 and shown.count("\\n") == 1 and "nowhere" in shown, (line, code, shown)
    assert not heavy and time.process_time() - start < 1, (line, heavy)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@given(st.integers(1, 5000), st.sampled_from(["", "k", "K", "m", "M"]), st.sampled_from(["", " "]))
def test_a_number_of_tokens_may_have_a_unit(number, unit, space):
    whole = number * {"": 1, "k": 1024, "m": 1024**2}[unit.lower()]
    assert parse_tokens(f"{space}{number}{unit}{space}") == parse_tokens(whole) == whole


@pytest.mark.parametrize("text", ["", "K", "1.5K", "-1", "128KB", "1K2", "1__0", "1e3", "١٢K"])
def test_other_texts_are_no_number_of_tokens(text):
    with pytest.raises(ValueError, match="is not a number of tokens; write for example 131072, 128K or 1M"):
        parse_tokens(text)


def test_lengths_are_taken_with_a_unit_wherever_they_are_asked_for(tmp_path, monkeypatch, capsys):
    for line in ("plan teacher --gpu h100 --context {}", "plan teacher --gpu h100 --batched-tokens {}"):
        outputs = {run(monkeypatch, capsys, *line.format(text).split())[1] for text in ("2K", "2048", "2k")}
        assert len(outputs) == 1 and outputs != {""}
    counts = [
        (command, parameter.opts[0])
        for command in commands()
        for parameter in command_object(command).params
        if re.search("length|tokens$|context|^output", parameter.name) and command != "pretrain"
    ]
    assert len(counts) == 18
    needed = {
        "harness lm-eval": ["teacher", "--tasks", "short", "--run", "."],
        "data answers": ["teacher", "--out", "new.jsonl"],
        "bench serving": ["teacher"],
    }
    for command, option in counts:
        code, _, err = run(monkeypatch, capsys, *command.split(), *needed.get(command, []), option, "1.5K")
        example = "16K:20,32K:max" if (command, option) == ("bench serving", "--context") else "131072, 128K or 1M"
        assert code == 2 and f"write for example {example}" in err, (command, err)
    code, _, err = run(monkeypatch, capsys, "evaluate", "teacher", "--length", "64")
    assert (code, err) == (2, "hmf: Invalid value for '--length': 64 is less than 96\n")
    code, _, err = run(monkeypatch, capsys, "evaluate", "teacher", "--length", "100M")
    assert (code, err) == (2, "hmf: Invalid value for '--length': 104857600 is more than 16777216\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "output": "here", "evaluate": {"length": "1k", "max_new_tokens": "1K"}}))
    settings, _ = read_recipe(recipe, PrimeRecipe, ["distill.data.sequence_length=128K"])
    assert settings.distill.data.sequence_length == 131072
    assert (settings.evaluate.length, settings.evaluate.max_new_tokens) == (1024, 1024)
    recipe.write_text(yaml.safe_dump({**PRIME, "output": "here", "evaluate": {"length": "1 KB"}}))
    with pytest.raises(HmfError, match="evaluate.length: '1 KB' is not a number of tokens; write for example"):
        read_recipe(recipe, PrimeRecipe)


@pytest.mark.parametrize(
    "command",
    [
        "bench distill teacher --kl",
        "chat teacher --temperature",
        "evaluate teacher --parity-bound",
        "plan teacher --gpu h100 --gpu-memory-utilization",
        "plan teacher --gpu h100 --layer-overhead",
        "plan-training quickstart --mfu",
    ],
)
def test_numbers_of_the_command_line_are_finite(command, monkeypatch, capsys):
    for number in ("inf", "nan", "1e999"):
        code, _, err = run(monkeypatch, capsys, *command.split(), number)
        assert code == 2 and f"Invalid value for '{command.split()[-1]}': " in err, err


def test_init_explains_the_marks_of_a_fused_pattern(tmp_path, monkeypatch, capsys):
    make_tiny_stage0(tmp_path)
    code, out, _ = run(monkeypatch, capsys, "init", tmp_path / "base", "--pattern", "*-GDN", "--out", tmp_path / "new")
    assert code == 0 and "pattern *DA-GDN*\n" in out
    assert "*DA: an unchanged layer of the base; GDN* and so on: a mixer beside the layer that it" in out
    _, out, _ = run(monkeypatch, capsys, "init", "--help")
    words = " ".join(out.split())
    assert "`*DA` is an unchanged layer of the base" in words and "* keeps the base's layer; GDN" in words


def test_the_script_and_the_module_are_the_same():
    result = subprocess.run([sys.executable, "-m", "hmf.cli", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert all(command.split()[0] in result.stdout for command in commands())


ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distil": {}}, "unknown key 'distil'; did you mean 'distill'?"),
        ({"hybrid": {"mixer": "gdn", "ration": 0.5}}, "hybrid: unknown key 'ration'; did you mean 'ratio'?"),
        ({"hybrid": {"mixer": "gnd", "ratio": 0.5}}, "hybrid.mixer: unknown mixer 'gnd'; did you mean 'gdn'?"),
        ({"hybrid": {"mixer": "gdn", "ratio": 0.01}}, "hybrid.ratio: 0.01 of 6 layers replaces no layer"),
        ({"hybrid": {"mixer": "gdn", "ratio": 0.5, "layers": [1]}}, "exactly one of ratio, layers and pattern"),
        ({"hybrid": {"pattern": "*-GDN"}}, "hybrid.pattern: has 2 layers, but the model has 6"),
        ({"hybrid": {"pattern": "*-GND-*-*-*-*"}}, "unknown layer symbol 'GND'; did you mean 'GDN'?"),
        ({"hybrid": {"layers": [1, 9]}}, "hybrid.layers: [9] are not layers of the model; its layers are 0 to 5"),
        (
            {"hybrid": {"ratio": 0.5, "options": {"gdn": {"use_gat": True}}}},
            "hybrid.options.gdn: unknown key 'use_gat'; did you mean 'use_gate'?",
        ),
        ({"hybrid": {"ratio": 0.5, "options": {"gka": {"num_iter": 3}}}}, "hybrid.options: gka: no layer of"),
        ({"hybrid": {"mixer": "gka", "pattern": "*-GDN-*-*-*-*"}}, "hybrid.mixer: gka is in no layer of the pattern"),
        ({"base": "nowhere"}, "base: nowhere: no such directory"),
        ({"distill": {"training": ONE_STEP | {"max_steps": "many"}}}, "distill.training.max_steps: "),
        ({"distill": {"training": {"max_steps": 1}}}, "distill.training.per_device_train_batch_size: is missing"),
        ({"distill": {**PRIME["distill"], "data": {"sequence_length": 10**9}}}, "less than or equal to 16777216"),
        ({"distill": {"training": ONE_STEP | {"learning_rate": float("inf")}}}, "finite number"),
        ({"distill": {"training": ONE_STEP | {"max_steps": 1e12}}}, "distill.training.max_steps: "),
        ({"distill": {**PRIME["distill"], "objective": {"kl_top_k": 3}}}, "kl_top_k: read with kl, which is off"),
        ({"select": {"choices": 10**30}}, "select.choices: "),
        ({"seed": -1}, "seed: "),
        ({"evaluate": {"tasks": ["recal"]}}, "evaluate.tasks: unknown task 'recal'; did you mean 'recall'?"),
        ({"evaluate": {"tasks": ["chat", "chat"]}}, "evaluate.tasks: chat is named twice; name each task once"),
        (
            {"distill": {**PRIME["distill"], "objective": {"layerwise_steps": 1, "kl": {1: 1}, "kl_top_k": 2048}}},
            "distill.objective.kl_top_k: 2048 is not below the vocabulary size, 2048",
        ),
        (
            {"distill": {**PRIME["distill"], "data": {"text_share": 0.5, "tasks": {"recal": 1}}}},
            "distill.data.tasks: unknown task 'recal'; did you mean 'recall'?",
        ),
    ],
)
def test_a_bad_recipe_names_key_and_mend_and_writes_nothing(change, said, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "output": str(tmp_path / "run"), **change}))
    code, _, err = run(monkeypatch, capsys, "prime", recipe)
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"hmf: {recipe}: ") and said in err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("stage0*"))


def test_an_output_in_use_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("precious")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "output": str(tmp_path / "run")}))
    for arguments in (["prime", recipe], ["init", "teacher", "--ratio", "0.5", "--out", tmp_path / "run"]):
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 2 and err.endswith("run: holds other files; choose another output or remove it first\n")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_run_that_cannot_start_claims_no_folder(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    content = {"method": "cpt", "output": str(tmp_path / "run"), "data": {}, "trainable": {"all": 1}}
    for model, said in ((str(tmp_path / "none"), "no such directory"), ("src/hmf/assets/teacher", "is not a Hybrid")):
        recipe.write_text(yaml.safe_dump({**content, "model": str(ROOT / model), "training": ONE_STEP}))
        code, _, err = run(monkeypatch, capsys, "finetune", recipe)
        assert (code, err.count("\n")) == (2, 1) and said in err
        assert not (tmp_path / "run").exists()


NO_RATIOS = [
    [*command.split(), "--ratio", value]
    for command in (
        "init teacher --out x",
        "plan teacher --gpu l4",
        "bench distill",
        "bench serving teacher --context 1:1",
    )
    for value in ("nan", "-0.5", "1.5", "inf")
]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["evaluate", "teacher", "--smples", "3"], "No such option: --smples (Possible options: --baselines"),
        (["bench", "states", "x", "--dtype", "int8"], "'int8' is not one of 'bfloat16', 'float16'"),
        (["bench", "serving", "x", "--context", "1:1", "--format", "cards"], "'cards' is not one of 'table', 'card'"),
        *((command, "'--ratio': Input should be") for command in NO_RATIOS),
        (
            ["init", "teacher", "--mixer", "gka", "--pattern", "*-GKA", "--out", "x"],
            "--mixer: a pattern names the types",
        ),
        (["init", "teacher", "--ratio", "0.5", "--layers", "1", "--out", "x"], "exactly one of --ratio, --layers and"),
        (["plan", "teacher", "--gpu", "l4", "--mixer", "gka"], "--mixer: is read with --ratio; add --ratio 0.5"),
        (
            ["bench", "distill", "--mixer", "gka", "--pattern", "*-GKA"],
            "--mixer: is read with --ratio; the pattern names",
        ),
        (["bench", "solver", "--plot", "."], "--plot: .: is a directory"),
        (["finetune", "quickstart"], "recipe.yaml: is a recipe of `hmf prime`; give it to that command"),
        (["data", "prepare", "quickstart"], "is a recipe of `hmf prime`"),
        (["prime", "distill"], "recipe.yaml: is a recipe of `hmf distill`"),
        (["finetune", "quickstart/cpt", "--set", "trainable.norm=1"], ": trainable.norm: Input should be 'mixers',"),
        (["select", "teacher", "--keep", "3", "--method", "kll", "--out", "x"], "--method: unknown method 'kll'; did"),
        (["chat", "teacher", "--compose", "fused"], "--compose: 'fused' is not KEYS,STATES"),
        (
            ["data", "show", "data", "--set", "tokenizer=x"],
            "data/recipe.yaml with tokenizer=x: tokenizer: x: no such",
        ),
        (
            ["data", "show", "data", "--set", "sources=[{path: no-such, weight: 1}]"],
            ": sources.no-such.path: no-such: no such file or folder",
        ),
        (["prime", "recipes/quickstart/sft.yaml"], "sft.yaml: is a recipe of `hmf finetune`"),
        (["prime", "qwen3-8b"], "is a folder; give one of its recipes: gdn-1-prime.yaml, gdn-2-long.yaml"),
        (["evaluate"], "Missing argument 'MODEL...'; see hmf evaluate --help"),
        (["plna"], "hmf: No such command 'plna'. Did you mean 'plan'?\n"),
        (["serve", "teacher", "--port", "9000"], "--port: is not an option of hmf serve; those of vLLM follow --"),
        (["evaluate", "two\nhmf: lines"], "two\\nhmf: lines: no such directory"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, line, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, err.count("\n")) == (2, 1) and line in err and err.startswith("hmf: ")


@pytest.mark.parametrize("name", ["", "data", "bench", "harness"])
def test_a_group_without_a_command_prints_its_help(name, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, *name.split())
    assert (code, out) == (2, "") and err.startswith(f"Usage: {f'hmf {name}'.strip()} [OPTIONS] COMMAND")
    assert "\nCommands:\n" in err


def test_a_run_folder_in_place_of_its_model_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    for command in ("chat", "plan --gpu l4"):
        code, _, err = run(monkeypatch, capsys, *command.split(), tmp_path)
        assert code == 2 and err.endswith(f"this is a run folder; did you mean {tmp_path / 'model'}?\n"), err


def test_an_unexpected_error_is_one_line_and_a_log(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("hmf.model.checkpoint.load_config", fail)
    code, _, err = run(monkeypatch, capsys, "plan", "teacher", "--gpu", "h100")
    assert (code, err.count("\n")) == (
        1,
        1,
    ) and "unexpected RuntimeError: first; please report it, with the file " in err
    log = Path(err.strip().rpartition(" ")[2])
    assert "in fail" in log.read_text() and "second" in log.read_text()
    log.unlink()
    monkeypatch.setattr("hmf.model.checkpoint.load_config", lambda *_, **__: Path("nowhere/config.json").read_bytes())
    code, _, err = run(monkeypatch, capsys, "plan", "teacher", "--gpu", "h100")
    assert (code, err) == (2, "hmf: nowhere/config.json: No such file or directory\n")
    monkeypatch.setattr("hmf.model.checkpoint.load_config", fail)
    monkeypatch.setenv("HMF_DEBUG", "")  # set back at the end
    monkeypatch.setattr(sys, "argv", ["hmf", "--debug", "plan", "teacher", "--gpu", "h100"])
    with pytest.raises(RuntimeError, match="second"):
        main()


def test_ctrl_c_is_one_line_with_what_it_stopped(tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt("at step 3 of 9")

    monkeypatch.setattr("hmf.model.checkpoint.load_config", stop)
    code, _, err = run(monkeypatch, capsys, "plan", "teacher", "--gpu", "h100")
    assert (code, err) == (130, "hmf: stopped at step 3 of 9\n")

    def stop_without_a_word(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hmf.data.prepare.prepare", stop_without_a_word)
    (tmp_path / "chat.jsonl").write_text("{}\n")
    recipe = {"output": str(tmp_path / "rows"), "tokenizer": "teacher", "sequence_length": 64}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(recipe | {"sources": [{"path": str(tmp_path / "chat.jsonl")}]})
    )
    code, _, err = run(monkeypatch, capsys, "data", "prepare", tmp_path / "recipe.yaml")
    assert (code, err) == (130, "hmf: stopped before the end; the same command continues\n")
    monkeypatch.setattr("hmf.pipeline.evaluate_checkpoint", stop_without_a_word)
    with pytest.raises(KeyboardInterrupt, match="while evaluating primed; the same command continues"):
        scored(tmp_path, EvaluateSettings(), tmp_path / "scores.primed.json", "primed")


def test_version_and_short_help(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version")[:2] == (0, f"hmf {hmf.__version__}\n")
    code, out, _ = run(monkeypatch, capsys, "bench", "ops", "-h")
    assert code == 0 and "Examples" in out


def test_no_recipe_and_broken_yaml(tmp_path, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "prime", tmp_path / "none.yaml")
    assert code == 2 and "no such recipe" in err
    code, _, err = run(monkeypatch, capsys, "data", "show", tmp_path / "none")
    assert code == 2 and err.endswith("; or the output folder of hmf data prepare\n")
    (tmp_path / "broken.yaml").write_text("base: [")
    code, _, err = run(monkeypatch, capsys, "distill", tmp_path / "broken.yaml")
    assert code == 2 and "not valid YAML" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("hybrid.mixer", "write KEY=VALUE"),
        (".mixer=gka", "write KEY=VALUE"),
        ("base.name=gka", "'base' is a value"),
        ("seed=[", "not valid YAML"),
        ("hybrid.mixr=gka", "unknown key 'mixr'; did you mean 'mixer'?"),
        ("training.max_steps=3", "unknown key 'training'; did you mean 'distill.training'?"),
        ("hybrid.mixer=gak", "unknown mixer 'gak'; did you mean 'gka'?"),
    ],
)
def test_a_bad_override_is_one_line(override, said, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "output": str(tmp_path / "run")}))
    code, _, err = run(monkeypatch, capsys, "prime", recipe, "--set", override)
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err


def test_overrides_are_part_of_the_recipe(tmp_path):
    recipe, written = tmp_path / "recipe.yaml", tmp_path / "written.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "output": "here"}))
    changes = ["hybrid.ratio=null", "hybrid.pattern='*-GDN-GKA-*-*-*'", "distill.objective.kl=0.5", "output=there"]
    settings, text = read_recipe(recipe, PrimeRecipe, changes)
    assert (settings.hybrid.ratio, settings.hybrid.pattern) == (None, "*-GDN-GKA-*-*-*")
    assert (settings.distill.objective.kl, str(settings.output)) == ({0: 0.5}, "there")
    written.write_text(text)
    assert read_recipe(written, PrimeRecipe) == (settings, text)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "base": "~/base", "output": "~/run"}))
    settings, _ = read_recipe(recipe, PrimeRecipe, ["distill.data.text=~/text"])
    assert (settings.base, settings.output) == (f"{tmp_path}/base", tmp_path / "run")
    assert settings.distill.data.text == f"{tmp_path}/text"
    for words in (["~/none"], ["teacher", "--plot=~/none/plan.png"]):
        code, _, err = run(monkeypatch, capsys, "plan", "--gpu", "l4", *words)
        assert code == 2 and f"{tmp_path}/none: no such directory" in err


def test_the_recipe_of_a_run_folder_continues_that_run(tmp_path, monkeypatch, capsys):
    """A relative output would be another folder from elsewhere, and so it would after the run folder was moved."""
    run_folder = tmp_path / "moved"
    run_folder.mkdir()
    recipe = run_folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**PRIME, "output": "runs/first"}))
    (run_folder / "stage0").mkdir()  # by hmf init, beside the recipe
    assert read_run(recipe, PrimeRecipe)[0].output == Path("runs/first")  # no run is here
    (run_folder / "stage1.log.json").touch()
    settings, text = read_run(recipe, PrimeRecipe)
    assert settings.output == run_folder and text == recipe.read_text()
    assert "continues the run in its folder, not in output, runs/first; --set output=DIR" in capsys.readouterr().err
    assert read_run(recipe, PrimeRecipe, ["output=runs/second"])[0].output == Path("runs/second")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/first").symlink_to(run_folder)
    assert read_run(recipe, PrimeRecipe)[0].output == Path("runs/first")  # the same folder


@pytest.mark.slow
def test_prime_does_the_whole_job_once(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    evaluate = {"tasks": ["recall"], "samples": 2, "length": 128, "text_bytes": 2000}
    content = {**PRIME, "output": str(tmp_path / "run"), "evaluate": evaluate}
    recipe.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["hmf", "prime", str(recipe)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    first = capsys.readouterr().out
    assert all(row in first for row in ("teacher", "stage 0", "primed", "KV bytes/token", "hmf chat"))
    card = tmp_path / "run/model/README.md"
    assert (
        f"saved {card}" in first
        and card.read_text().count("(../scores.") == 6
        and "license: apache" in card.read_text()
    )
    card.write_text("my own")
    weights = tmp_path / "run/model/model.safetensors"
    written = weights.stat().st_mtime_ns
    with pytest.raises(SystemExit):
        main()
    assert weights.stat().st_mtime_ns == written and card.read_text() == "my own"
    again = capsys.readouterr()
    assert " chat " in again.out and "was not written by hmf" in again.err
    recipe.write_text(yaml.safe_dump({**content, "seed": 1}))
    code, _, err = run(monkeypatch, capsys, "prime", recipe)
    assert code == 2 and "another recipe" in err


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("plan teacher --ratio 0.5 --gpu l4 --context 2K --plot plan.svg", "sequences"),
        ("plan-training quickstart --gpu l4", "gpu_hours"),
        ("bench solver --tokens 8 --heads 1 --head-dim 4 --plot solver.svg", "bound"),
    ],
)
def test_json_is_all_of_stdout_and_has_numbers(command, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, *command.split(), "--json")
    assert code == 0 and all(isinstance(row[key], int | float) for row in json.loads(out)["rows"]), err
    assert ("saved" in err) == ("--plot" in command)


def test_messages_name_the_command_that_can_be_typed(tmp_path, monkeypatch, capsys):
    script = tmp_path / ".venv" / "bin" / "hmf"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    (other := tmp_path / "other").mkdir()
    found = {}
    for name, path, folder in (
        ("pa th", script.parent, tmp_path),
        ("clone", "/bin", tmp_path),
        ("else", "/bin", other),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", str(path))
        options = ["--ratio", "0.5", "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", [str(script), "init", "teacher", *options])
        with pytest.raises(SystemExit):
            main()
        *words, model = shlex.split(re.search(r"next: (.*)", capsys.readouterr().out)[1])
        assert words[1:] == ["distill", "RECIPE.yaml", "--set"] and model == f"model={tmp_path / name}"
        found[name] = words[0]
    assert found == {"pa th": "hmf", "clone": ".venv/bin/hmf", "else": str(script)}


def test_evaluate_takes_several_models_and_prints_json(tmp_path, monkeypatch, capsys):
    make_tiny_stage0(tmp_path)
    options = ["--tasks", "", "--text-bytes", "2000", "--length", "96"]
    code, out, err = run(monkeypatch, capsys, "evaluate", tmp_path / "base", tmp_path / "stage0", *options, "--json")
    scores = json.loads(out)
    assert code == 0 and list(scores) == [str(tmp_path / "base"), str(tmp_path / "stage0")]
    base, hybrid = scores.values()
    assert base["text"]["tokens"] == hybrid["text"]["tokens"] > 0
    assert base["text"]["perplexity"] != hybrid["text"]["perplexity"]
    code, out, _ = run(monkeypatch, capsys, "evaluate", "teacher", *options, "--dtype", "bfloat16", "--baselines")
    assert code == 0 and "order-3 models, bits per byte" in " ".join(out.split())
    long = [tmp_path / "base", tmp_path / "stage0"]
    code, out, _ = run(
        monkeypatch, capsys, "evaluate", *long, "--tasks", "recall,needle,arithmetic", *options[2:], "--samples", "1"
    )
    assert code == 0 and all(f"│ {path} " in out for path in long) and "answers to 1 prompt a task" in out
    for wrong, line in (
        (["teacher", "teacher"], "MODEL: a model is named twice"),
        (["teacher", "--tasks", "recal"], "did you mean 'recall'?"),
        (["teacher", "--device", "cuda"], "PyTorch finds no GPU"),
    ):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        code, _, err = run(monkeypatch, capsys, "evaluate", *wrong)
        assert (code, err.count("\n")) == (2, 1) and line in err


def test_options_of_init_export_and_evaluate_have_their_effect(tmp_path, monkeypatch, capsys):
    stage0 = make_tiny_stage0(tmp_path)
    base = tmp_path / "base"
    stored = {}
    for seed in (0, 7):
        made, wanted = tmp_path / f"made-{seed}", tmp_path / f"wanted-{seed}"
        options = ["--pattern", "*-GDN", "--seed", seed, "--out", made]
        assert run(monkeypatch, capsys, "init", base, *options)[0] == 0
        make_stage0(base, Pattern.parse("*-GDN"), wanted, seed=seed)
        stored[seed] = load_file(made / "model.safetensors")
        assert_close(stored[seed], load_file(wanted / "model.safetensors"), atol=0, rtol=0)
    assert any(not torch.equal(stored[0][name], stored[7][name]) for name in stored[0])

    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        assert run(monkeypatch, capsys, "export", stage0, "--out", out, "--dtype", dtype)[0] == 0
        weights = load_file(out / "model.safetensors")
        kept = ("A_log", "dt_bias")
        assert {str(x.dtype) for name, x in weights.items() if not name.endswith(kept)} == {f"torch.{dtype}"}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype

    options = ["--tasks", "chat", "--text-bytes", "0", "--length", "96", "--max-new-tokens", "1", "--json"]
    for samples in (1, 3):
        code, out, err = run(monkeypatch, capsys, "evaluate", base, *options, "--samples", samples)
        assert code == 0 and json.loads(out)[str(base)]["tasks"]["chat"]["n"] == samples, err


def test_composition_on_the_command_line(monkeypatch, capsys):
    options = ["--tasks", "recall", "--text-bytes", "0", "--length", "200", "--samples", "1", "--max-new-tokens", "1"]
    compose = ["--compose", "concatenated,averaged", "--compose-chunk", "48"]
    code, out, err = run(monkeypatch, capsys, "evaluate", "teacher", *options, *compose, "--json")
    assert code == 0, err
    chosen = {"keys": "concatenated", "states": "averaged", "chunk": 48, "tail": 128}
    assert json.loads(out)["teacher"]["compose"] == chosen
    for command in (["evaluate", "teacher"], ["chat", "teacher"]):
        code, _, err = run(monkeypatch, capsys, *command, "--compose", "fused")
        assert code == 2 and "compose: 'fused' is not KEYS,STATES; give one of full" in err
    code, _, err = run(monkeypatch, capsys, "chat", "teacher", "--url", "http://localhost:1", *compose)
    assert code == 2 and err.startswith("hmf: --compose: a server processes prompts as a whole")
