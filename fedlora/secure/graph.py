"""Who masks with whom: everybody with everybody, or the k nearest on a circle (Bell et al., CCS 2020).

With n clients in a random order on a circle, each masks with the k / 2 nearest on either side, and these and
itself hold its shares. k is the smallest for which, with a share COLLUDING of the clients telling the server
all they know and a share DROPPING vanishing, both drawn anyhow,

    P(some client has t colluding holders)                    <= 2^-40     its secrets would be the server's
    P(two gaps of k / 2 clients split the circle)             <= 2^-40     the server would learn two sums
    P(some client has fewer than t holders left)              <= 2^-20     the round would fail

by union bounds over clients with hypergeometric tails. Where no such k is below n - 1, everybody masks with
everybody, which holds for every set below t colluding clients. The order follows from all public keys, so
that each client finds its own neighbours and no list of them is taken on trust.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

COLLUDING, DROPPING = 0.2, 0.1
LEAK, FAILURE = 2.0**-40, 2.0**-20


@dataclass(frozen=True, slots=True)
class Graph:
    """Neighbours of each client, itself not among them, and how many of its holders give a secret."""

    neighbours: Mapping[int, frozenset[int]]
    threshold: int

    def holders(self, client: int) -> frozenset[int]:
        """Who holds shares of a client's secrets, itself among them."""
        return self.neighbours[client] | {client}


def graph_of(keys: Mapping[int, bytes], share: float) -> Graph:
    """The graph of a round.

    Args:
        keys: client -> its public keys.
        share: of a client's holders that give its secrets, above a half.
    """
    clients = sorted(keys)
    degree = degree_of(len(clients), share)
    if degree >= len(clients) - 1:
        found = {client: frozenset(clients) - {client} for client in clients}
        return Graph(found, threshold_of(len(clients) - 1, share))
    drawn = digest_of(keys)
    circle = sorted(clients, key=lambda c: hashlib.sha256(drawn + c.to_bytes(8, "big")).digest())
    half, n = degree // 2, len(circle)
    around = [*range(-half, 0), *range(1, half + 1)]
    found = {client: frozenset(circle[(i + j) % n] for j in around) for i, client in enumerate(circle)}
    return Graph(found, threshold_of(degree, share))


def digest_of(keys: Mapping[int, bytes]) -> bytes:
    """Digest of all public keys of a round."""
    everything = b"".join(client.to_bytes(8, "big") + keys[client] for client in sorted(keys))
    return hashlib.sha256(everything).digest()


def threshold_of(degree: int, share: float) -> int:
    """How many of a client's ``degree + 1`` holders give its secrets."""
    return math.ceil(share * (degree + 1) - 1e-9)


def colluders_held(least: int, asked: int, share: float) -> int:
    """The most clients that tell the server all they know and take off nobody's mask.

    Args:
        least: the fewest clients of a sum.
        asked: the most of a round.
        share: as in `graph_of`.
    """
    everybody = degree_of(asked, share) >= asked - 1
    return threshold_of(least - 1, share) - 1 if everybody else int(COLLUDING * least)


@lru_cache
def degree_of(clients: int, share: float) -> int:
    """Neighbours of each of so many clients; see the module."""
    bad, gone, others = int(COLLUDING * clients), int(DROPPING * clients), clients - 1
    for degree in range(2, others, 2):
        threshold = threshold_of(degree, share)
        exposed = clients * _tail(others, bad, degree, threshold)
        lost = clients * _tail(others, gone, degree, degree + 2 - threshold)
        split = clients**2 / 2 * (COLLUDING + DROPPING) ** degree
        if exposed <= LEAK and split <= LEAK and lost <= FAILURE:
            return degree
    return others


def _tail(population: int, marked: int, drawn: int, least: int) -> float:
    """P(at least so many marked among the drawn), without replacement."""
    ways = math.comb(population, drawn)
    hits = range(least, min(marked, drawn) + 1)
    return sum(math.comb(marked, i) * math.comb(population - marked, drawn - i) for i in hits) / ways
