# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face side: configs, decoders of any family with mixers, caches, checkpoints."""

import transformers  # noqa: F401  before this package's modules: its import makes `hmf` register their classes
