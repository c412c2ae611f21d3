# SPDX-License-Identifier: Apache-2.0
"""Measurements, and plans made without a GPU."""
