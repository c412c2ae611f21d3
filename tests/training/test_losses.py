# SPDX-License-Identifier: Apache-2.0
"""Losses of Stage 2 against dense ones in float64: values, gradients, any chunk, any division into batches."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hmf.config.places import PairSettings
from hmf.data.preference import pair_dataset
from hmf.errors import HmfError
from hmf.model.checkpoint import load_model
from hmf.training.finetune import finetune
from hmf.training.losses import CrossEntropy, Preference
from tests.hybrids import VOCABULARY, Case, random_ids, tiny_hybrid
from tests.numerics import assert_golden
from tests.numerics import assert_same as same
from tests.training import cutting

LENGTHS = (7, 6, 5, 4, 2)  # two pairs and a filler, 24 tokens


@pytest.fixture(scope="module")
def model():
    return tiny_hybrid(Case("GDN", "gqa"))


@pytest.fixture(scope="module")
def batch():
    """Two rows of packed pairs; the second row has one pair only."""
    ids = random_ids(2, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1).clone()
    labels = ids.clone()
    labels[positions < 2] = -100  # prompts
    labels[:, -2:] = -100  # filler
    positions[1, 13:] = torch.arange(11)
    labels[1, 13:] = -100
    reference = torch.randn(2, 2, 2, dtype=torch.float64) - 10
    reference[1, 1] = torch.nan
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "reference": reference}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def dense_likelihoods(model, ids, labels, positions):
    """Log-likelihood of each document of one row, every document alone, from full logits."""
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
    found = []
    for start, stop in zip(starts, starts[1:], strict=False):
        scores = model(ids[None, start:stop]).logits[0].log_softmax(-1)
        wanted = [(t, labels[start + t + 1]) for t in range(stop - start - 1) if labels[start + t + 1] != -100]
        found.append(sum((scores[t, label] for t, label in wanted), torch.zeros((), dtype=torch.float64)))
    return found


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_cross_entropy_is_the_dense_one(model, batch, chunk_size):
    rows = {name: x for name, x in batch.items() if name != "reference"}
    logits = model(rows["input_ids"], position_ids=rows["position_ids"]).logits
    dense = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
    wanted = gradients(model, dense)
    loss = model(**rows, objective=CrossEntropy(chunk_size))["loss"]
    same(loss, dense)
    same(gradients(model, loss), wanted)


def test_preferences_are_the_dense_ones(model, batch):
    dense = []
    for ids, labels, positions, reference in zip(*batch.values(), strict=True):
        likelihoods = torch.stack(dense_likelihoods(model, ids, labels, positions))
        for chosen, rejected in [(0, 1), (2, 3)][: int((~reference[:, 0].isnan()).sum())]:
            gained = likelihoods[[chosen, rejected]] - reference[chosen // 2]
            dense.append(-F.logsigmoid(0.3 * (gained[0] - gained[1])))
    assert len(dense) == 3
    wanted = gradients(model, torch.stack(dense).mean())
    found = model(**batch, objective=Preference(0.3, chunk_size=4))
    same(found["loss"], torch.stack(dense).mean())
    same(gradients(model, found["loss"]), wanted)


@pytest.mark.parametrize("objective", [CrossEntropy(), Preference(0.3)])
def test_uneven_batches_of_a_step_add_up_to_one_batch(model, batch, objective):
    rows = batch if isinstance(objective, Preference) else {k: x for k, x in batch.items() if k != "reference"}
    wanted = gradients(model, model(**rows, objective=objective)["loss"])
    count = objective.count(**rows)
    parts = [{name: x[i : i + 1] for name, x in rows.items()} for i in range(2)]
    assert len({int(objective.count(**part)) for part in parts}) == 2
    same(gradients(model, sum(model(**part, objective=objective, counts=count)["loss"] for part in parts)), wanted)


def test_full_logits_never_exist(model):
    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result) and VOCABULARY in result.shape[1:]:
                self.size = max(self.size, result.numel())
            return result

    ids = random_ids(4, 50)
    with Largest() as seen:
        model(input_ids=ids, labels=ids, objective=CrossEntropy(chunk_size=40))["loss"].backward()
    assert 0 < seen.size <= 40 * VOCABULARY  # of 200 tokens; the head's own gradient has 32 rows


# ---- pairs


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" if not isinstance(line, str) else line for line in lines))
    return path


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return cutting.make_tiny_hybrid(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def pairs(tmp_path):
    words = ("one", "two", "three", "four", "five", "six")
    return write(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": f"{word} {n}", "chosen": f"{word} {n + 1}", "rejected": f"{n} {n} {n}"}
            for n, word in enumerate(words)
        ],
    )


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_pairs_stay_whole_and_all_come_before_any_comes_again(hybrid, pairs):
    tokenizer = tokenizer_of(hybrid)
    settings = PairSettings(path=str(pairs), sequence_length=96)
    data = pair_dataset(settings, tokenizer, rows=12, seed=1)
    texts = []
    for index in range(len(data.packed)):
        row = data[index]
        assert all(len(row[name]) == 96 for name in ("input_ids", "labels", "position_ids"))
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), 96]
        documents = [row["labels"][a:b] for a, b in zip(starts, starts[1:], strict=False)]
        answers = [tokenizer.decode(x[x != -100]) for x in documents if (x != -100).any()]
        assert len(answers) == 2 * int(data.row(index)["reference"][:, 0].isnan().logical_not().sum())
        texts += answers
    assert sorted(texts[1::2]) == sorted(f"{n} {n} {n}<|im_end|>" for n in range(6))
    assert {t.split()[0] for t in texts[::2]} == {"one", "two", "three", "four", "five", "six"}
    again = [data[index]["input_ids"].tolist() for index in range(12)]
    assert again == [pair_dataset(settings, tokenizer, 12, 1)[index]["input_ids"].tolist() for index in range(12)]


def test_fields_of_pairs_that_are_not_read_are_named(hybrid, tmp_path, capsys):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "label": 0, "id": None}
    file = write(tmp_path / "pairs.jsonl", [pair, pair | {"source": "web"}])
    pair_dataset(PairSettings(path=str(file), sequence_length=96), tokenizer_of(hybrid))
    assert capsys.readouterr().err == "hmf: pairs: fields that are not read: margin, label, source\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{\n", "pairs.jsonl:2: not valid JSON"),
        ("[1]\n", "pairs.jsonl:2: a JSON object is expected, not list"),
        ({"prompt": "a", "chosen": "b"}, "pairs.jsonl:2: no field 'rejected'; the row has 'prompt', 'chosen'"),
        ({"prompt": "a", "chosn": "b", "rejected": "c"}, "no field 'chosen'; the row has 'prompt', 'chosn'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}, "the assistant's answer"),
        (
            {"prompt": "a \ud83d", "chosen": "b", "rejected": "c"},
            r"pairs.jsonl:2: prompt.*content: a lone surrogate \(\\ud83d\)",
        ),
        ({"prompt": [{"role": "user", "content": "a", "mood": 1}], "chosen": "b", "rejected": "c"}, r"\].mood: unk"),
        ({"prompt": "a " * 300, "chosen": "b", "rejected": "c"}, "pair has .* tokens, a row 96; raise pairs.seq"),
    ],
)
def test_a_bad_line_is_named(hybrid, tmp_path, line, said):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    settings = PairSettings(path=str(write(tmp_path / "pairs.jsonl", [good, line])), sequence_length=96)
    with pytest.raises(HmfError, match=said):
        pair_dataset(settings, tokenizer_of(hybrid), 1)


def test_answers_whose_likelihood_is_not_finite_are_not_left_out(hybrid, pairs, tmp_path, monkeypatch):
    real = Preference.likelihoods

    def without_one(*args, **kwargs):
        return real(*args, **kwargs).index_fill(1, torch.tensor([0]), torch.nan)

    monkeypatch.setattr(Preference, "likelihoods", without_one)
    changes = {"method": "dpo", "data": None, "pairs": {"path": str(pairs), "sequence_length": 96}}
    with pytest.raises(HmfError, match="^pairs: the log-likelihood of an answer under the initial model is not finite"):
        finetune(cutting.finetune_recipe(hybrid, tmp_path / "run", **changes))


def test_preferences_raise_the_margin_and_a_resume_keeps_the_start(hybrid, pairs, tmp_path, monkeypatch):
    changes = {
        "method": "dpo",
        "data": None,
        "trainable": {"mixers": 5e-3, "norms": 5e-3},
        "pairs": {"path": str(pairs), "sequence_length": 96},
        "training": {"max_steps": 12, "per_device_train_batch_size": 1, "save_steps": 4},
    }
    whole, cut = (cutting.finetune_recipe(hybrid, tmp_path / name, **changes) for name in ("whole", "cut"))
    finetune(whole)
    log = [entry for entry in json.loads((whole.output / "stage2.log.json").read_text()) if "loss" in entry]
    assert_golden(
        [log[at][name] for at in (0, -1) for name in ("loss", "margin")], (0.720445, -0.050482, 0.359327, 0.865759)
    )
    assert log[-1]["accuracy"] == 1

    class Stopped(Exception):
        pass

    real = Preference.__call__

    def stop_later(self, *args, **kwargs):
        if stop_later.calls == 6:
            raise Stopped
        stop_later.calls += 1
        return real(self, *args, **kwargs)

    stop_later.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Preference, "__call__", stop_later)
        with pytest.raises(Stopped):
            finetune(cut)
    original = pairs.read_text()
    pairs.write_text(original.replace("one", "two"))
    with pytest.raises(HmfError, match="reference.safetensors: was measured on other pairs"):
        finetune(cut)
    pairs.write_text(original)
    reference = cut.output / "reference.safetensors"
    measured = reference.read_bytes()
    reference.write_bytes(measured[:100])
    with pytest.raises(HmfError, match="reference.safetensors: is damaged"):
        finetune(cut)
    reference.write_bytes(measured)
    finetune(cut)
    (ours, our_log), (wanted, log) = (cutting.result(run.output, "stage2", "model") for run in (cut, whole))
    assert our_log == log and all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_what_the_last_step_made_of_the_weights_is_looked_at(hybrid, pairs, tmp_path):
    changes = {
        "method": "dpo",
        "data": None,
        "pairs": {"path": str(pairs), "sequence_length": 96},
        "training": {"max_steps": 1, "per_device_train_batch_size": 1, "save_steps": 1},
    }
    recipe = cutting.finetune_recipe(hybrid, tmp_path / "run", **changes)
    recipe = recipe.model_copy(update={"trainable": {"mixers": 1e38, "norms": 1e38}})  # which a file cannot say
    with pytest.raises(HmfError, match="step 1: after this step .*nothing is saved") as caught:
        finetune(recipe)
    assert "\n" not in str(caught.value) and not (tmp_path / "run/model").exists()


def test_a_batch_without_labels_teaches_nothing(hybrid):
    """No label, or only one at a row's beginning, which nothing predicts: the loss is zero, and so is its gradient."""
    model = load_model(hybrid)
    ids = torch.arange(24).view(2, 12)
    for labels in (torch.full_like(ids, -100), torch.full_like(ids, -100).index_fill(1, torch.tensor([0]), 5)):
        loss = CrossEntropy()(model, input_ids=ids, labels=labels)["loss"]
        loss.backward()
        assert CrossEntropy().count(labels=labels) == 0 and loss == 0
        assert not any(x.grad is not None and x.grad.any() for x in model.parameters())
