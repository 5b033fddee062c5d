"""A round of secure aggregation between values, in which clients vanish as they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlora.secure.collector import Collector
from fedlora.secure.masks import Unsigned, bytes_of, packed, unpacked
from fedlora.secure.participant import Participant, Terms

KEYS, SHARES, UPLOAD, UNMASK, NEVER = range(5)
"""The first step that a client does not answer."""


@dataclass(slots=True, kw_only=True)
class Round:
    """Everything that anybody has seen of a round, and in ``before`` each client's secrets at upload."""

    terms: Terms
    values: Mapping[int, Unsigned]
    vanish: Mapping[int, int] = field(default_factory=dict)
    collector: Collector = field(init=False)
    clients: dict[int, Participant] = field(default_factory=dict)
    before: dict[int, Participant] = field(default_factory=dict)
    uploads: dict[int, Unsigned] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.collector = Collector(terms=self.terms)

    def there(self, step: int) -> list[int]:
        return [
            c for c in self.values if self.vanish.get(c, NEVER) > step and (step == KEYS or c in self.clients)
        ]

    def run(self) -> Unsigned:
        """The sum that the server learns."""
        collector = self.collector
        for c in self.there(KEYS):
            self.clients[c] = Participant.advertise(collector.session, c)
            collector.take_keys(c, self.clients[c].public)
        collector.close_keys()
        for c in self.there(SHARES):
            self.clients[c], sealed, digest = self.clients[c].share(collector.keys, self.terms)
            collector.take_shares(c, sealed, digest)
        collector.close_shares()
        for c in self.there(UPLOAD):
            self.before[c] = self.clients[c]
            self.clients[c], masked = self.clients[c].mask(
                sorted(collector.sealed), collector.sealed_for(c), self.values[c], self.terms
            )
            self.uploads[c] = unpacked(packed(masked, self.terms.bits), self.terms.bits)
            collector.take_masked(c, self.uploads[c])
        collector.close_masked()
        for c in self.there(UNMASK):
            kept = Participant.of(self.clients[c].kept())
            collector.take_unmasking(c, *kept.confirm(sorted(collector.survivors), self.terms).unmask())
        return low(collector.total(), self.terms.bits)


def drawn(clients: int, numbers: int, bits: int = 32, seed: int = 0) -> dict[int, Unsigned]:
    """Uniform values of so many clients."""
    generator, kind = np.random.default_rng(seed), np.dtype(f"<u{bytes_of(bits)}")
    return {c: generator.integers(0, 2**bits, numbers, dtype=kind.type) for c in range(clients)}


def low(values: Unsigned, bits: int) -> Unsigned:
    """The low bits, which are all that is meant."""
    return unpacked(packed(values, bits), bits)


def plain_sum(values: Mapping[int, Unsigned], clients: list[int], bits: int = 32) -> Unsigned:
    """The sum of some clients' values modulo 2^bits."""
    total = np.zeros_like(next(iter(values.values())))
    for c in clients:
        total = total + values[c]
    return low(total, bits)
