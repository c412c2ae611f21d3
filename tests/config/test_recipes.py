# SPDX-License-Identifier: Apache-2.0
"""What a recipe's reader reports."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hmf.config.runs import SHOWN, DistillRecipe, FinetuneRecipe, load_recipe
from hmf.errors import HmfError

WRONG = {  # section, key and value, and the words of the error
    ("training", "precision"): ("int4", "training.precision: Input should be"),
    ("training", "learning_rate"): (-1, "training.learning_rate: Input should be greater than 0 (got -1)"),
    ("training", "warmpu_steps"): (3, "training: unknown key 'warmpu_steps'; did you mean 'warmup_steps'?"),
    ("data", "sequence_length"): ("long", "data.sequence_length: 'long' is no number of tokens"),
    ("objective", "kl_top_k"): (0, "objective.kl_top_k: Input should be greater than or equal to 1 (got 0)"),
    ("objective", "kl_drection"): ("forward", "objective: unknown key 'kl_drection'; did you mean 'kl_direction'?"),
}
TRAINING = {"steps": 1, "rows_per_step": 1}


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
    for words in ("method dpo needs pairs and no data", "nothing to train", "every group has its own"):
        assert words in line


def test_a_file_of_errors_alone_is_cut(tmp_path):
    line = error_of(tmp_path, DistillRecipe, {f"wrong {number}": 1 for number in range(100)})
    assert "103 errors: (1) " in line and f"({SHOWN}) " in line and line.endswith(f" and {103 - SHOWN} more")
