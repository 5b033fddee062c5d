"""HetLoRA: leading rows, weights by size, ranks that shrink, all the way to the clients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from clients.store import ClientStore, resolve
from fedlora import wire
from fedlora.core.factors import LoraFactors, as_product, norm
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, RankRegularizer, State
from fedlora.errors import ConfigError
from strategies import HetLoRA
from strategies.registry import make_rule
from strategies.rules.hetlora import HetLoRARule, tail, tail_shrank
from tests.federation.fake_grid import FakeGrid
from tests.federation.small import watched
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    numpy,
    relative,
)

RULE = HetLoRARule(gamma=0.5, min_rank=1)
RANK = 8
FEDERATION = Federation(
    modules={
        "layer.a": ModuleSpec(out_features=12, in_features=10),
        "layer.b": ModuleSpec(out_features=9, in_features=14),
    },
    rank=RANK,
    scaling=2.0,
    clients=tuple(ClientSpec(partition_id=p, rank=r, scaling=16.0 / r) for p, r in ((3, 8), (7, 4), (9, 2))),
    weights=(1.0, 2.0, 3.0),
    seed=4,
)


def answered(rule: HetLoRARule, state: State, factor: float, index: int = 0) -> ClientUpdate:
    """A client that sends back what it was sent, its tail times a factor."""
    client = FEDERATION.clients[index]
    given = rule.broadcast(state, client)
    rank = next(iter(given.adapters.values())).rank
    start, adapters = rule.pruned(rank), {}
    for name, f in given.adapters.items():
        A, B = f.A.clone(), f.B.clone()
        A[start:] *= factor
        B[:, start:] *= factor
        adapters[name] = LoraFactors(A, B, f.scaling)
    return ClientUpdate(
        partition_id=client.partition_id, adapters=adapters, head={}, weight=FEDERATION.weights[index]
    )


def rank_sent(rule: HetLoRARule, state: State, index: int = 0) -> int:
    given = rule.broadcast(state, FEDERATION.clients[index])
    return next(iter(given.adapters.values())).rank


# --- the server's mean --------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 6), outs=st.integers(1, 9), ins=st.integers(1, 9))
def test_sizes_by_gram_matrices_are_the_dense_ones(seed: int, rank: int, outs: int, ins: int) -> None:
    g = torch.Generator().manual_seed(seed)
    f = LoraFactors(torch.randn(rank, ins, generator=g), torch.randn(outs, rank, generator=g), 3.0)
    assert norm(as_product(f)) == pytest.approx(float(np.linalg.norm(numpy(f.delta()))), rel=1e-5, abs=1e-6)


def test_a_client_counts_by_the_size_of_its_product_and_not_by_its_examples() -> None:
    """One client ten times as large as the other: ten elevenths of the mean, at any p_k."""
    state = FEDERATION.start(RULE)
    one, two = (answered(RULE, state, 1.0, index=0) for _ in range(2))
    large = {n: LoraFactors(f.A, 10 * f.B, f.scaling) for n, f in one.adapters.items()}
    for weights in ((1.0, 1.0), (1.0, 50.0)):
        updates = [
            replace(one, adapters=large, weight=weights[0]),
            replace(two, partition_id=4, weight=weights[1]),
        ]
        after, _ = RULE.aggregate(state, updates)
        for name, f in after.adapters.items():
            expected = (10 * 10 + 1) / 11 * numpy(state.adapters[name].B)
            assert relative(numpy(f.B), expected) < 1e-12


@given(federation=federations(min_clients=2, equal_scalings=True))
def test_clients_of_equal_rank_and_size_are_averaged_as_by_fedavg_with_equal_weights(
    federation: Federation,
) -> None:
    rule = HetLoRARule()
    clients = tuple(replace(c, rank=federation.rank) for c in federation.clients)
    federation = replace(federation, clients=clients, weights=(1.0,) * len(clients))
    state = federation.start(rule)
    updates = [_of_size_one(u) for u in federation.updates(rule, state)]
    mine, theirs = (r.aggregate(state, updates)[0] for r in (rule, make_rule("fedavg")))
    for name, delta in effective(mine).items():
        assert relative(delta, effective(theirs)[name]) < 1e-9


def _of_size_one(update: ClientUpdate) -> ClientUpdate:
    sizes = {n: float(np.linalg.norm(numpy(f.delta()))) for n, f in update.adapters.items()}
    return replace(
        update,
        adapters={n: LoraFactors(f.A, f.B / sizes[n], f.scaling) for n, f in update.adapters.items()},
    )


def test_where_all_products_vanish_the_numbers_of_examples_count() -> None:
    state = FEDERATION.start(RULE)
    updates = [
        replace(u, adapters={n: replace(f, B=0 * f.B) for n, f in u.adapters.items()})
        for u in FEDERATION.updates(RULE, state)
    ]
    mine, theirs = (r.aggregate(state, updates)[0] for r in (RULE, make_rule("zero-padding")))
    for name, f in mine.adapters.items():
        assert relative(numpy(f.A), numpy(theirs.adapters[name].A)) < 1e-12


# --- ranks ---------------------------------------------------------------------------------------------


def test_a_client_has_the_leading_part_of_the_global_adapter() -> None:
    state = FEDERATION.start(RULE)
    for client in FEDERATION.clients:
        for name, f in RULE.broadcast(state, client).adapters.items():
            whole = state.adapters[name]
            leading = whole.scaling * whole.B[:, : client.rank] @ whole.A[: client.rank]
            assert relative(numpy(f.delta()), numpy(leading)) < 1e-12


@given(factor=st.floats(0.0, 3.0), seed=st.integers(0, 1000))
def test_a_client_is_pruned_where_its_tail_shrank_and_only_there(factor: float, seed: int) -> None:
    """The decision is monotone in the tail: below its start pruned, from there on not."""
    federation = replace(FEDERATION, seed=seed)
    state = federation.start(RULE)
    update = answered(RULE, state, factor)
    after, _ = RULE.aggregate(state, [update])
    assert rank_sent(RULE, after) == (4 if factor < 1 - 1e-9 else RANK)
    assert tail_shrank(state, update, 4) == (factor < 1 - 1e-9)


def test_ranks_shrink_step_by_step_down_to_the_least_and_never_grow() -> None:
    rule = HetLoRARule(gamma=0.5, min_rank=2)
    state, ranks = FEDERATION.start(rule), []
    for factor in (0.9, 1.5, 0.5, 0.9, 0.1, 2.0):
        ranks.append(rank_sent(rule, state))
        state, _ = rule.aggregate(state, [answered(rule, state, factor)])
    assert ranks == [8, 4, 4, 2, 2, 2]


def test_each_client_has_its_own_rank_and_keeps_it_while_it_is_away() -> None:
    state = FEDERATION.start(RULE)
    state, _ = RULE.aggregate(state, [answered(RULE, state, 0.5, 0), answered(RULE, state, 1.0, 1)])
    state, _ = RULE.aggregate(state, [answered(RULE, state, 1.0, 1)])
    state, _ = RULE.aggregate(state, [answered(RULE, state, 0.5, 2)])
    assert [rank_sent(RULE, state, i) for i in range(3)] == [4, 4, 1]
    assert sorted(state.memory) == ["rank/3", "rank/9"]


def test_a_pruned_client_keeps_its_scaling_so_that_the_leading_product_keeps_its_value() -> None:
    state = FEDERATION.start(RULE)
    after, _ = RULE.aggregate(state, [answered(RULE, state, 0.5)])
    given = RULE.broadcast(after, FEDERATION.clients[0])
    for name, f in given.adapters.items():
        whole = after.adapters[name]
        assert (f.rank, f.scaling) == (4, FEDERATION.clients[0].scaling)
        assert relative(numpy(f.delta()), numpy(whole.scaling * whole.B[:, :4] @ whole.A[:4])) < 1e-12


def test_a_client_of_weight_zero_is_not_pruned_and_a_lower_rank_in_the_configuration_wins() -> None:
    state = FEDERATION.start(RULE)
    idle = replace(answered(RULE, state, 0.5, 0), weight=0.0)
    after, _ = RULE.aggregate(state, [idle, answered(RULE, state, 1.0, 1)])
    assert rank_sent(RULE, after) == RANK
    after, _ = RULE.aggregate(state, [answered(RULE, state, 0.5, 0)])
    smaller = replace(FEDERATION.clients[0], rank=3)
    assert next(iter(RULE.broadcast(after, smaller).adapters.values())).rank == 3


def test_gamma_one_never_prunes_and_adds_nothing_to_the_loss() -> None:
    rule = HetLoRARule(gamma=1.0)
    state = FEDERATION.start(rule)
    assert rule.broadcast(state, FEDERATION.clients[0]).tail is None
    after, _ = rule.aggregate(state, [replace(answered(RULE, state, 0.1), partition_id=3)])
    assert rank_sent(rule, after) == RANK


@pytest.mark.parametrize(
    ("gamma", "min_rank", "rank", "pruned"),
    [(0.99, 2, 8, 7), (0.99, 2, 100, 99), (0.99, 2, 200, 198), (0.29, 1, 100, 29), (0.5, 2, 3, 2),
     (0.5, 2, 2, 2), (0.5, 8, 4, 4), (0.1, 1, 4, 1), (1.0, 1, 5, 5)],
)  # fmt: skip
def test_the_next_rank(gamma: float, min_rank: int, rank: int, pruned: int) -> None:
    assert HetLoRARule(gamma=gamma, min_rank=min_rank).pruned(rank) == pruned


def test_the_tail_is_what_the_client_is_told_to_shrink() -> None:
    rule = HetLoRARule(gamma=0.5, lam=0.3, min_rank=1)
    given = rule.broadcast(FEDERATION.start(rule), FEDERATION.clients[1])
    assert given.tail == RankRegularizer(weight=0.3, start=2)
    f = given.adapters["layer.a"]
    expected = np.linalg.norm(numpy(f.B)[:, 2:]) * np.linalg.norm(numpy(f.A)[2:])
    assert tail(f, 2) == pytest.approx(float(expected))


def test_a_state_is_not_touched_and_the_order_of_replies_changes_no_bit() -> None:
    state = FEDERATION.start(RULE)
    updates = [answered(RULE, state, 0.5, index) for index in range(3)]
    after, _ = RULE.aggregate(state, updates)
    again, _ = RULE.aggregate(state, reversed(updates))
    assert state.memory == {}
    assert_same_bits(named_tensors(again), named_tensors(after))
    assert list(again.memory) == list(after.memory)


# --- over the wire -------------------------------------------------------------------------------------


class ShrinkingClient:
    """Answers with a tail of half the size in the rounds that it is told to.

    Attributes:
        ranks: (round, partition) -> the rank of the adapter that arrived.
        tails: the same for the penalty.
    """

    def __init__(self, root: Path, shrinks: set[tuple[int, int]]) -> None:
        self.root, self.shrinks = root, shrinks
        self.ranks: dict[tuple[int, int], int] = {}
        self.tails: dict[tuple[int, int], RankRegularizer | None] = {}

    def __call__(self, message: Message, partition: int) -> Message:
        order = wire.decode_instruction(message.content)
        opened = resolve(order, ClientStore(self.root / str(partition)))
        assert not isinstance(opened, wire.Reply)
        at = (order.server_round, partition)
        self.ranks[at] = next(iter(opened.adapters.values())).rank
        self.tails[at] = order.tail
        start = self.ranks[at] if order.tail is None else order.tail.start
        moved = {}
        for name, f in opened.adapters.items():
            B = f.B + 0.1 if order.server_round == 1 else f.B.clone()  # B is zero before
            B[:, start:] *= 0.5 if at in self.shrinks else 1.5
            moved[name] = LoraFactors(f.A, B, f.scaling)
        reply = wire.Reply(
            status=wire.OK, arrays=wire.to_peft(moved, {}, order.uploaded), metrics={"num-examples": 1.0},
            holds=order.needs.digests,
        )  # fmt: skip
        return Message(wire.encode_reply(reply), reply_to=message)


def test_clients_really_get_smaller_adapters(tmp_path: Path) -> None:
    modules = {"encoder.q": (12, 8), "encoder.v": (9, 10)}
    g = torch.Generator().manual_seed(0)
    adapters = {
        n: LoraFactors(torch.randn(8, i, generator=g), torch.zeros(o, 8), 2.0)
        for n, (o, i) in modules.items()
    }
    client = ShrinkingClient(tmp_path, {(2, 0), (3, 0), (3, 1)})
    strategy = HetLoRA(scaling=2.0, gamma=0.75, lam=0.2, keep_ranks=False, fraction_evaluate=0.0)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(2), client), wire.to_record(wire.to_peft(adapters, {})), num_rounds=5)
    assert [client.ranks[t, 0] for t in range(1, 6)] == [8, 8, 6, 4, 4]
    assert [client.ranks[t, 1] for t in range(1, 6)] == [8, 8, 8, 6, 6]
    assert client.tails[1, 0] == RankRegularizer(weight=0.2, start=6)
    assert client.tails[4, 0] == RankRegularizer(weight=0.2, start=3)
    numbers = sum(o + i for o, i in modules.values())
    assert [r.bytes_down for r in reports] == [4 * r * numbers for r in (16, 16, 14, 10, 10)]
    assert [r.bytes_up for r in reports] == [r.bytes_down for r in reports]
    assert all(r.refused == {} for r in reports)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gamma": 0.0}, r"gamma = 0.0: must be in \(0, 1\]"),
        ({"gamma": 1.01}, "gamma = 1.01"),
        ({"gamma": float("nan")}, "gamma = nan"),
        ({"lam": -1.0}, "lam = -1.0: must be finite and >= 0"),
        ({"lam": float("inf")}, "lam = inf"),
        ({"min_rank": 0}, "min_rank = 0: must be >= 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^strategy\.options {named}"):
        make_rule("hetlora", options)
