# SPDX-License-Identifier: Apache-2.0
"""Training loops on transformers' Trainer. Knows nothing of layer types."""
