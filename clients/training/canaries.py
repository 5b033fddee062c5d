"""Where an audit reaches into DP-SGD: made-up examples, each of them nothing but a gradient.

`fedlora.audit` hides them among a client's own examples. They are numbered on from the data set's, drawn by
the same Poisson draws, and clipped and noised with everything else; a run without an audit has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clients.training.batches import Indices

Rows = Callable[[Indices], Sequence[Tensor]]
"""Numbers of canaries -> their gradients, (numbers, *shape) for each trained tensor, in their order."""


class Canaries(Protocol):
    """The canaries at one client in one round."""

    def members(self) -> Indices:
        """The numbers, from 0, of those that are in the data."""
        ...

    def rows(self, trained: Mapping[str, Tensor]) -> Rows:
        """Their gradients, once it is known what is trained."""
        ...

    def drew(self, sizes: Sequence[int], examples: int) -> None:
        """What was drawn: sizes of the batches, and among how many, canaries included."""
        ...


def among(indices: Indices, canaries: Canaries | None, num_examples: int) -> Indices:
    """The client's examples and after them its canaries, which count on from the data set's examples."""
    if canaries is None:
        return indices
    return np.concatenate([indices, num_examples + canaries.members()])


def add_rows(parameters: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Append per-example gradients to those that Opacus left at the parameters."""
    for parameter, row in zip(parameters, rows, strict=True):
        parameter.grad_sample = torch.cat([parameter.grad_sample, row.to(parameter)])  # type: ignore[attr-defined]


def add_clipped(parameters: Sequence[Tensor], rows: Sequence[Tensor], max_grad_norm: float) -> None:
    """Add per-example gradients, each clipped over all tensors, to the clipped sum that ghost clipping left.

    There is no example's gradient that Opacus could clip here: that it clips is for the self-test to find.
    """
    norms = torch.stack([torch.linalg.vector_norm(row.flatten(1), dim=1) for row in rows]).norm(dim=0)
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    for parameter, row in zip(parameters, rows, strict=True):
        assert parameter.grad is not None
        parameter.grad += torch.einsum("n,n...->...", factors, row).to(parameter)
