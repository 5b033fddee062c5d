"""The server of one round of secure aggregation: it puts masks together again, and learns the sum alone.

    sum_u x_u = sum_u y_u - sum_u PRG(b_u) - (pair masks of u with those that did not upload)

b of who uploaded, and the masking key of who shared and did not, come from t of their holders' shares. Who
answers wrongly is refused with a reason and counts as vanished; a step that too few are left for fails.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedlora.errors import RunFailed, SecureRefused
from fedlora.secure.graph import Graph, graph_of
from fedlora.secure.masks import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Unsigned, add_expanded, public_of
from fedlora.secure.participant import PUBLIC_BYTES, Terms, agreement, pair_key
from fedlora.secure.shamir import SHARE_BYTES, combine

SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
Shares = dict[int, dict[int, bytes]]
"""Client -> holder -> its share."""


@dataclass(slots=True, kw_only=True)
class Collector:
    """What came so far of a round.

    Attributes:
        terms: of the round.
        session: its name, new each time.
        keys: client -> its public keys.
        graph: once all keys are there.
        sealed: client -> neighbour -> what it sealed for it.
        digests: client -> digest of its b.
        masked: the running sum of what was uploaded.
        survivors: clients whose values are in it.
        begun: what all start from, see `fedlora.secure.participant.common_start`.
    """

    terms: Terms
    session: str = field(default_factory=lambda: secrets.token_hex(16))
    keys: dict[int, bytes] = field(default_factory=dict)
    graph: Graph | None = None
    sealed: Shares = field(default_factory=dict)
    digests: dict[int, bytes] = field(default_factory=dict)
    masked: Unsigned | None = None
    survivors: set[int] = field(default_factory=set)
    begun: bytes = b""
    _own: Shares = field(default_factory=dict)
    _pair: Shares = field(default_factory=dict)
    _answered: set[int] = field(default_factory=set)

    def take_keys(self, client: int, keys: bytes) -> None:
        """A client's two public keys.

        Raises:
            SecureRefused: they are not two of 32 bytes, somebody has one of them, or it sent some before.
        """
        known = {half for key in self.keys.values() for half in (key[:KEY_BYTES], key[KEY_BYTES:])}
        own = {keys[:KEY_BYTES], keys[KEY_BYTES:]}
        if len(keys) != PUBLIC_BYTES or len(own) < 2 or own & known or client in self.keys:
            raise SecureRefused("its public keys are not two of 32 bytes that nobody else has")
        self.keys[client] = keys

    def close_keys(self) -> None:
        """All keys are there."""
        self._enough(self.keys, "sent keys")
        self.graph = graph_of(self.keys, self.terms.share)

    def take_shares(self, client: int, sealed: Mapping[int, bytes], digest: bytes) -> None:
        """What a client sealed for its neighbours.

        Raises:
            SecureRefused: it has no keys here or shared before, or shares for others, or of another length.
        """
        assert self.graph is not None
        wanted = self.graph.neighbours.get(client, frozenset())
        fits = sealed.keys() == wanted and {len(text) for text in sealed.values()} <= {SEALED_BYTES}
        if client not in self.keys or client in self.sealed or not fits or len(digest) != KEY_BYTES:
            raise SecureRefused("its sealed shares are not one for each of its neighbours")
        self.sealed[client], self.digests[client] = dict(sealed), digest

    def close_shares(self) -> None:
        """All shares are there."""
        self._enough(self.sealed, "shared their secrets")
        self._held(self.sealed, "shared")

    def sealed_for(self, client: int) -> dict[int, bytes]:
        """What the neighbours of a client that shared sealed for it."""
        assert self.graph is not None
        return {v: self.sealed[v][client] for v in sorted(self.graph.neighbours[client]) if v in self.sealed}

    def take_masked(self, client: int, values: Unsigned) -> None:
        """Add a client's masked values.

        Raises:
            SecureRefused: it did not share, or uploaded before.
        """
        if client not in self.sealed or client in self.survivors:
            raise SecureRefused("it did not share its secrets, or it has uploaded before")
        self.masked = values.copy() if self.masked is None else np.add(self.masked, values, out=self.masked)
        self.survivors.add(client)

    def close_masked(self) -> None:
        """Everything is uploaded that will be."""
        self._enough(self.survivors, "uploaded")
        self._held(self.survivors, "uploaded")

    def agreed(self) -> tuple[bytes | int, ...]:
        """What clients sign of the sum, see `Participant.agreed`."""
        return agreement(self.keys, self.terms, self.survivors, self.begun)

    def take_unmasking(self, client: int, own: Mapping[int, bytes], pair: Mapping[int, bytes]) -> None:
        """Shares that a client holds, of b and of masking keys.

        Raises:
            SecureRefused: not asked, answered before, or shares of others, or of another kind than was asked.
        """
        assert self.graph is not None
        if client not in self.survivors or client in self._answered:
            raise SecureRefused("it was not asked for shares, or has told them before")
        holds = self.graph.holders(client) & self.sealed.keys()
        there, gone = holds & self.survivors, holds - self.survivors
        lengths = {len(share) for share in (*own.values(), *pair.values())}
        if own.keys() != there or pair.keys() != gone or lengths != {SHARE_BYTES}:
            raise SecureRefused("it told other shares than it was asked for")
        self._answered.add(client)
        for target, told in ((self._own, own), (self._pair, pair)):
            for owner, share in told.items():
                target.setdefault(owner, {})[client + 1] = share

    def total(self) -> Unsigned:
        """The sum of the survivors' values, without masks.

        Raises:
            RunFailed: too few shares of somebody, or shares that are not those of its secret.
        """
        assert self.graph is not None
        assert self.masked is not None
        total = self.masked.copy()
        for client in sorted(self.survivors):
            own = self._secret(client, self._own)
            if hashlib.sha256(own).digest() != self.digests[client]:
                raise RunFailed(f"secure sums: the shares of partition {client}'s own mask are not its own")
            add_expanded(total, own, positive=False)
        for client in sorted(self.sealed.keys() - self.survivors):
            near = sorted(self.graph.neighbours[client] & self.survivors)
            if not near:
                continue
            masking = self._secret(client, self._pair)
            if public_of(masking) != self.keys[client][KEY_BYTES:]:
                raise RunFailed(f"secure sums: the shares of partition {client}'s key are not its own")
            for v in near:
                key = pair_key(masking, self.keys[v], self.session, client, v, self.begun)
                add_expanded(total, key, positive=client < v)
        return total

    def _secret(self, client: int, shares: Shares) -> bytes:
        assert self.graph is not None
        held, wanted = shares.get(client, {}), self.graph.threshold
        if len(held) < wanted:
            raise RunFailed(
                f"secure sums: {len(held)} shares of partition {client}'s secret are left, {wanted} needed"
            )
        try:
            return combine(dict(sorted(held.items())[:wanted]))
        except ValueError as error:
            raise RunFailed(f"secure sums: partition {client}: {error}") from None

    def _held(self, there: Collection[int], what: str) -> None:
        """Whether enough hold the shares of each of these clients: else its mask can never come off."""
        assert self.graph is not None
        for client in sorted(there):
            held = len(self.graph.holders(client).intersection(there))
            if held < self.graph.threshold:
                raise RunFailed(
                    f"secure sums: {held} of partition {client}'s holders {what}, {self.graph.threshold} "
                    f"needed (secure.threshold = {self.terms.share:g})"
                )

    def _enough(self, clients: Iterable[int], what: str) -> None:
        there = len(set(clients))
        if there < self.terms.min_clients:
            raise RunFailed(
                f"secure sums: {there} clients {what}, secure.min-clients = {self.terms.min_clients}"
            )
