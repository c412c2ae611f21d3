# SPDX-License-Identifier: Apache-2.0
"""The model card of a run: a README.md in which each measured number links to its results file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

import hmf
from hmf.bench import tables
from hmf.config.layers import base_head_dim, base_intermediate_size, experts_per_token, needed_kinds
from hmf.config.pattern import is_fused
from hmf.config.runs import DistillRecipe, FinetuneRecipe, PrimeRecipe
from hmf.errors import HmfError
from hmf.evaluation.results import SMALL, Scores, who
from hmf.folders import RECIPE, reason
from hmf.model.checkpoint import load_config
from hmf.planning import serving as planner
from hmf.planning.memory import layer_caches, weights
from hmf.serving.serve import parsers, state_options
from hmf.training.checkpoints import replace_text

from .evidence import BEFORE, MODEL, PRIMED, STAGE0, TEACHER, Evidence, Stage
from .licence import CARD, NOT_STATED, licence, metadata_of
from .references import citation, reference
from .suites import MISSING, card_suites, markdown, task_cell

RESULTS = "results"
MARKER = "generated_by"  # key of the metadata that marks a card as written by hmf


def write_card(
    place: Path, recipe: Stage | None = None, gpu: str = "h200", force: bool = False, repo: str | None = None
) -> Path:
    """`hmf card`: write README.md into the model folder of the run folder `place`, and return its path.

    Args:
        gpu: the GPUs of the serving plan.
        force: overwrite a README.md that hmf did not write.
        repo: the model's name on the Hub, for the commands in the card.
    Raises:
        HmfError: there is no finished Hybrid, a results file is damaged, or README.md was not written by hmf.
    """
    evidence = Evidence.of(place, recipe)
    file = evidence.model / CARD
    if not force and is_foreign(file):
        raise HmfError(f"{file}: was not written by hmf; use --force to overwrite it, or move it")
    text = str(Card(evidence, gpu, repo).render())
    try:
        replace_text(file, text)
    except OSError as error:
        raise HmfError(f"{file}: cannot be written: {reason(error)}") from None
    return file


def is_foreign(file: Path) -> bool:
    """Whether `file` exists and is not a card written by hmf."""
    if not file.exists() and not file.is_symlink():
        return False
    return not str(metadata_of(file).get(MARKER, "")).startswith("hmf ")


@dataclass(frozen=True)
class Card:
    """The card of a run. With `repo`, its links and commands use the Hub's repository, otherwise local paths."""

    evidence: Evidence
    gpu: str
    repo: str | None = None

    def render(self) -> ModelCard:
        parts = (
            f"# {self.title}\n\n{self.overview()}",
            f"## Why Hybrid?\n\n{self.why()}",
            f"## Model Overview\n\n{self.facts()}",
            f"## Benchmark Results\n\n{self.benchmarks()}",
            f"## Architecture Details\n\n{self.architecture()}",
            f"## Layer Layout\n\n{self.layout()}",
            f"## Inference Efficiency\n\n{self.efficiency()}",
            f"## Usage\n\n{self.usage()}",
            f"## Training data\n\n{self.training()}",
            f"## License\n\n{self.licence[1]}",
            f"## Citation\n\n{citation(self.kinds)}",
        )
        metadata: dict[str, Any] = {**self.licence[0], MARKER: f"hmf {hmf.__version__}"}
        data = ModelCardData(
            base_model=self.evidence.hub_name,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["hybrid", "state-space-model", *(kind.name for kind in self.kinds)],
            **metadata,
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")

    # ---- shared by the sections

    @cached_property
    def config(self) -> Any:
        config = load_config(self.evidence.model)
        file = self.evidence.model / "config.json"
        if not config.model_type.startswith("hybrid_"):
            raise HmfError(f"{file}: is the config of a Transformer; give the run folder of a Hybrid")
        if is_fused(config):
            raise HmfError(
                f"{file}: is a fused checkpoint, which holds the teacher; write a plain Hybrid with `hmf export` first"
            )
        return config

    @cached_property
    def kinds(self) -> list[Any]:
        return needed_kinds(self.config, self.config.pattern.symbols)

    @cached_property
    def name(self) -> str:
        """The model's name in commands."""
        return self.repo or str(self.evidence.model)

    @cached_property
    def title(self) -> str:
        if self.repo:
            return self.repo.rpartition("/")[2]
        symbols = dict.fromkeys(self.config.pattern.symbols[index] for index in self.config.pattern.replaced)
        base = self.evidence.base_name.rpartition("/")[2] if self.evidence.base else "Hybrid"
        return f"{'-'.join(symbols)}-primed-{base}"

    @cached_property
    def parameters(self) -> int:
        return weights(self.config, torch.float32).total // torch.float32.itemsize

    @property
    def layers(self) -> str:
        symbols = self.config.pattern.symbols
        counts = {"Attention": symbols.count("*") - len(self.own), "recurrent of the base": len(self.own)}
        counts |= {symbol: symbols.count(symbol) for symbol in sorted(set(symbols) - {"*"})}
        return " + ".join(f"{count} {name}" for name, count in counts.items() if count)

    @property
    def own(self) -> list[int]:
        """Indices of the layers that keep a recurrent layer of the base."""
        return sorted(set(self.config.recurrent_layers) - set(self.config.pattern.replaced))

    def link(self, text: str, file: str) -> str:
        return f"[{text}]({RESULTS if self.repo else '..'}/{file})"

    # ---- sections

    def overview(self) -> str:
        pattern = self.config.pattern
        share, own = len(pattern.replaced) / len(pattern), len(self.own) / len(pattern)
        kept = f", {own:.0%} are recurrent layers of the base" if own else ""
        names = ", ".join(reference(kind)[0] for kind in self.kinds)
        return (
            f"{self.title} is a Hybrid language model: {1 - share - own:.0%} of its layers are Attention{kept}, and "
            f"{share:.0%} are {names}. It was primed from {self.evidence.base_name} with Hybrid Model Factory. "
            f"Its config allows {self.config.max_position_embeddings:,} tokens of context."
        )

    def why(self) -> str:
        replaced, attention = self.config.pattern.replaced, self.config.attention_layers
        recurrent, all_recurrent = len(set(replaced) - set(attention)), len(self.config.pattern) - len(attention)
        others = f" and {recurrent} of {all_recurrent} recurrent layers" if recurrent else ""
        return (
            f"The Hybrid is initialised from a pre-trained model. {len(replaced) - recurrent} of {len(attention)} "
            f"Attention layers{others} are converted into layers that keep a state of fixed size for a sequence, "
            "whatever its length. A KV cache grows with every token. Compared with the base, this gives:\n\n"
            "- less memory for each long sequence, and more sequences at once on the same GPU;\n"
            "- more tokens per second where a decode step mostly reads the KV cache;\n"
            "- an advantage that grows with the length of the context.\n\n"
            "Replacing more layers saves more memory and usually costs quality. [Inference "
            "Efficiency](#inference-efficiency) and [Benchmark Results](#benchmark-results) have the figures."
        )

    def facts(self) -> str:
        pattern = self.config.pattern
        facts = {
            "Type": "causal language model (Hybrid)",
            "Base model": self.evidence.base_name,
            "Hybrid layer types": ", ".join(reference(kind)[0] for kind in self.kinds),
            "Hybrid ratio": f"{len(pattern.replaced) / len(pattern):.0%} ({self.layers})",
            "Parameters": f"{self.parameters:,}",
            "Context length": f"{self.config.max_position_embeddings:,} tokens",
            "Precision": str(self.config.dtype or NOT_STATED).removeprefix("torch."),
            "License": self.licence[0].get("license", NOT_STATED),
        }
        return "\n".join(f"- {name}: {value}" for name, value in facts.items())

    def benchmarks(self) -> str:
        scores = self.evidence.scores
        small = {name: result for name, result in scores.items() if result.suite in (None, SMALL)}
        evaluations = [stage.evaluate for stage in self.evidence.stages if not isinstance(stage, DistillRecipe)]
        asked = [task for settings in evaluations if settings for task in settings.tasks]
        tasks = list(dict.fromkeys([*asked, *(task for result in small.values() for task in result.tasks)]))
        rows = []
        for model, title in self._models(small).items():
            files = {name: result for name, result in small.items() if _model(name, result) == model}
            rows.append([title, self._text(files), *(self._task(files, task) for task in tasks)])
        lines = [markdown(["Model", "Perplexity", *tasks], rows), ""]
        if not scores:
            return "\n".join([*lines, f"The run folder has no results file: {MISSING}."])
        lengths = sorted({result.length for result in small.values() if result.length})
        window = f", to prompts of at most {' or '.join(f'{n:,}' for n in lengths)} tokens" if lengths else ""
        legend = (
            f"Tasks: greedy answers that match exactly, in percent{window}. In parentheses: the number n of prompts, "
            "the 95% Wilson score interval of the share, and the number of answers cut off at the token limit, which "
            "are not correct. Perplexity: of held-out text; lower is better. Every number links to its results file."
        )
        if any(self.evidence.source(row) for result in scores.values() for row in result.tasks.values()):
            legend += (
                " A number that links to a file of lm-eval or NeMo Evaluator was measured by that harness; the scores "
                "file has the metric and the settings."
            )
        return "\n".join([*lines, legend, *card_suites(self.evidence, self._named, self.link)])

    def _models(self, scores: Mapping[str, Scores]) -> dict[str, str]:
        """Titles of the base, of this model, and of all other models in `scores`."""
        base = f"{self.evidence.base_name} (the base Transformer)" if self.evidence.base else "Base Transformer"
        titles = {TEACHER: base, PRIMED: f"**{self.title}** (this model)"}
        titles |= {model: model for name, result in scores.items() if (model := _model(name, result)) not in titles}
        if STAGE0 in titles:
            titles[STAGE0] = "Stage 0 (mixers initialised, not trained)"
        if BEFORE in titles:
            titles[BEFORE] = "The model before Stage 2"
        return titles

    def _named(self, name: str, result: Scores) -> str:
        return self._models({name: result})[_model(name, result)]

    def _task(self, files: Mapping[str, Scores], task: str) -> str:
        name = next((name for name, result in files.items() if task in result.tasks), None)
        if name is None:
            return MISSING
        return task_cell(files[name].tasks[task], name, self.link, self.evidence)

    def _text(self, files: Mapping[str, Scores]) -> str:
        found = next(((name, result.text) for name, result in files.items() if result.text), None)
        if found is None:
            return MISSING
        name, text = found
        return f"{self.link(f'{text.perplexity:.2f}', f'scores.{name}.json')} ({text.tokens:,} tokens)"

    def architecture(self) -> str:
        config = self.config
        rows = [
            ["Number of Layers", f"{len(config.pattern)} ({self.layers})"],
            ["Parameters", f"{self.parameters:,}"],
            ["Hidden Dimension", f"{config.hidden_size:,}"],
            ["Attention Heads", f"{config.num_attention_heads} (Q) / {config.num_key_value_heads} (KV)"],
            ["Head Dimension", f"{base_head_dim(config)}"],
            ["Intermediate Dimension (FFN)", f"{base_intermediate_size(config):,}"],
        ]
        if active := experts_per_token(config):
            experts = f"{config.num_experts} of {config.moe_intermediate_size:,}, {active} active for each token"
            rows.append(["Experts", experts])
        rows += [
            ["Vocabulary Size", f"{config.vocab_size:,}"],
            ["Context Length", f"{config.max_position_embeddings:,} tokens"],
            ["Position Encoding", f"RoPE ({_rope(config)})"],
        ]
        return markdown(["Component", "Details"], rows)

    def layout(self) -> str:
        chosen = next((stage.hybrid for stage in self.evidence.stages if isinstance(stage, PrimeRecipe)), None)
        how = "The run folder has no recipe, so it is unknown how the layers were chosen."
        if chosen is not None:
            how = "The recipe names the replaced layers."
            if chosen.layers == "auto":
                how = "`hmf prime` chose the replaced layers; selection.json in the run folder has the scores."
            elif chosen.ratio is not None:
                how = f"The recipe spreads the replaced layers evenly (ratio {chosen.ratio:g})."
        where = ", ".join(map(str, self.config.pattern.replaced))
        own = f" (recurrent in the base: {', '.join(map(str, self.own))})" if self.own else ""
        return f"```\n{self.config.pattern}\n```\n\n`*` is Attention{own}. Replaced layers (from 0): {where}. {how}"

    def efficiency(self) -> str:
        return "\n\n".join(("### Planned", self._planned(), "### Measured", *self._measured()))

    def _planned(self) -> str:
        longest = self.config.max_position_embeddings
        contexts = [longest >> halvings for halvings in (3, 2, 1, 0) if longest >> halvings]
        try:
            hybrid, base = planner.plans(self.config, self.gpu)
        except HmfError as error:
            return f"Not planned for {self.gpu}: {str(error).removeprefix('--gpu: ')}"
        rows = []
        for context in contexts:
            sizes = [planner.size_of(sum(plan.sequence_bytes(context)) * plan.ranks) for plan in (hybrid, base)]
            fit = [min(plan.sequences(context), plan.max_num_seqs) for plan in (hybrid, base)]
            row = [planner.short(context), *sizes, *(f"{n:,}" for n in fit)]
            rates = [plan.decode_rate(n, context) if n else 0.0 for plan, n in zip((hybrid, base), fit, strict=True)]
            ratio = f" ({rates[0] / rates[1]:.2f}×)" if all(rates) else ""
            shown = [f"{rate:,.0f}" if rate else "none fits" for rate in rates]
            rows.append([*row, f"{shown[0]}{ratio}", shown[1]])
        head = ["Context", "cache of a sequence", "of the base", "sequences at once", "of the base"]
        command = shlex.join(["hmf", "plan", self.name, "--gpu", self.gpu, "--context", str(longest)])
        return (
            f"{markdown([*head, 'decoded tokens/s', 'of the base'], rows)}\n\n"
            f"These figures are planned from the config for {planner.devices(hybrid)}, with at most "
            f"{hybrid.max_num_seqs} sequences; nothing was measured. `{command}` prints more of them."
        )

    def _measured(self) -> Iterator[str]:
        for name, serving in self.evidence.serving.items():
            rows = [row.model_dump() for row in serving.rows]
            yield tables.card(rows, rows[0]["model"], serving.ranks, serving.hardware)
            yield f"From {self.link(name, name)}, by `hmf bench serving`; ratios are to {rows[0]['model']}."
        if not self.evidence.serving:
            yield f"Throughput and time to first token: {MISSING}."

    def usage(self) -> str:
        caches = layer_caches(self.config, planner.serving_dtype(self.config))
        options = state_options(self.config) if any(cache.state_bytes for cache in caches) else {}
        options |= parsers(self.evidence.model)
        shown = [shlex.join([name, value] if value else [name]) for name, value in options.items()]
        serve = " \\\n    ".join([f"vllm serve {shlex.quote(self.name)}", *shown])
        return f"""### With vLLM

Install the package `hybrid-model-factory` beside vLLM; it is a vLLM plugin. Then start a server:

```bash
{serve}
```

`hmf serve` also chooses the options that depend on the machine. Send a request:

```bash
curl http://localhost:8000/v1/chat/completions \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{self.name}", "messages": [{{"role": "user", "content": "What is linear attention?"}}]}}'
```

### With Hugging Face Transformers

```python
import hmf  # registers the Hybrids
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{self.name}"
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{{"role": "user", "content": "What is linear attention?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```"""

    def training(self) -> str:
        stages = self.evidence.stages
        if not stages:
            return f"The run folder has no recipe: {NOT_STATED}."
        parts = []
        if self.evidence.base is None:
            parts.append("The recipes of the first stages are not available; those of the later stages follow.")
        for stage in stages:
            section = stage if not isinstance(stage, PrimeRecipe) else stage.distill
            title = f"Stage 2, {stage.method}" if isinstance(stage, FinetuneRecipe) else "Stage 1, distillation"
            data: Any = stage.pairs if isinstance(stage, FinetuneRecipe) and stage.pairs else section.data
            steps = section.training
            rows = steps.per_device_train_batch_size * steps.gradient_accumulation_steps
            values = yaml.safe_dump(data.model_dump(mode="json"), sort_keys=False, allow_unicode=True).strip()
            how = " The mixers learn the outputs of the base." if not isinstance(stage, FinetuneRecipe) else ""
            if getattr(section, "on_policy", None):
                how += " The texts are the model's own continuations of prompts from the data."
            length = f"{steps.max_steps:,}" if steps.max_steps else f"{steps.num_train_epochs:g} epochs in"
            parts.append(
                f"**{title}**: {length} optimiser steps of {rows:,} rows on each process.{how} The data:"
                f"\n\n```yaml\n{values}\n```"
            )
        if (self.evidence.run / RECIPE).is_file():
            parts.append(f"The whole recipe: {self.link(RECIPE, RECIPE)}.")
        return "\n\n".join(parts)

    @cached_property
    def licence(self) -> tuple[dict[str, str], str]:
        return licence(self.evidence)


def _model(name: str, scores: Scores) -> str:
    model = who(name, scores)
    return PRIMED if model == MODEL else model


def _rope(config: Any) -> str:
    parameters = config.rope_parameters or {}
    if "rope_type" in parameters or "rope_theta" in parameters:
        parameters = {"": parameters}
    shown = []
    for kind, values in parameters.items():
        texts = [f"θ = {values['rope_theta']:,.0f}"] if "rope_theta" in values else []
        if values.get("rope_type", "default") != "default":
            texts.append(f"{values['rope_type']}, factor {values.get('factor', NOT_STATED)}")
        shown.append(f"{kind}: " * bool(kind) + "; ".join(texts))
    return "; ".join(shown) or NOT_STATED
