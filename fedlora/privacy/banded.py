"""Banded matrix factorisation: Gaussian noise of which later rounds take back what earlier ones added.

Choquette-Choo, Ganesh, McKenna, McMahan, Rush, Thakurta, Xu, "(Amplified) Banded Matrix Factorization",
NeurIPS 2023 (arXiv 2306.08153). With X the clipped sums of n rounds (n x d), S the clipping norm, Z of
independent N(0, 1) and C lower-triangular (n x n), what is published of all rounds is

    X + z S C^-1 Z  =  C^-1 (C X + z S Z),

the Gaussian mechanism on C X, post-processed; that a round's sum depends on what was published before changes
nothing (Denisov et al., NeurIPS 2022).

*Sensitivity.* A client that takes part in rounds t_1 < ... < t_k, with updates u_i at most S long, moves C X
by sum_i C[:, t_i] u_i^T. Where C has b bands and the rounds are at least b apart, these columns of C have no
row in common, so that the squared length is sum_i |C[:, t_i]|^2 |u_i|^2 <= k S^2 for columns at most 1 long:
k rounds cost what k rounds of independent noise z cost. Nothing is counted for the sampling of clients.

*The factor* is the square root of what the server makes of the rounds, cut to b bands (Kalinin and Lampert,
"Banded Square Root Matrix Factorization", NeurIPS 2024, arXiv 2405.13763): with momentum beta the model after
round t is sum_s a_{t-s} x_s, where a(x) = 1 / ((1 - x) (1 - beta x)), so

    c_j = sum_{i <= j} r_i beta^i r_{j-i},      r_i = |binom(-1/2, i)|,      j < b,

divided by its length. No solver, so the bits are those of a few products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Coefficients = Sequence[float]
"""First column of C down to its last band: C[t, s] = c[t - s]."""


def square_root(bands: int, momentum: float = 0.0) -> tuple[float, ...]:
    """Coefficients c of the banded square root, of length 1.

    Args:
        bands: b, at least 1; 1 is independent noise.
        momentum: beta of the server, in [0, 1).

    >>> [round(c / square_root(4)[0], 4) for c in square_root(4)]
    [1.0, 0.5, 0.375, 0.3125]
    >>> square_root(1)
    (1.0,)
    """
    r = [1.0]
    for i in range(1, bands):
        r.append(r[-1] * (2 * i - 1) / (2 * i))
    whole = [math.fsum(r[i] * momentum**i * r[j - i] for i in range(j + 1)) for j in range(bands)]
    length = math.sqrt(math.fsum(c * c for c in whole))
    return tuple(c / length for c in whole)


def inverse(coefficients: Coefficients, rounds: int) -> NDArray[np.float64]:
    """The first column of C^-1, which is Toeplitz as well: sum_{j <= t} c_j w_{t-j} is 1 at t = 0, else 0."""
    w = np.zeros(rounds)
    for t in range(rounds):
        taken_back = math.fsum(c * w[t - j] for j, c in enumerate(coefficients[: t + 1]) if j)
        w[t] = ((t == 0) - taken_back) / coefficients[0]
    return w


def sensitivity(coefficients: Coefficients, rounds: int, participations: int) -> float:
    """Most that a client moves C X, in clipping norms, whose rounds are at least as far apart as C has bands.

    The columns at the end are cut off, so early rounds are the worst: 1, 1 + b, 1 + 2b and on. It is at
    most sqrt(participations), which is what is charged.

    >>> round(sensitivity(square_root(4), 8, 2), 6)
    1.414214
    """
    bands = len(coefficients)
    return math.sqrt(
        math.fsum(
            c * c
            for taken in range(most_participations(rounds, bands, participations))
            for c in coefficients[: rounds - taken * bands]
        )
    )


def most_participations(rounds: int, bands: int, limit: int = 0) -> int:
    """Rounds that one client can take part in, at least b apart.

    Args:
        rounds: n.
        bands: b.
        limit: of the server; 0 is none.

    >>> most_participations(100, 8), most_participations(100, 8, 5)
    (13, 5)
    """
    fitting = -(-rounds // bands)
    return min(limit, fitting) if limit else fitting


def model_noise(coefficients: Coefficients, rounds: int, momentum: float = 0.0) -> NDArray[np.float64]:
    """Standard deviation of the noise in the model after each round, in units of z S, at a server rate of 1.

    Args:
        coefficients: c.
        rounds: n.
        momentum: beta of the server.

    >>> model_noise((1.0,), 4).round(4)
    array([1.    , 1.4142, 1.7321, 2.    ])
    """
    steps = (1 - momentum ** np.arange(1, rounds + 1)) / (1 - momentum)
    in_model = np.convolve(steps, inverse(coefficients, rounds))[:rounds]
    return np.asarray(np.sqrt(np.cumsum(in_model**2)), dtype=np.float64)


def remaining(coefficients: Coefficients, rounds: int, momentum: float = 0.0) -> float:
    """The model's noise over all rounds (root mean square) as a share of what independent noise would be.

    >>> remaining(square_root(1), 100)
    1.0
    """
    of = [model_noise(c, rounds, momentum) for c in (coefficients, (1.0,))]
    return float(np.linalg.norm(of[0]) / np.linalg.norm(of[1]))
