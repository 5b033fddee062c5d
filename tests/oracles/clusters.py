"""FedLEASE's clusters of clients (arXiv 2509.15087), set by set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.dense import Array


def clusters(matrices: Sequence[Sequence[Array]], most: int) -> list[set[int]]:
    """FedLEASE (arXiv 2509.15087, released code): clients by their B, layer by layer; naive, set by set.

    Average linkage over the mean of 1 - cos, the number of clusters from 2 to ``most`` by silhouette; all in
    one where none is above 0.
    """
    n = len(matrices)

    def away(one: Sequence[Array], other: Sequence[Array]) -> float:
        pairs = zip(one, other, strict=True)
        return float(np.mean([1 - np.sum(X * Y) / np.sqrt(np.sum(X * X) * np.sum(Y * Y)) for X, Y in pairs]))

    d = [[away(one, other) for other in matrices] for one in matrices]

    def between(one: set[int], other: set[int]) -> float:
        return float(np.mean([d[i][j] for i in one for j in other]))

    def score(parts: list[set[int]]) -> float:
        total = 0.0
        for part in parts:
            for i in part if len(part) > 1 else ():
                a = sum(d[i][j] for j in part - {i}) / (len(part) - 1)
                b = min(between({i}, other) for other in parts if other is not part)
                total += (b - a) / max(a, b)
        return total / n

    parts, best, found = [{i} for i in range(n)], 0.0, [set(range(n))]
    while len(parts) > 2:
        pairs = [(between(x, y), i, j) for i, x in enumerate(parts) for j, y in enumerate(parts) if i < j]
        _, i, j = min(pairs)
        parts = [*(p for k, p in enumerate(parts) if k not in (i, j)), parts[i] | parts[j]]
        if len(parts) <= most and score(parts) > best:
            best, found = score(parts), parts
    return found
