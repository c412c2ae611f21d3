# SPDX-License-Identifier: Apache-2.0
"""What a model can do: held-out text and generated tasks. Never trains. Works for any Hugging Face causal model."""

from hmf.evaluation.run import evaluate_model

__all__ = ["evaluate_model"]
