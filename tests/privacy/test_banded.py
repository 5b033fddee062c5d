"""Banded matrix factorisation: factor, sensitivity and errors against a published code and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.linalg import toeplitz

from fedlora.privacy.banded import (
    inverse,
    model_noise,
    most_participations,
    remaining,
    sensitivity,
    square_root,
)

PUBLISHED = {
    (0.0, 1): (100.0, 3.0, 50.5, 100.0),
    (0.0, 2): (50.0, 3.0, 28.611728395061732, 56.11111111111111),
    (0.0, 5): (20.0, 3.0, 14.347127242904055, 27.122328523286033),
    (0.0, 10): (10.0, 3.0, 9.237130770142961, 16.379889236417938),
    (0.0, 20): (5.0, 3.0, 6.711963775724716, 10.689950799140961),
    (0.0, 50): (2.0, 2.0, 5.56379851493736, 7.381680033487787),
    (0.0, 100): (1.0, 1.0, 5.62002033582539, 6.407743518144562),
    (0.9, 2): (50.0, 3.0, 1934.3414417552256, 4342.382053919259),
    (0.9, 10): (10.0, 3.0, 438.70588790246615, 933.349994377626),
    (0.9, 50): (2.0, 2.0, 191.5886277983977, 307.7465449468798),
}
"""Of 100 rounds, by momentum and bands: squared sensitivity with any and with three participations, mean and
last squared error, by jax-privacy 2.0.0 (``matrix_factorization.toeplitz``: ``minsep_sensitivity_squared``,
``per_query_error``, of ``optimal_max_error_strategy_coefs``, with momentum convolved with its damped self,
cut to the bands and divided by its length)."""


def factor(coefficients: tuple[float, ...], rounds: int) -> np.ndarray:
    """C."""
    column = np.zeros(rounds)
    column[: len(coefficients)] = coefficients[:rounds]
    return np.tril(toeplitz(column))


def workload(rounds: int, momentum: float) -> np.ndarray:
    """What a server with momentum makes of the rounds: naively, round after round."""
    rows, velocity, model = [], np.zeros(rounds), np.zeros(rounds)
    for step in np.eye(rounds):
        velocity = momentum * velocity + step
        model = model + velocity
        rows.append(model)
    return np.stack(rows)


@pytest.mark.parametrize(("momentum", "bands"), PUBLISHED)
def test_sensitivity_and_errors_are_those_of_a_published_code(momentum: float, bands: int) -> None:
    c = square_root(bands, momentum)
    squared, of_three, mean, last = PUBLISHED[momentum, bands]
    errors = model_noise(c, 100, momentum) ** 2
    assert sensitivity(c, 100, 100) ** 2 == pytest.approx(squared, rel=1e-12)
    assert sensitivity(c, 100, 3) ** 2 == pytest.approx(of_three, rel=1e-12)
    assert errors.mean() == pytest.approx(mean, rel=1e-12)
    assert errors[-1] == pytest.approx(last, rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_with_all_bands_the_factor_is_the_square_root_of_the_workload(momentum: float) -> None:
    c = factor(square_root(12, momentum), 12)
    scaled = c / c[0, 0]
    np.testing.assert_allclose(scaled @ scaled, workload(12, momentum), atol=1e-12)


@pytest.mark.parametrize(("bands", "momentum"), [(1, 0.0), (3, 0.0), (4, 0.9), (9, 0.3)])
def test_inverse_and_errors_are_those_of_the_matrices(bands: int, momentum: float) -> None:
    c = square_root(bands, momentum)
    assert math.hypot(*c) == pytest.approx(1.0, abs=1e-15)
    inverted = np.linalg.inv(factor(c, 9))
    np.testing.assert_allclose(inverse(c, 9), inverted[:, 0], atol=1e-12)
    errors = np.linalg.norm(workload(9, momentum) @ inverted, axis=1)
    np.testing.assert_allclose(model_noise(c, 9, momentum), errors, atol=1e-12)
    independent = np.linalg.norm(workload(9, momentum))
    assert remaining(c, 9, momentum) == pytest.approx(np.linalg.norm(errors) / independent)


def patterns(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """All rounds that a client may take part in, at least so far apart."""
    return [
        chosen
        for count in range(1, rounds + 1)
        for chosen in itertools.combinations(range(rounds), count)
        if all(later - earlier >= separation for earlier, later in itertools.pairwise(chosen))
    ]


def furthest(c: np.ndarray, chosen: tuple[int, ...]) -> float:
    """Most that updates of length 1 at these rounds move C X, whatever their directions.

    The move is sum_i C[:, t_i] u_i^T, whose square is sum_ij <C_i, C_j> <u_i, u_j>: with products that are
    not negative it is largest for equal u.
    """
    gram = c[:, chosen].T @ c[:, chosen]
    assert (gram >= -1e-15).all()
    return float(np.sqrt(gram.sum()))


@pytest.mark.parametrize("rounds", [1, 4, 7, 10])
@pytest.mark.parametrize("bands", [1, 2, 3, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_pattern_of_participation_moves_further(rounds: int, bands: int, momentum: float) -> None:
    coefficients = square_root(bands, momentum)
    c = factor(coefficients, rounds)
    for limit in (1, 2, 3, rounds):
        allowed = [p for p in patterns(rounds, bands) if len(p) <= limit]
        worst = max(furthest(c, pattern) for pattern in allowed)
        assert sensitivity(coefficients, rounds, limit) == pytest.approx(worst, rel=1e-12)
        most = max(map(len, allowed))
        assert most == most_participations(rounds, bands, limit)
        assert worst <= math.sqrt(most) * (1 + 1e-12)


@pytest.mark.parametrize("bands", [2, 3, 5])
def test_with_one_round_less_between_them_more_is_spent_than_charged(bands: int) -> None:
    """So the separation is what the claim rests on."""
    c = factor(square_root(bands), 10)
    worst = {p: furthest(c, p) for p in patterns(10, bands - 1)}
    assert max(moved / math.sqrt(len(p)) for p, moved in worst.items()) > 1.05


def test_the_closed_form_is_within_four_per_cent_of_the_optimum() -> None:
    """Mean squared errors of jax-privacy's ``optimize_banded_toeplitz``, 100 rounds."""
    best = {2: 26.848108527700926, 5: 13.087046002193476, 10: 8.681873898575267, 20: 6.582129930063607}
    for bands, mean in best.items():
        noise = math.sqrt((model_noise(square_root(bands), 100) ** 2).mean() / mean)
        assert 1.0 <= noise < 1.05, bands
