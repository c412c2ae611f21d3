# SPDX-License-Identifier: Apache-2.0
"""Serving Hybrids: chat, the server and the vLLM plugin."""
