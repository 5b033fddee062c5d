"""Intruder dimensions on matrices whose singular vectors are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.core.factors import Product
from fedlora.core.intruders import intruders, reduced

N, M = 30, 24
NOTHING = Product(torch.zeros(N, 1), torch.zeros(1, M))


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))[0]


def weight() -> Tensor:
    """Singular values 24, 23, .. 1; its left vectors leave 6 of 30 directions free."""
    return (orthonormal(N, M, 0) * torch.arange(M, 0, -1.0)) @ orthonormal(M, M, 1).T


def outside(count: int) -> Tensor:
    """Unit columns at right angles to all left singular vectors of the weight."""
    X = orthonormal(N, M, 0)
    free = torch.randn(N, count, generator=torch.Generator().manual_seed(2))
    return torch.linalg.qr(free - X @ (X.T @ free))[0]


def rows(count: int) -> Tensor:
    return orthonormal(M, count, 3).T


def test_none_without_an_update() -> None:
    found = intruders(weight(), NOTHING)
    assert (found.count, found.top, found.part) == (0, 10, None)


def test_an_update_that_scales_what_is_there_brings_none() -> None:
    U, _, Vh = torch.linalg.svd(weight(), full_matrices=False)
    assert intruders(weight(), Product(U[:, 15:18] * 50.0, Vh[15:18])).count == 0


@pytest.mark.parametrize("count", [1, 3])
def test_strong_directions_from_outside_are_found_and_weak_ones_are_not(count: int) -> None:
    strong = Product(outside(count) * 200.0, rows(count))
    assert intruders(weight(), strong).count == count
    assert intruders(weight(), Product(outside(count) * 1e-3, rows(count))).count == 0
    assert intruders(weight(), strong, top=1).count == 1


def test_the_threshold_is_a_cosine() -> None:
    """U = cos 50 of an old direction and sin 50 of a new one: 0.64 of W_0's, 0.77 of no other."""
    U = torch.linalg.svd(weight(), full_matrices=False).U
    angle = torch.deg2rad(torch.tensor(50.0))
    column = U[:, :1] * angle.cos() + outside(1) * angle.sin()
    update = Product(column * 1e4, rows(1))
    assert intruders(weight(), update, top=1, threshold=0.6).count == 0
    assert intruders(weight(), update, top=1, threshold=0.7).count == 1


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_each_is_left(share: float) -> None:
    """Against the sum over singular vectors, written out; the share is what is left, not what goes."""
    update = Product(outside(2) * 200.0, rows(2))
    found = intruders(weight(), update)
    U, S, Vh = torch.linalg.svd((weight() + update.dense()).double(), full_matrices=False)
    wanted = update.dense().double()
    for j in range(10):
        if (torch.linalg.svd(weight().double()).U[:, :M].T @ U[:, j]).abs().max() < 0.5:
            wanted = wanted + (share - 1) * S[j] * torch.outer(U[:, j], Vh[j])
    left = reduced(update, found, share)
    torch.testing.assert_close(left.dense().double(), wanted, rtol=1e-4, atol=1e-3)
    assert intruders(weight(), reduced(update, found, 0.0)).count == 0
