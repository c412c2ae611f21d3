# SPDX-License-Identifier: Apache-2.0
"""Evaluation of any Hugging Face causal language model on held-out text and generated tasks."""

from hmf.evaluation.run import evaluate_model

__all__ = ["evaluate_model"]
