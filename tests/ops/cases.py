# SPDX-License-Identifier: Apache-2.0
"""What the tests of all ops share: random document splits, flattening of results."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Timings on a busy core vary; examples are derived from the test's name, so a failure repeats.
QUICK = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

# Lengths of the packed documents of one row; None: two equal rows of 11 tokens. Empty documents are allowed.
documents = st.none() | st.lists(st.integers(0, 21), min_size=1, max_size=4).filter(any)


def shape(lengths: list[int] | None) -> tuple[int, int, int, torch.Tensor | None]:
    """batch, tokens, sequences and cu_seqlens for a draw of `documents`."""
    if lengths is None:
        return 2, 11, 2, None
    return 1, sum(lengths), len(lengths), torch.tensor([0, *lengths]).cumsum(0)


def flat(result) -> list[torch.Tensor]:
    """The tensors of a nest of tuples, in order."""
    return [result] if torch.is_tensor(result) else [tensor for part in result for tensor in flat(part)]


def outputs_and_grads(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """function(*inputs)'s tensors, then the gradients of a fixed random combination of them to the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = flat(function(*inputs))
    generator = torch.Generator().manual_seed(7)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
    return outputs + list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


def log_decay(*size: int, strongest: float = 0.5) -> torch.Tensor:
    return -strongest * torch.rand(size, dtype=torch.float64)
