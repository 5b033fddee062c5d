"""One client of one round of secure aggregation (Bonawitz et al., CCS 2017), as values that a node can keep.

    advertise   two key pairs; both public keys go out
    share       b and the masking key, each shared t of k + 1 by Shamir's scheme, sealed for each neighbour
    mask        y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)    (mod 2^bits)
    confirm     who uploaded; where nodes have keys of their own it signs that list, and no other in a round
    unmask      of each neighbour that uploaded the share of b, of each that did not the share of its key

v goes over u's neighbours that shared. s_uv follows from what all started from, too: masks of clients that
were sent other values or another configuration do not cancel. Both kinds of share of one client are never
told, or its mask would come off; and no two clients go by unlike lists of who uploaded, or the keys of all
others would, and with them the pair masks of one. So a client goes by one list, answers once, and then has
no secrets any more. Lists of which too few hold a client's shares are refused: with them its round can only
fail. Where clients are asked unlike things a list has to name enough of those that started as this one did.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedlora.errors import SecureRefused
from fedlora.secure.graph import Graph, digest_of, graph_of, threshold_of
from fedlora.secure.masks import KEY_BYTES, Unsigned, add_expanded, agree, bytes_of, public_of, seal, unseal
from fedlora.secure.shamir import SHARE_BYTES, split

ADVERTISED, SHARED, UPLOADED, CONFIRMED = "advertised", "shared", "uploaded", "confirmed"
"""What a client has done last."""
PUBLIC_BYTES = 2 * KEY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds in a round, for server and clients alike.

    Attributes:
        min_clients: the fewest that a sum may be of.
        share: of a client's holders that give its secrets, above a half.
        bits: of the modulus, 16, 24, 32 or 64.
    """

    min_clients: int
    share: float
    bits: int

    def least_of(self, holders: int) -> int:
        """How many of so many holders give a secret."""
        return threshold_of(holders - 1, self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """A client between two messages of a round; every field is of a kind that Flower's records hold.

    Attributes:
        session: the round's, from the server.
        partition: whose it is.
        done: see `ADVERTISED`.
        sealing, masking: private keys, for shares and for masks.
        own: the seed of its own mask, b.
        partitions, keys: everybody's public keys, those for sealing before those for masking.
        sharers: clients that masks are for, itself among them.
        survivors: clients that are in the sum.
        begun: what all clients of the round started from, see `common_start`.
        alike: clients that started from what it did, where they are counted.
        holds: of whom it holds shares, and in ``shares`` b's before the key's.
    """

    session: str
    partition: int
    done: str
    sealing: bytes
    masking: bytes
    own: bytes = b""
    partitions: tuple[int, ...] = ()
    keys: tuple[bytes, ...] = ()
    sharers: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    begun: bytes = b""
    alike: tuple[int, ...] = ()
    holds: tuple[int, ...] = ()
    shares: tuple[bytes, ...] = field(default=(), repr=False)

    def kept(self) -> dict[str, Any]:
        """The fields as plain values; empty lists are left out."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {key: value for key, value in values.items() if value != []}

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Participant:
        """The client that `kept` wrote down."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        return cls(**values)

    @property
    def public(self) -> bytes:
        """Its two public keys."""
        return public_of(self.sealing) + public_of(self.masking)

    # --- the steps --------------------------------------------------------------------------------------

    @classmethod
    def advertise(cls, session: str, partition: int) -> Participant:
        """A client with fresh keys."""
        sealing, masking = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(KEY_BYTES)
        return cls(session=session, partition=partition, done=ADVERTISED, sealing=sealing, masking=masking)

    def share(self, keys: Mapping[int, bytes], terms: Terms) -> tuple[Participant, dict[int, bytes], bytes]:
        """Share both secrets with the neighbours.

        Args:
            keys: client -> its two public keys, of all that are in the round.
            terms: of the round.

        Returns:
            The client after it; what is sealed for each neighbour; and a digest of b, by which a server
            sees that it put the right one together.

        Raises:
            SecureRefused: out of turn, fewer clients than the least, other keys for itself, or keys twice.
        """
        self._expects(ADVERTISED)
        _enough(len(keys), terms, "advertise keys")
        if keys.get(self.partition) != self.public:
            raise SecureRefused("the keys that are told for this client are not its own")
        halves = [key[:KEY_BYTES] for key in keys.values()] + [key[KEY_BYTES:] for key in keys.values()]
        if any(len(key) != PUBLIC_BYTES for key in keys.values()) or len(set(halves)) < len(halves):
            raise SecureRefused(
                "the keys that are told are not two of 32 bytes for each client, all different"
            )
        graph, own = graph_of(keys, terms.share), secrets.token_bytes(KEY_BYTES)
        holders = {client + 1: client for client in graph.holders(self.partition)}
        of_own, of_key = (split(secret, graph.threshold, holders) for secret in (own, self.masking))
        pairs = {client: of_own[x] + of_key[x] for x, client in holders.items()}
        mine = pairs.pop(self.partition)
        sealed = {v: seal(self._seals(keys[v], self.partition, v), pair) for v, pair in pairs.items()}
        after = replace(
            self, done=SHARED, own=own, partitions=tuple(sorted(keys)),
            keys=tuple(keys[client] for client in sorted(keys)), holds=(self.partition,), shares=(mine,),
        )  # fmt: skip
        return after, sealed, hashlib.sha256(own).digest()

    def mask(
        self, sharers: Sequence[int], sealed: Mapping[int, bytes], values: Unsigned, terms: Terms,
        begun: bytes = b"", alike: Iterable[int] = (),
    ) -> tuple[Participant, Unsigned]:  # fmt: skip
        """The values under all masks.

        Args:
            sharers: all clients that shared.
            sealed: what its neighbours among them sealed for it.
            values: integers modulo 2^bits.
            terms: of the round.
            begun: see `common_start`.
            alike: clients that start as this one does, of which no sum may have too few; none: all do.

        Raises:
            SecureRefused: out of turn, too few or unknown clients, or a share that does not open.
        """
        self._expects(SHARED)
        there, keys = set(sharers), self._everybody
        _enough(len(there), terms, "share their secrets")
        if not there <= keys.keys() or self.partition not in there:
            raise SecureRefused("the clients that share are not all among those with keys, or not this one")
        self._held(there, terms, "share their secrets")
        begun_alike = tuple(sorted(alike))
        _enough_alike(there, begun_alike, terms)
        near = self._graph(terms).neighbours[self.partition] & there
        if sealed.keys() != near:
            raise SecureRefused("the sealed shares are not those of this client's neighbours")
        opened = {v: unseal(self._seals(keys[v], v, self.partition), text) for v, text in sealed.items()}
        if any(len(pair) != 2 * SHARE_BYTES for pair in opened.values()):
            raise SecureRefused("a sealed share is not of a pair")
        total = values.astype(f"<u{bytes_of(terms.bits)}")
        add_expanded(total, self.own)
        for v in sorted(near):
            key = pair_key(self.masking, keys[v], self.session, self.partition, v, begun)
            add_expanded(total, key, positive=self.partition < v)
        after = replace(
            self, done=UPLOADED, own=b"", masking=b"", sealing=b"", sharers=tuple(sorted(there)),
            begun=begun, alike=begun_alike,
            holds=(*self.holds, *sorted(opened)), shares=(*self.shares, *(opened[v] for v in sorted(opened))),
        )  # fmt: skip
        return after, total

    def confirm(self, survivors: Sequence[int], terms: Terms) -> Participant:
        """Go by this list of who uploaded, and by no other.

        Raises:
            SecureRefused: out of turn, too few or unknown clients, or not this one among them.
        """
        self._expects(UPLOADED)
        there = set(survivors)
        _enough(len(there), terms, "are in the sum")
        if not there <= set(self.sharers) or self.partition not in there:
            raise SecureRefused("the clients of the sum are not all among those that shared, or not this one")
        self._held(there, terms, "are in the sum")
        _enough_alike(there, self.alike, terms)
        return replace(self, done=CONFIRMED, survivors=tuple(sorted(there)))

    def agreed(self, terms: Terms) -> tuple[bytes | int, ...]:
        """What it signs of the sum, see `agreement`."""
        return agreement(self._everybody, terms, self.survivors, self.begun)

    def unmask(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """Shares of b of who uploaded, and of the masking key of who did not, by client; the last step.

        Raises:
            SecureRefused: out of turn.
        """
        self._expects(CONFIRMED)
        there, pairs = set(self.survivors), dict(zip(self.holds, self.shares, strict=True))
        of_own = {v: pair[:SHARE_BYTES] for v, pair in pairs.items() if v in there}
        return of_own, {v: pair[SHARE_BYTES:] for v, pair in pairs.items() if v not in there}

    # --- pieces -----------------------------------------------------------------------------------------

    @property
    def _everybody(self) -> dict[int, bytes]:
        return dict(zip(self.partitions, self.keys, strict=True))

    def _graph(self, terms: Terms) -> Graph:
        return graph_of(self._everybody, terms.share)

    def _held(self, there: set[int], terms: Terms, what: str) -> None:
        graph = self._graph(terms)
        held = len(graph.holders(self.partition) & there)
        if held < graph.threshold:
            raise SecureRefused(f"{held} of this client's holders {what}, the least is {graph.threshold}")

    def _seals(self, public: bytes, sender: int, receiver: int) -> bytes:
        purpose = f"fedlora share {self.session} {sender} {receiver}"
        return agree(self.sealing, public[:KEY_BYTES], purpose)

    def _expects(self, done: str) -> None:
        if self.done != done:
            raise SecureRefused(f"out of turn: this client has {self.done}, what is asked follows on {done}")


def agreement(
    keys: Mapping[int, bytes], terms: Terms, survivors: Iterable[int], begun: bytes = b""
) -> tuple[bytes | int, ...]:
    """What clients sign of a sum: keys, modulus, how many holders it takes, the start, and who is in it."""
    return digest_of(keys), terms.bits, f"{terms.share:.6f}".encode(), begun, *sorted(survivors)


def common_start(starts: Mapping[int, bytes]) -> bytes:
    """A digest of what each client of a round starts from, by their digests of it."""
    told = b"".join(f"{client} {starts[client].hex()}\n".encode() for client in sorted(starts))
    return hashlib.sha256(told).digest()


def pair_key(masking: bytes, public: bytes, session: str, one: int, other: int, begun: bytes = b"") -> bytes:
    """The key of the mask between two clients, the same from either side if they agree on the start."""
    low, high = sorted((one, other))
    return agree(masking, public[KEY_BYTES:], f"fedlora mask {session} {low} {high} {begun.hex()}")


def _enough_alike(there: set[int], alike: tuple[int, ...], terms: Terms) -> None:
    if alike:
        _enough(len(there.intersection(alike)), terms, "in the sum start as this one does")


def _enough(clients: int, terms: Terms, what: str) -> None:
    if clients < terms.min_clients:
        raise SecureRefused(f"{clients} clients {what}, the least is {terms.min_clients}")
