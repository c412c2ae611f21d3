# SPDX-License-Identifier: Apache-2.0
"""Training loops on transformers' Trainer. This package does not depend on layer types."""
