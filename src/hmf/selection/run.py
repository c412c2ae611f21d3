# SPDX-License-Identifier: Apache-2.0
"""`hmf select`: choose the layers that keep attention, and write the choice and its basis to selection.json."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hmf.config.pattern import Pattern, mixer_symbol
from hmf.config.runs import PrimeRecipe
from hmf.config.strict import parse_json, parse_sealed, seal_json
from hmf.data.encoding import IGNORED
from hmf.data.mixture import mixture
from hmf.data.prepared import PreparedDataset
from hmf.data.tokenizer import load_tokenizer
from hmf.errors import HmfError
from hmf.folders import reason
from hmf.layers.own import own_layers
from hmf.model.checkpoint import load_config
from hmf.training.checkpoints import replace_text

from .choose import agreement, by_rank, greedy, search, stability
from .scores import KL, Choice, Scorer, cost, in_conversation, means
from .supernet import align, fused_everywhere, training_of

SELECTION = "selection.json"
OTHER_ROWS = 2**31  # added to the seed, to draw rows other than those of the training


def select(
    base: Path,
    layers: int,
    keep: int,
    recipe: PrimeRecipe,
    out: Path,
    draw: Callable[[Path], object] | None = None,
    draw_training: Callable[[Path], object] | None = None,
) -> dict[str, Any]:
    """Choose which `keep` of the `layers` of `base` keep attention, by the recipe's section `select`.

    The result is the content of `out`/selection.json: method, mixer, seed, keep, pattern, kept and replaced layers, and
    scores by layer (larger where attention is needed more). Methods that run the model add measures, stability,
    agreement and cost. docs/selection.md describes each key.

    The caller holds `out` for this recipe (`hmf.folders.claimed`). An interrupted training resumes from
    `out`/selection, and an existing selection.json is read instead of computed.

    Args:
        draw: called with the path of selection.json.
    Raises:
        HmfError: `keep` is not from 0 to `layers` - 1; a file of scores is damaged or belongs to another model; the
            base has recurrent layers of its own.
    """
    settings = recipe.select
    if not 0 <= keep < layers:
        raise HmfError(f"keep: {keep} is not from 0 to {layers - 1}; the model has {layers} layers")
    if own := own_layers(load_config(base, weights=False)):
        raise HmfError(
            f"{base}: layers {own} are recurrent in the base itself, and selection chooses among all layers; name the "
            "layers to replace, or give a ratio alone"
        )
    file = out / SELECTION
    if (stored := read_selection(file)) is not None:
        return stored
    started = time.perf_counter()
    if settings.method == "uniform":
        choice = frozenset(Pattern.generate(layers, recipe.hybrid.mixer, (layers - keep) / layers).replaced)
        facts: dict[str, Any] = {}
    elif settings.method == "scores":
        assert settings.scores is not None
        scores = read_scores(settings.scores, layers)
        choice, facts = by_rank(scores, keep), {"scores": scores}
    else:
        choice, facts = _measured(base, layers, keep, recipe, out, draw_training)
    symbol = mixer_symbol(recipe.hybrid.mixer)
    pattern = Pattern(tuple(symbol if layer in choice else "*" for layer in range(layers)))
    result = {
        "method": settings.method,
        "mixer": recipe.hybrid.mixer,
        "keep": keep,
        "settings": settings.model_dump(mode="json"),
        "seed": recipe.seed,
        "pattern": str(pattern),
        "kept": [layer for layer in range(layers) if layer not in choice],
        "replaced": sorted(choice),
        **facts,
        "seconds": round(time.perf_counter() - started, 1),
    }
    replace_text(file, seal_json(result))
    if draw is not None:
        draw(file)
    return result


def read_selection(file: Path) -> dict[str, Any] | None:
    """The content of a selection.json; None if it is missing or damaged."""
    with suppress(FileNotFoundError, ValueError):
        return parse_sealed(file.read_text(encoding="utf-8"))
    return None


def _measured(
    base: Path,
    layers: int,
    keep: int,
    recipe: PrimeRecipe,
    out: Path,
    draw: Callable[[Path], object] | None,
) -> tuple[Choice, dict[str, Any]]:
    """The choice of a method that runs the model, and the keys that it adds to selection.json."""
    settings, hybrid = recipe.select, recipe.hybrid
    mixer, options = hybrid.mixer, hybrid.options_by_key()
    if settings.method == "window":
        mixer, options = "swa", {"swa_config": {"window_size": settings.window_size}}
    tokenizer = load_tokenizer(base)
    rows = _scored_rows(recipe, tokenizer)
    if settings.method == "window":
        _require_longer_answers(rows, settings.window_size)
    calibration = hybrid.calibrated if settings.method != "window" else None  # SWA is the attention's own start
    data = recipe.distill.data
    model = fused_everywhere(base, mixer, options, recipe.seed, hybrid.conv_start, calibration, data)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = recipe.distill.training.per_device_train_batch_size
    alone = [frozenset([layer]) for layer in range(layers)]
    measures = ("loss_answers",) if settings.method == "window" else KL

    def prices(choices: Sequence[Choice], measured: Scorer) -> list[float]:
        return [cost(sums.sum(0), measures).item() for sums in measured(choices)]

    at_start = Scorer(model, rows, batch_size)
    teacher = prices([frozenset()], at_start)[0]
    rankings = {"Stage 0": [price - teacher for price in prices(alone, at_start)]}
    training_seconds = 0.0
    if settings.steps:
        started = time.perf_counter()
        subset_steps = settings.steps - settings.layerwise_steps
        stage1 = training_of(recipe.distill, settings.layerwise_steps, subset_steps)
        align(model, tokenizer, stage1, out / "selection", recipe.seed, draw)
        training_seconds = time.perf_counter() - started
    scorer = Scorer(model, rows, batch_size) if settings.steps else at_start
    ranked = [price - teacher for price in prices(alone, scorer)]
    if settings.steps:
        rankings["trained"] = ranked

    def choose(score: Callable[[Sequence[Choice]], Sequence[float]]) -> Choice:
        if settings.method == "supernet":
            return search(score, layers, keep, settings.choices)
        if settings.method == "greedy":
            return greedy(score, layers, keep)
        return by_rank(score(alone), keep)

    choice = choose(lambda choices: prices(choices, scorer))
    if settings.method in ("supernet", "greedy"):  # the effect of each layer, with all others as chosen
        with_it = prices([choice - {layer} for layer in range(layers)], scorer)
        without = prices([choice | {layer} for layer in range(layers)], scorer)
        scores = [more - less for more, less in zip(without, with_it, strict=True)]
        rankings["beside the choice"] = scores
    else:
        scores = ranked

    def again(costs: Mapping[Choice, float]) -> Choice:
        if settings.method in ("supernet", "greedy"):
            of_size = [known for known in costs if len(known) == len(choice)]
            return min(of_size, key=lambda known: costs[known])
        return choose(lambda choices: [costs[known] for known in choices])

    same, kept_share, intervals = stability(scorer.known, again, measures, layers, recipe.seed)
    tokens = settings.steps * batch_size * rows[0]["input_ids"].numel()
    return choice, {
        "scores": _rounded(scores),
        "one_at_a_time": {
            "measures": [means(sums.sum(0, keepdim=True)) for sums in scorer(alone)],
            "intervals": [_rounded(interval) for interval in intervals],
        },
        "measures": means(scorer([choice])[0]),
        "stability": {"same_choice": same, "kept": kept_share},
        "agreement": agreement(rankings),
        "rankings": {name: _rounded(values) for name, values in rankings.items()},
        "cost": {
            "training_tokens": tokens * recipe.distill.training.gradient_accumulation_steps,
            "training_seconds": round(training_seconds, 1),
            "scored_choices": len(scorer.known) + (len(at_start.known) if scorer is not at_start else 0),
            "scored_tokens": len(rows) * rows[0]["input_ids"].numel(),
        },
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 6) for value in values]


def _scored_rows(recipe: PrimeRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    data, count = recipe.distill.data, recipe.select.rows
    if data.prepared is not None:  # the last ones, because training begins with the first ones whatever its seed is
        stored = PreparedDataset(data.prepared, tokenizer)
        if count > len(stored):
            raise HmfError(f"select.rows: {data.prepared} has {len(stored)} rows, fewer than {count}; lower it")
        return [stored[index] for index in range(len(stored) - count, len(stored))]
    rows = mixture(data, tokenizer, count, (recipe.seed + OTHER_ROWS) % 2**32)
    return [rows[index] for index in range(count)]


def _require_longer_answers(rows: Sequence[Any], window_size: int) -> None:
    """HmfError if no answer in `rows` has more than `window_size` tokens of its document before it."""
    batch = torch.utils.data.default_collate(list(rows))
    labels, positions = batch["labels"], batch["position_ids"]
    answers = positions[in_conversation(labels, positions) & (labels != IGNORED)]
    if not len(answers):
        raise HmfError(
            "select.method: window ranks layers by the loss of answers, and the data has no answers; add "
            "distill.data.tasks or conversations, or use the method kl"
        )
    if (longest := int(answers.max())) <= window_size:
        raise HmfError(
            f"select.window_size: {window_size} tokens hold every document with an answer (the longest of the scored "
            f"rows has {longest} before its end), so the window changes nothing; give fewer, or longer rows "
            "(distill.data.sequence_length)"
        )


def read_scores(file: Path, layers: int) -> list[float]:
    """A score for each layer from a file; larger where attention is needed more.

    The file is JSON (a list, an object of layers and numbers, or either under the key "scores") or CSV with the columns
    layer and score.

    Raises:
        HmfError: the file cannot be read; a layer is missing, occurs twice or is not in the model.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as error:
        raise HmfError(f"{file}: cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise HmfError(f"{file}: is not UTF-8 text; give JSON, or CSV with the columns layer and score") from None
    pairs = _csv_pairs(file, text) if file.suffix.lower() == ".csv" else _json_pairs(file, text)
    scores: dict[int, float] = {}
    for name, value in pairs:
        try:
            layer, score = int(str(name)), float(value)
        except (TypeError, ValueError):
            raise HmfError(f"{file}: {name!r:.60}: {value!r:.60}: give the index of a layer and a number") from None
        if not 0 <= layer < layers or layer in scores or not math.isfinite(score) or isinstance(value, bool):
            raise HmfError(
                f"{file}: layer {layer}, score {value!r:.60}: give each layer from 0 to {layers - 1} one finite number"
            )
        scores[layer] = score
    if missing := sorted(set(range(layers)) - scores.keys()):
        raise HmfError(f"{file}: no score for the layers {missing}; the model has {layers} layers")
    return [scores[layer] for layer in range(layers)]


def _json_pairs(file: Path, text: str) -> list[tuple[Any, Any]]:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise HmfError(f"{file}: is not valid JSON ({error})") from None
    if isinstance(content, dict) and "scores" in content:
        content = content["scores"]
    if isinstance(content, list):
        return list(enumerate(content))
    if isinstance(content, dict):
        return list(content.items())
    raise HmfError(f"{file}: has no scores; give a list, or an object of layers and scores")


def _csv_pairs(file: Path, text: str) -> list[tuple[Any, Any]]:
    table = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    if sorted(table.fieldnames or ()) != ["layer", "score"]:
        raise HmfError(f"{file}: the first line is {','.join(table.fieldnames or ())!r}; it must be layer,score")
    rows = list(table)
    if any(None in row or None in row.values() for row in rows):
        raise HmfError(f"{file}: a line does not have two values; write layer,score in each line")
    return [(row["layer"], row["score"]) for row in rows]
