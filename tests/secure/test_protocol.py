"""The server learns the sum of who uploaded, whoever vanishes when; what is wrong is refused."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import combinations_with_replacement
from operator import ne

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import RunFailed, SecureRefused
from fedlora.secure.collector import Collector
from fedlora.secure.graph import graph_of, threshold_of
from fedlora.secure.masks import add_expanded
from fedlora.secure.participant import Participant, Terms, pair_key
from fedlora.secure.shamir import combine
from tests.secure.rounds import KEYS, SHARES, UNMASK, UPLOAD, Round, drawn, low, plain_sum

TERMS = Terms(min_clients=2, share=2 / 3, bits=32)


def expected(vanish: dict[int, int]) -> list[int] | None:
    """Who is in the sum of 5 clients that are all neighbours; None where the round must fail."""
    keyed = [c for c, at in vanish.items() if at > KEYS]
    shared = [c for c, at in vanish.items() if at > SHARES]
    uploaded = [c for c, at in vanish.items() if at > UPLOAD]
    told = [c for c, at in vanish.items() if at > UNMASK]
    enough = len(uploaded) >= 2 and len(told) >= threshold_of(len(keyed) - 1, 2 / 3)
    return uploaded if enough and len(shared) >= 2 else None


@pytest.mark.parametrize("steps", list(combinations_with_replacement(range(5), 5)))
def test_every_pattern_of_vanishing_gives_the_sum_of_who_uploaded_or_fails(steps: tuple[int, ...]) -> None:
    """All 126 patterns up to who is who, each with two orders of the clients."""
    values = drawn(5, 3)
    for order in (range(5), np.random.default_rng(list(steps)).permutation(5).tolist()):
        vanish = dict(zip(order, steps, strict=True))
        there = expected(vanish)
        if there is None:
            with pytest.raises(RunFailed, match="secure sums: "):
                Round(terms=TERMS, values=values, vanish=vanish).run()
        else:
            total = Round(terms=TERMS, values=values, vanish=vanish).run()
            assert np.array_equal(total, plain_sum(values, there))


@pytest.mark.parametrize("bits", [16, 24, 32, 64])
def test_a_graph_of_few_neighbours_gives_the_same(bits: int) -> None:
    terms, values = Terms(min_clients=3, share=2 / 3, bits=bits), drawn(60, 5, bits)
    vanish = {4: SHARES, 9: UPLOAD, 31: UPLOAD, 40: UNMASK}
    done = Round(terms=terms, values=values, vanish=vanish)
    total = done.run()
    assert done.collector.graph is not None
    assert {len(near) for near in done.collector.graph.neighbours.values()} == {30}
    assert np.array_equal(total, plain_sum(values, [c for c in values if c not in (4, 9, 31)], bits))


def test_the_graph_is_symmetric_and_drawn_from_all_keys() -> None:
    keys = {c: bytes([c]) * 64 for c in range(100)}
    graph, other = graph_of(keys, 2 / 3), graph_of({**keys, 7: b"7" * 64}, 2 / 3)
    assert all(c in graph.neighbours[v] for c, near in graph.neighbours.items() for v in near)
    assert all(c not in near for c, near in graph.neighbours.items())
    assert graph.neighbours != other.neighbours
    assert graph.threshold == threshold_of(32, 2 / 3) == 22


# --- what colluders see -----------------------------------------------------------------------------------


def residual(done: Round, honest: int, colluding: set[int]) -> np.ndarray:
    """An upload less all that the server and the colluders know of it: b is told, so are their pair masks."""
    total = done.uploads[honest].copy()
    add_expanded(total, done.before[honest].own, positive=False)
    for v in colluding:
        key = pair_key(done.before[v].masking, done.collector.keys[honest], done.collector.session, honest, v)
        add_expanded(total, key, positive=honest > v)
    return low(total, done.terms.bits)


@pytest.mark.parametrize("value", [0, 1, 200])
def test_what_is_left_of_an_upload_is_uniform_whatever_is_in_it(value: int) -> None:
    """Modulo 2^8, five clients of which three tell all they know: chi-square over 256 classes."""
    numbers = 256 * 64
    values = {c: np.full(numbers, value if c == 0 else 17, np.uint32) for c in range(5)}
    done = Round(terms=Terms(min_clients=2, share=2 / 3, bits=8), values=values)
    done.run()
    left = residual(done, 0, {2, 3, 4})
    counts = Counter(left.tolist())
    statistic = sum((counts[i] - 64) ** 2 / 64 for i in range(256))
    assert 150 < statistic < 400  # 255 degrees of freedom: mean 255, standard deviation 22.6
    other = residual(done, 1, {2, 3, 4})
    assert np.array_equal(
        low(left + other, 8), low(values[0] + values[1], 8)
    )  # the sum of the honest is all there is
    assert np.array_equal(residual(done, 0, {1, 2, 3, 4}), values[0])  # against all others nothing helps


def split_lists(share: float) -> np.ndarray:
    """What is left of client 0's upload to a server that tells each of five clients a list of its own.

    Client 0 is told that 1 and 2 alone share with it, 3 and 4 that 1 and 2 vanished, 1 that 2 did, and 2 that
    1 did: so each of 1 and 2 has its masking key told by three.
    """
    terms, values = Terms(min_clients=2, share=share, bits=32), drawn(5, 3)
    done = Round(terms=terms, values=values)
    members = {c: Participant.advertise(done.collector.session, c) for c in range(5)}
    keys = {c: member.public for c, member in members.items()}
    sealed = {}
    for c in range(5):
        members[c], sealed[c], _ = members[c].share(keys, terms)
    told, left = {}, values[0]
    for c, (sharers, survivors) in {
        0: ([0, 1, 2], [0, 1, 2]), 1: (range(5), [0, 1, 3, 4]), 2: (range(5), [0, 2, 3, 4]),
        3: (range(5), [0, 3, 4]), 4: (range(5), [0, 3, 4]),
    }.items():  # fmt: skip
        for_it = {v: sealed[v][c] for v in sharers if v != c}
        members[c], upload = members[c].mask(list(sharers), for_it, values[c], terms)
        told[c] = members[c].confirm(survivors, terms).unmask()
        left = upload if c == 0 else left
    own = combine({c + 1: told[c][0][0] for c in (0, 3, 4)})
    add_expanded(left, own, positive=False)
    for v in (1, 2):
        masking = combine({c + 1: pair[v] for c, (_, pair) in told.items() if v in pair})
        add_expanded(left, pair_key(masking, keys[0], done.collector.session, 0, v), positive=False)
    return left - values[0]


def test_lists_that_differ_show_one_update_where_nobody_signs_and_few_holders_do() -> None:
    """Why nodes sign who is in the sum; at the default threshold five clients refuse such short lists."""
    assert not split_lists(0.51).any()
    with pytest.raises(SecureRefused, match="3 of this client's holders share their secrets, the least is 4"):
        split_lists(0.66)


# --- what is refused --------------------------------------------------------------------------------------


def shared(clients: int = 4) -> tuple[Collector, dict[int, Participant]]:
    collector = Collector(terms=TERMS)
    members = {c: Participant.advertise(collector.session, c) for c in range(clients)}
    for c, member in members.items():
        collector.take_keys(c, member.public)
    collector.close_keys()
    for c in members:
        members[c], sealed, digest = members[c].share(collector.keys, TERMS)
        collector.take_shares(c, sealed, digest)
    return collector, members


def uploaded() -> tuple[Collector, dict[int, Participant]]:
    collector, members = shared()
    for c in (0, 1, 2):  # 3 vanishes
        members[c], masked = members[c].mask(range(4), collector.sealed_for(c), np.zeros(2, np.uint32), TERMS)
        collector.take_masked(c, masked)
    return collector, members


def test_a_client_tells_one_kind_of_share_of_each_peer_and_has_nothing_else_left() -> None:
    _, members = uploaded()
    own, pair = members[0].confirm([0, 1, 2], TERMS).unmask()
    assert (set(own), set(pair)) == ({0, 1, 2}, {3})
    assert members[0].own == members[0].masking == members[0].sealing == b""
    with pytest.raises(SecureRefused, match="out of turn"):
        members[0].mask(range(4), {}, np.zeros(2, np.uint32), TERMS)
    assert "shares" not in repr(members[0])


@pytest.mark.parametrize(
    ("survivors", "why"),
    [
        ([0], "1 clients are in the sum, the least is 2"),
        ([0, 1, 9], "not all among"),
        ([1, 2], "not this one"),
        ([], "the least"),
    ],
)
def test_a_client_does_not_unmask(survivors: list[int], why: str) -> None:
    with pytest.raises(SecureRefused, match=why):
        uploaded()[1][0].confirm(survivors, TERMS).unmask()


def test_a_client_does_not_unmask_out_of_turn() -> None:
    with pytest.raises(SecureRefused, match="out of turn: this client has shared"):
        shared()[1][0].confirm([0, 1, 2], TERMS).unmask()


def test_a_client_does_not_share_with_what_it_does_not_know() -> None:
    one, two, three = (Participant.advertise("s", c) for c in range(3))
    keys = {0: one.public, 1: two.public, 2: three.public}
    for wrong, why in (
        ({0: one.public}, "1 clients advertise"),
        ({**keys, 0: two.public}, "not its own"),
        ({**keys, 2: two.public}, "all different"),
        ({**keys, 2: b"short"}, "two of 32 bytes"),
        ({1: two.public, 2: three.public}, "not its own"),
        ({**keys, 2: bytes(32) + three.public[32:]}, "no point"),
    ):
        with pytest.raises(SecureRefused, match=why):
            one.share(wrong, TERMS)


def test_a_client_does_not_mask_for_others_nor_with_shares_of_another_round() -> None:
    collector, members = shared()
    other, _ = shared()
    sealed, values = collector.sealed_for(0), np.zeros(2, np.uint32)
    for sharers, told, why in (
        ([0], {}, "1 clients share"),
        ([0, 1, 2, 3, 4], sealed, "not all among"),
        ([1, 2, 3], sealed, "not this one"),
        ([0, 1, 2], sealed, "not those of this client's neighbours"),
        (range(4), other.sealed_for(0), "does not open"),
        (range(4), {1: sealed[2], 2: sealed[1], 3: sealed[3]}, "does not open"),
        (range(4), {**sealed, 1: b""}, "cut short"),
    ):
        with pytest.raises(SecureRefused, match=why):
            members[0].mask(sharers, told, values, TERMS)


def test_the_server_takes_nothing_twice_nor_what_it_did_not_ask_for() -> None:
    collector, members = uploaded()
    own, pair = members[0].confirm([0, 1, 2], TERMS).unmask()
    wrong = [
        lambda: collector.take_keys(0, members[0].session.encode() * 2),
        lambda: collector.take_shares(0, collector.sealed[0], collector.digests[0]),
        lambda: collector.take_shares(9, {}, bytes(32)),
        lambda: collector.take_masked(0, np.zeros(2, np.uint32)),
        lambda: collector.take_masked(9, np.zeros(2, np.uint32)),
        lambda: collector.take_unmasking(3, own, pair),
        lambda: collector.take_unmasking(0, {}, {}),
        lambda: collector.take_unmasking(0, pair, own),
        lambda: collector.take_unmasking(0, {**own, 1: b""}, pair),
    ]
    for attempt in wrong:
        with pytest.raises(SecureRefused):
            attempt()
    collector.take_unmasking(0, own, pair)
    with pytest.raises(SecureRefused, match="told them before"):
        collector.take_unmasking(0, own, pair)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_lie_in_a_share_is_seen_and_never_a_wrong_sum(data: st.DataObject) -> None:
    collector, members = uploaded()
    liar = data.draw(st.sampled_from([0, 1, 2]))
    for c in (0, 1, 2):
        own, pair = members[c].confirm([0, 1, 2], TERMS).unmask()
        if c == liar:
            kind = data.draw(st.sampled_from([own, pair]))
            about = data.draw(st.sampled_from(sorted(kind)))
            other = st.binary(min_size=33, max_size=33)
            kind[about] = data.draw(other.filter(partial(ne, kind[about])))
        collector.take_unmasking(c, own, pair)
    with pytest.raises(RunFailed, match=r"partition \d"):
        collector.total()
