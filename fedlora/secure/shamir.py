"""Shamir's secret sharing (Commun. ACM 22:11, 1979) of 32 bytes over a prime field.

    f(x) = secret + c_1 x + .. + c_{t-1} x^{t-1}  (mod P),    P = 2^256 + 297,    holder x > 0 has f(x)

Any t shares give f(0); t - 1 shares are compatible with every secret alike. pycryptodome, which comes with
Flower, shares 16 bytes over GF(2^128) in pure Python: to combine 27 shares of one secret takes it a quarter
of a second, and a server combines one for each client.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
"""The smallest prime that all secrets of 32 bytes are below."""
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, threshold: int, holders: Iterable[int]) -> dict[int, bytes]:
    """One share for each holder, of which ``threshold`` give the secret.

    Args:
        secret: 32 bytes.
        threshold: from 1 to the number of holders.
        holders: different numbers >= 1.

    Raises:
        ValueError: another length, a holder below 1 or twice, or a threshold that they cannot reach.
    """
    points = list(holders)
    if len(secret) != SECRET_BYTES or len(set(points)) < len(points) or any(x < 1 for x in points):
        raise ValueError("a secret has 32 bytes, holders are different numbers >= 1")
    if not 1 <= threshold <= len(points):
        raise ValueError(f"threshold {threshold} of {len(points)} holders")
    drawn = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return shares_of([int.from_bytes(secret, "big"), *drawn], points)


def shares_of(coefficients: Sequence[int], holders: Iterable[int]) -> dict[int, bytes]:
    """``f(x)`` for each holder x, by Horner's scheme; the secret is the first coefficient."""
    shares = {}
    for x in holders:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares[x] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly the shares that are enough; wrong ones give another, or none.

    Raises:
        ValueError: no shares, or they are those of no secret of 32 bytes.
    """
    if not shares:
        raise ValueError("there are no shares")
    weights = _at_zero(tuple(sorted(shares)))
    value = sum(w * int.from_bytes(shares[x], "big") for x, w in weights.items()) % PRIME
    if value >= 2**256:
        raise ValueError("the shares are those of no secret")
    return value.to_bytes(SECRET_BYTES, "big")


@lru_cache(maxsize=256)
def _at_zero(points: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights of f(x) in f(0): prod_{y != x} y / (y - x)."""
    weights = {}
    for x in points:
        above = below = 1
        for y in points:
            if y != x:
                above, below = above * y % PRIME, below * (y - x) % PRIME
        weights[x] = above * pow(below, -1, PRIME) % PRIME
    return weights
