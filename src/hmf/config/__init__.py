# SPDX-License-Identifier: Apache-2.0
"""Layer patterns, layer options and recipes. This package does not import torch."""
