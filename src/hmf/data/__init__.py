# SPDX-License-Identifier: Apache-2.0
"""Text corpora, generated tasks, tokenisation and packing. Needs no model."""
