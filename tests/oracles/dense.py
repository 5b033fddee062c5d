"""What every oracle is made of: adapters, clients, means and gaps as full (out, in) matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Adapter:
    """``s B A`` of one layer, or ``s B R A``."""

    B: Array
    A: Array
    s: float
    R: Array | None = None

    def delta(self) -> Array:
        return self.s * self.B @ (self.A if self.R is None else self.R @ self.A)


@dataclass(frozen=True)
class Client:
    """One client's adapter after training, with its normalised weight."""

    p: float
    B: Array
    A: Array
    s: float
    R: Array | None = None
    held: tuple[int, ...] = ()
    """Directions of the global adapter that it was sent, where they are not the leading ones."""


@dataclass(frozen=True)
class Outcome:
    """The next adapter and what moved into the base."""

    adapter: Adapter
    into_base: Array


def mean_update(clients: Sequence[Client]) -> Array:
    """``sum_k p_k s_k B_k A_k``, the product that the clients' mean asks for."""
    total = np.zeros((clients[0].B.shape[0], clients[0].A.shape[1]))
    for k in clients:
        total += k.p * k.s * (k.B @ (k.A if k.R is None else k.R @ k.A))
    return total


def gap(start: Adapter, clients: Sequence[Client], outcome: Outcome) -> tuple[float, float]:
    """``(||W_after - W_before - sum_k p_k dW_k||, ||sum_k p_k dW_k||)`` of one layer.

    dW_k = s_k B_k A_k - s B A, the client's change from the global weight before the round.
    """
    asked = mean_update(clients) - start.delta()
    done = outcome.into_base + outcome.adapter.delta() - start.delta()
    return float(np.linalg.norm(done - asked)), float(np.linalg.norm(asked))


def mean_a(clients: Sequence[Client]) -> Array:
    total = np.zeros_like(clients[0].A)
    for k in clients:
        total += k.p * k.A
    return total


def mean_b(start: Adapter, clients: Sequence[Client]) -> Array:
    total = np.zeros_like(start.B)
    for k in clients:
        total += k.p * (k.s / start.s) * k.B
    return total


def kept(B: Array, A: Array, s: float) -> Outcome:
    return Outcome(Adapter(B, A, s), np.zeros((B.shape[0], A.shape[1])))
