# SPDX-License-Identifier: Apache-2.0
"""The models of `tests.twins`, built once."""

import copy

import pytest

from hmf.model.families import FAMILIES
from tests import twins


@pytest.fixture(scope="session")
def families():
    return {family: twins.build(family) for family in FAMILIES}


@pytest.fixture(scope="session")
def trio(families):
    return families["qwen3"]


@pytest.fixture(params=["base", "twin", "gdn"])
def model(request, trio):
    return copy.deepcopy(trio[request.param])


@pytest.fixture(scope="session")
def folders(trio, tmp_path_factory):
    """The three models, saved, and by themselves in a subfolder."""
    root = tmp_path_factory.mktemp("as_base")
    for name, model in trio.items():
        model.save_pretrained(root / name)
        model.save_pretrained(root / "run" / name)
    return root
