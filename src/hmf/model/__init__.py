# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face side: configs, decoders of any family with mixers, caches, checkpoints."""
