# SPDX-License-Identifier: Apache-2.0
"""`hmf bench serving`: one row a load and model, of what vLLM really decoded."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import types
from pathlib import Path

import pytest
from transformers import Qwen3Config
from typer.testing import CliRunner

from hmf.bench import engine, throughput, variants
from hmf.bench.engine import Load
from hmf.bench.throughput import Run
from hmf.cli import app
from hmf.config.pattern import Pattern
from hmf.errors import HmfError
from hmf.model.convert import hybrid_config
from hmf.serving import serve
from tests.conftest import ROOT
from tests.hybrids import VOCABULARY, Case
from tests.serving import engines


@pytest.fixture
def configs(tmp_path):
    """Directories of a base and of its Hybrid, with a config.json alone."""
    base = Qwen3Config(
        **engines.DIMENSIONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        architectures=["Qwen3ForCausalLM"],
    )
    base.save_pretrained(tmp_path / "base")
    hybrid_config(base, Pattern(("*", "GDN"))).save_pretrained(tmp_path / "hybrid")
    return tmp_path / "base", tmp_path / "hybrid"


class TestInput:
    def test_loads(self):
        assert throughput.parse_loads("16K:20, 32768:max") == [Load(16384, 20), Load(32768, 0)]

    @pytest.mark.parametrize("text", ["", "16384", "16384x20", "16384:20,", "0:4", "64:0", "64:-1", "64:2:3", "max:2"])
    def test_no_loads(self, text):
        with pytest.raises(HmfError, match="^--context: .* is not TOKENS:SEQUENCES; write for example [^\n]*$"):
            throughput.parse_loads(text)

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--context", "64"], "--context: '64'"),
            (["--batched-tokens", "4"], "--batched-tokens: 4 leaves no tokens"),
            (["--context", "5000:1"], "4,096; give fewer"),
            (["--ratio", "0.5", "--pattern", "*-GDN"], "at most one of --ratio and --pattern"),
            (["--ratio", "0.5", "OTHER"], "--ratio: makes Hybrids of one MODEL"),
            (["--mixer", "gka"], "--mixer: is read with --ratio; add --ratio 0.5, or omit --mixer"),
            (["--mixer", "gdn,", "--ratio", "0.5"], "unknown mixer ''"),
            (["--tensor-parallel-size", "64"], "--tensor-parallel-size: 64 is more than"),
            (["BASE"], "a model is named twice"),
            (["--json-file", "nowhere/rows.json"], "--json-file: nowhere: no such directory"),
            (["--json", "--format", "card"], "--json and --format card exclude each other"),
        ],
    )
    def test_refused(self, configs, arguments, line):
        models = dict(zip(("BASE", "OTHER"), map(str, configs), strict=False))
        arguments = [models.get(argument, argument) for argument in ("BASE", *arguments)]
        result = CliRunner().invoke(app, ["bench", "serving", "--context", "64:4", *arguments])
        assert isinstance(result.exception, HmfError) and line in str(result.exception)

    def test_as_many_as_fit(self, configs, monkeypatch):
        """More of the Hybrid than of the base, and the plan's, with a little left."""
        monkeypatch.setattr(serve, "CPU_SEQUENCES", 10**6)
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        run = Run([Load(3000, 0), Load(64, 4)], output=8, dtype="float32")
        base, hybrid = (throughput.subject("m", folder, run) for folder in configs)
        assert [load.tokens for load in base.loads] == [3000, 64] and base.loads[1].sequences == 4
        cached = 3000 * 2 * 2 * 2 * engines.DIMENSIONS["head_dim"] * 4  # layers, keys and values, heads
        assert 0.85 * 2**30 < base.loads[0].sequences * cached < 2**30
        assert 1.8 < hybrid.loads[0].sequences / base.loads[0].sequences < 2
        for one in (base, hybrid):
            assert one.arguments[one.arguments.index("--max-num-seqs") + 1] == str(one.loads[0].sequences)

    def test_none_fits(self, configs, monkeypatch):
        monkeypatch.setattr(throughput, "PLANNED", 1e-9)
        with pytest.raises(HmfError, match="^--context: m: no sequence of 64 tokens fits; give fewer tokens$"):
            throughput.subject("m", configs[0], Run([Load(64, 0)], dtype="float32"))

    def test_weights_are_random_where_there_are_none(self, configs, tmp_path):
        engines.save_hybrid(tmp_path / "whole", Case("GDN", "bench"), "*-X")
        run = Run([Load(64, 4)], dtype="float32")
        kinds = [throughput.subject("m", folder, run).kind for folder in (*configs, tmp_path / "whole")]
        assert kinds == ["Transformer, random weights", "Hybrid, 1 + 1, random weights", "Hybrid, 1 + 1"]


class Engine:
    """Gives every sequence a token a step, the second one only from step `late` on."""

    def __init__(self, late):
        self.late, self.step_number, self.left, self.aborted = late, 0, {}, []

    def add_request(self, name, prompt, params):
        self.left[name] = params.max_tokens

    def has_unfinished_requests(self):
        return any(self.left.values())

    def step(self):
        self.step_number += 1
        found = []
        for index, name in enumerate(self.left):
            if self.left[name] and (index != 1 or self.step_number > self.late):
                self.left[name] -= 1
                found.append(types.SimpleNamespace(request_id=name, outputs=[types.SimpleNamespace(token_ids=[1])]))
        return found

    def abort_request(self, names):
        self.aborted = names


@pytest.mark.vllm
class TestWindow:
    def test_decode_is_timed_when_all_decode(self):
        fake = Engine(late=5)
        engine._generate(fake, [[1], [2]], tokens=10, lead=8)
        assert fake.step_number == 6 + 10 and len(fake.aborted) == 2

    def test_prefill_alone(self):
        fake = Engine(late=5)
        last, _, mean = engine._generate(fake, [[1], [2]], tokens=0, lead=8)
        assert 0 < mean < last  # the first sequence had its token five steps earlier
        assert fake.step_number == 6

    def test_sequences_that_do_not_fit_at_once(self):
        with pytest.raises(HmfError, match="the cache cannot hold 2 sequences of 1 tokens at once"):
            engine._generate(Engine(late=50), [[1], [2]], tokens=10, lead=8)


def test_plugin_of_a_bare_source_tree(monkeypatch):
    """Where nothing is installed, processes find the entry point that an installation would have."""
    monkeypatch.setattr(throughput.importlib.metadata, "entry_points", lambda group: [])
    with throughput._plugin() as environment:
        show = "from importlib.metadata import distribution\n"
        show += "for point in distribution('hmf-plugin').entry_points: print(point.name, point.value)"
        command = [sys.executable, "-c", show]
        found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][throughput.GROUP]
    assert [found.stdout.strip()] == [f"{name} {value}" for name, value in declared.items()]


def test_a_failure_names_its_cause():
    frames = [f"frame {number}" for number in range(30)]
    log = [
        "INFO start",
        "(Core) WARNING TypeError: no tokenizer",
        "(Core) ERROR ValueError: no room",
        *frames,
        "RuntimeError: see above",
    ]
    assert throughput._reason("\n".join(log)) == "ValueError: no room"
    assert throughput._reason("\n".join(frames)) == "frame 29" and throughput._reason("") == "it printed nothing"


def test_a_failure_names_its_model(configs, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_plugin", lambda: contextlib.nullcontext({}))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the log is kept
    (tmp_path / "hmf.py").write_text("raise ImportError('out of order')")
    one = throughput.subject("this one", configs[0], run := Run([Load(64, 4)], dtype="float32"))
    one = dataclasses.replace(one, environment={"PYTHONPATH": str(tmp_path)})
    (error,) = throughput.run_all([one], run)
    message, _, log = str(error).partition("; its log is in ")
    assert message == "this one: vLLM stopped: ImportError: out of order"
    assert "Traceback" in Path(log).read_text()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`hmf bench serving` with engines that take 2 s and decode one sequence's tokens a second for each layer of the
    model's name; (result, saved report)."""
    saved = tmp_path / "rows.json"
    monkeypatch.setattr("hmf.serving.serve.require_vllm", lambda: None)

    def run(*arguments, failing=()):
        def run_one(one, run, *_):
            if one.name in failing:
                raise HmfError(f"{one.name}: vLLM stopped")
            if saved.exists():  # what has been measured before stands there already
                seen.append(len(json.loads(saved.read_text())["rows"]))
            loads, slow = len(one.loads), 1 + ("gka" in one.name)
            return engine.Measured(
                [[2.0 * slow]] * loads,
                [[1.0 * slow]] * loads,
                1000,
                None,
                3.0,
                "NONE",
                "CPU_ATTN",
                [[1.5 * slow]] * loads,
            )

        seen = []
        monkeypatch.setattr(throughput, "_run_one", run_one)
        result = CliRunner().invoke(app, ["bench", "serving", *arguments, "--output", "5", "--json-file", str(saved)])
        return result, json.loads(saved.read_text())["rows"] if saved.exists() else [], seen

    return run


def test_a_failure_costs_no_other_figures(configs, bench):
    base, hybrid = map(str, configs)
    result, rows, seen = bench(base, hybrid, "teacher", "--context", "64:4", failing=[hybrid])
    assert str(result.exception) == f"{hybrid}: vLLM stopped"
    assert [row["model"] for row in rows] == [base, "teacher"] and seen == [1]
    assert (rows[0]["prefill_tokens_per_second"], rows[0]["decode_tokens_per_second"]) == (128.0, 20.0)
    assert "20.0" in result.output


def test_json_is_what_the_file_has(configs, bench, capfd):
    base, hybrid = map(str, configs)
    result, rows, _ = bench(base, hybrid, "--context", "64:4", "--json")
    assert json.loads(result.stdout)["rows"] == rows and len(rows) == 2
    before = capfd.readouterr()
    result = CliRunner().invoke(app, ["bench", "serving", base, "--context", "64:4", "--json", "nowhere/old.json"])
    assert "--json-file: nowhere: no such directory" in str(result.exception)  # as in the last release
    assert "nowhere/old.json is used as the value of --json-file" in before.err + capfd.readouterr().err + result.output


def test_without_the_first_there_are_no_ratios(configs, bench):
    base, hybrid = map(str, configs)
    result, rows, _ = bench(base, hybrid, "--context", "64:4", failing=[base])
    assert [row["model"] for row in rows] == [hybrid] and rows[0]["decode_ratio"] is rows[0]["ttft_ratio"] is None
    assert str(result.exception) == f"{base}: vLLM stopped"


def test_errors_name_no_temporary_config(configs, monkeypatch):
    """A Hybrid is measured from a config in a temporary folder; its errors are about the model of the command."""

    def refuse(one, run, *_):
        raise HmfError(f"{one.name}: {one.folder}: vLLM's decoder does not take it")

    base = str(configs[0])
    monkeypatch.setattr(throughput, "_run_one", refuse)
    arguments = ["bench", "serving", base, "--mixer", "gdn", "--ratio", "0.5", "--context", "64:4"]
    monkeypatch.setattr("hmf.serving.serve.require_vllm", lambda: None)
    result = CliRunner().invoke(app, arguments)
    assert str(result.exception).endswith(f"; {base} with gdn: {base}: vLLM's decoder does not take it")


VARIANT = '{"gka_overrides": {"num_iter": 10}}'


def test_several_hybrids_and_variants(configs, bench):
    """One Hybrid a layer type, and again those that have the keys; prefills are of the base's number of sequences."""
    base = str(configs[0])
    arguments = ["--mixer", "gdn,gka", "--ratio", "0.5", "--context", "64:max,100:4", "--variant", VARIANT]
    result, rows, _ = bench(base, *arguments)
    assert result.exit_code == 0, result.exception
    names = [base, f"{base} with gdn", f"{base} with gka", f"{base} with gka, num_iter=10"]
    assert [row["model"] for row in rows] == names * 2
    for load in (rows[:4], rows[4:]):
        assert len({row["prefilled_sequences"] for row in load}) == 1
        assert load[0]["prefilled_sequences"] == load[0]["sequences"]
        assert [row["ttft_ratio"] for row in load] == [1, 1, 2, 2] and [row["filled"] for row in load] == [
            load[0]["context"] == 64
        ] * 4
    assert {row["sequences"] for row in rows[4:]} == {4} and {row["mean_ttft"] for row in rows} == {1.5, 3.0}


def test_card(configs, bench):
    """The two tables of a model card: Hybrids first, the base last, a column a context."""
    base = str(configs[0])
    result, rows, _ = bench(
        base, "--mixer", "gka", "--ratio", "0.5", "--context", "1024:max,2048:max", "--format", "card"
    )
    assert result.exit_code == 0, result.exception
    tables = [line for line in result.output.splitlines() if line.startswith("|")]
    head = ["| Model | 1K | 2K |", "|---|---|---|"]
    decode = {row["context"]: f"{row['decode_tokens_per_second']:,.0f}" for row in rows if row["model"] == base}
    hybrid = [row for row in rows if row["model"] != base]
    cells = [f"{row['decode_tokens_per_second']:,.0f} ({row['decode_ratio']:.2f}×)" for row in hybrid]
    assert tables == [
        *head,
        f"| {base} with gka | {cells[0]} | {cells[1]} |",
        f"| {base} | {decode[1024]} | {decode[2048]} |",
        *head,
        f"| {base} with gka | 3,000 ms (2.00×) | 3,000 ms (2.00×) |",
        f"| {base} | 1,500 ms | 1,500 ms |",
    ]
    assert "with a saturated KV cache" in result.output and "at the Transformer's saturated batch size" in result.output
    other, *_ = bench(str(configs[1]), "--context", "1024:max", "--format", "card")  # a Hybrid, as Qwen3.5 is one
    assert f"at {configs[1]}'s saturated batch size" in other.output and "Transformer" not in other.output
    fixed, _, _ = bench(base, "--context", "64:4", "--format", "card")
    assert "| Model | 64 × 4 |" in fixed.output and "saturated" not in fixed.output


class TestOverrides:
    def arguments(self, one):
        at = one.arguments.index("--hf-overrides") if "--hf-overrides" in one.arguments else None
        return None if at is None else json.loads(one.arguments[at + 1])

    def test_each_model_gets_what_its_config_takes(self, configs):
        named = [("base", configs[0]), ("hybrid", configs[1])]
        shared = '{"max_position_embeddings": 9000, "gdn_overrides": {"allow_neg_eigval": true}}'
        found = variants.subjects(named, Run([Load(5000, 1)], dtype="float32"), shared)
        assert [self.arguments(one) for one in found] == [{"max_position_embeddings": 9000}, json.loads(shared)]
        assert self.arguments(variants.subjects(named, Run([Load(64, 1)], dtype="float32"))[1]) is None

    def test_dtypes_of_caches_are_options_of_vllm(self, configs):
        """A base has no recurrent states, so it is not measured again without a difference."""
        named, run = [("base", configs[0]), ("hybrid", configs[1])], Run([Load(64, 0)], dtype="float32")
        both = '{"kv_cache_dtype": "fp8", "mamba_ssm_cache_dtype": "bfloat16"}'
        found = variants.subjects(named, run, None, ['{"kv_cache_dtype": "fp8"}', both])
        assert [one.name for one in found][2:] == [
            "base, kv_cache_dtype=fp8",
            "hybrid, kv_cache_dtype=fp8",
            "hybrid, kv_cache_dtype=fp8, mamba_ssm_cache_dtype=bfloat16",
        ]
        values = [one.arguments[one.arguments.index("--kv-cache-dtype") + 1] for one in found[2:]]
        assert values == ["fp8"] * 3 and "--kv-cache-dtype" not in found[0].arguments
        last = found[-1].arguments
        assert last[last.index("--mamba-ssm-cache-dtype") + 1] == "bfloat16" and self.arguments(found[-1]) is None
        steps = [one.plan.step_bytes(1, 64) for one in found]
        assert steps[4] < steps[3] < steps[1] and steps[2] < steps[0]

    def test_prefill_kernels_of_gdn(self, configs):
        named, run = [("base", configs[0]), ("hybrid", configs[1])], Run([Load(64, 1)], dtype="float32")
        *plain, one = variants.subjects(named, run, None, ['{"gdn_prefill_backend": "hmf"}'])
        assert len(plain) == 2 and one.name == "hybrid, gdn_prefill_backend=hmf" and self.arguments(one) is None
        at = one.arguments.index("--additional-config")
        assert json.loads(one.arguments[at + 1]) == {"gdn_prefill_backend": "hmf"}
        assert all("--additional-config" not in other.arguments for other in plain)

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--variant", '{"kv_cache_dtype": "fp7"}'], "--kv-cache-dtype: unknown dtype 'fp7'"),
            (["--variant", '{"gdn_prefill_backend": "own"}'], "--variant: gdn_prefill_backend: unknown backend 'own'"),
            (
                ["--hf-overrides", '{"gdn_prefill_backend": ["hmf"]}'],
                "--hf-overrides: gdn_prefill_backend: unknown backend",
            ),
            (["--hf-overrides", "{num_iter: 10}"], "--hf-overrides: {num_iter: 10} is not a JSON object"),
            (["--variant", "[1]"], "--variant: [1] is not a JSON object"),
            (["--variant", VARIANT], "no MODEL has these keys or layers of this type"),
            (["--hf-overrides", '{"max_positions": 1}'], "--hf-overrides: max_positions: no MODEL has this key"),
            (["--variant", '{"kv_cache_dtype": 8}'], "--variant: --kv-cache-dtype: unknown dtype '8'"),
            (["--variant", '{"gdn_overrides": {"num_iter": 1}}'], "--variant: gdn_config: unknown key 'num_iter'"),
            (["--hf-overrides", '{"gdn_overrides": 3}'], "--hf-overrides: gdn_overrides: 3 is not an object"),
            (
                ["--hf-overrides", '{"max_position_embeddings": "big"}'],
                "--hf-overrides: max_position_embeddings: 'big'",
            ),
            (["--variant", '{"hidden_size": -3}'], "--variant: hidden_size: -3 is not a whole number"),
            (["--variant", '{"tie_word_embeddings": "?"}'], "--variant: Field 'tie_word_embeddings'"),
        ],
    )
    def test_refused(self, configs, arguments, line):
        result = CliRunner().invoke(app, ["bench", "serving", *map(str, configs), "--context", "64:4", *arguments])
        assert isinstance(result.exception, HmfError) and line in str(result.exception)


def here(one, run, *_):
    """The base's engine in this process, which has loaded vLLM already; the Hybrid's is in its own."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return engine.measure(throughput._job(one, run), print)
    finally:
        cleanup_dist_env_and_memory()


elsewhere = throughput._run_one


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_command(configs, tmp_path, monkeypatch):
    """A base and its Hybrid, from configs alone, at two loads: every figure is there, and ratios are theirs."""
    for name, value in engines.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(throughput, "_run_one", lambda one, *_: (here if "base" in one.name else elsewhere)(one, *_))
    saved = tmp_path / "rows.json"
    arguments = ["--context", "100:3,30:max", "--output", "5", "--enforce-eager", "--json-file", str(saved)]
    arguments += ["--gpu-memory-utilization", "0.2"]
    result = CliRunner().invoke(app, ["bench", "serving", *map(str, configs), *arguments])
    assert result.exit_code == 0, result.exception
    report = json.loads(saved.read_text())
    table = report["rows"]
    assert [row["context"] for row in table] == [100, 100, 30, 30]
    assert [row["sequences"] for row in table[:2]] == [3, 3] and min(row["sequences"] for row in table[2:]) > 3
    assert [row["model"] for row in table] == [str(path) for path in configs] * 2
    for base, row in zip((table[0], table[0], table[2], table[2]), table, strict=True):
        assert row["prefilled_sequences"] == base["sequences"] and row["mean_ttft"] <= row["prefill_seconds"][0]
        prompts = row["context"] * row["prefilled_sequences"]
        assert row["prefill_tokens_per_second"] == pytest.approx(prompts / row["prefill_seconds"][0])
        assert row["decode_tokens_per_second"] == pytest.approx(5 * row["sequences"] / row["decode_seconds"][0])
        for part, figure in (
            ("prefill", "prefill_tokens_per_second"),
            ("decode", "decode_tokens_per_second"),
            ("ttft", "mean_ttft"),
            ("capacity", "capacity_tokens"),
        ):
            assert row[figure] > 0 and row[f"{part}_ratio"] == pytest.approx(row[figure] / base[figure])
        assert ("HMF_GDN" in row["backends"]) == ("Hybrid, 1 + 1" in row["kind"]) and "random" in row["kind"]
    assert (
        report["versions"]["vllm"]
        and report["hardware"]
        and report["dtype"] == ("bfloat16" if engines.CUDA else "float32")
    )
    assert "Transformer, random weights" in result.output
