# SPDX-License-Identifier: Apache-2.0
"""Training data: text, generated tasks, conversations, tokenisation and packing. Needs no model."""
