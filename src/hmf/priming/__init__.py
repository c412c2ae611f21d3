# SPDX-License-Identifier: Apache-2.0
"""Priming: a Hybrid's start from a Transformer (Stage 0) and the objectives of Stage 1. No training loop."""
