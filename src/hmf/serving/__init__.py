# SPDX-License-Identifier: Apache-2.0
"""Serving Hybrids: the vLLM plugin."""
