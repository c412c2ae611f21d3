# SPDX-License-Identifier: Apache-2.0
"""Priming: initialising a Hybrid from a Transformer (Stage 0), the objectives of Stage 1, and export."""
