# SPDX-License-Identifier: Apache-2.0
"""Patterns, layer options and recipes. Nothing here imports torch."""
