"""Which clients take part in a round: partitions are sampled, never node ids, from a seeded stream."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.seeding import stream


def sample_partitions(
    available: Iterable[int], fraction: float, minimum: int, seed: int, server_round: int
) -> list[int]:
    """The sorted partition ids of one round: ``max(minimum, floor(fraction * n))`` of the available.

    The draw depends on the seed, the round and the set of available partitions only.

    >>> sample_partitions(range(10), 0.3, 1, seed=0, server_round=1)
    [2, 4, 6]
    """
    everyone = sorted(available)
    count = min(len(everyone), max(minimum, int(fraction * len(everyone) + 1e-9)))
    shuffled = stream(seed, "sampling", server_round).permutation(len(everyone))
    return sorted(everyone[i] for i in shuffled[:count])
