# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face side: configs, decoders of any family with mixers, caches, checkpoints."""

import transformers  # noqa: F401  before the modules here: `hmf` registers what is in them when it is imported
