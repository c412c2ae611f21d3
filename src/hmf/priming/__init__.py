# SPDX-License-Identifier: Apache-2.0
"""Priming: the start of a Hybrid from a Transformer (Stage 0) and the distillation objectives (Stage 1). No training loop."""
