# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import hmf


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded teacher's tokenizer."""
    return AutoTokenizer.from_pretrained(Path(hmf.__file__).parent / "assets" / "teacher")
