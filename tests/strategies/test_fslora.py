"""FSLoRA: parts of the global adapter that mean it on average, and that find their place again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    numpy,
    relative,
)

SMALL = Federation(
    modules={"layer": ModuleSpec(out_features=9, in_features=12)},
    rank=2,
    scaling=4.0,
    clients=tuple(ClientSpec(partition_id=i, rank=i % 2 + 1, scaling=8.0 / (i % 2 + 1)) for i in range(4)),
    weights=(1.0, 2.0, 3.0, 4.0),
    seed=5,
)
"""Clients of rank 1 and 2 with alpha 8."""


def test_what_clients_are_sent_is_the_global_product_on_average() -> None:
    """Whatever their scaling; each client and round has a draw of its own."""
    rule = make_rule("fslora", {"rank": 5})
    state = SMALL.start(rule)
    sent = [
        numpy(
            rule.broadcast(state, ClientSpec(partition_id=k, rank=2, scaling=3.0)).adapters["layer"].delta()
        )
        for k in range(600)
    ]
    whole = numpy(state.adapters["layer"].delta())
    assert relative(np.mean(sent, axis=0), whole) < 0.1  # 600 draws of 2 of 5: about 0.07
    assert min(relative(one, whole) for one in sent) > 0.2


@given(federation=federations())
def test_what_nobody_moves_stays_in_every_bit(federation: Federation) -> None:
    rule = make_rule("fslora")
    state = federation.start(rule)
    sent = [
        ClientUpdate(
            partition_id=c.partition_id,
            adapters=rule.broadcast(state, c).adapters,
            head=dict(state.head),
            weight=w,
        )
        for c, w in zip(federation.clients, federation.weights, strict=True)
    ]
    after, _ = rule.aggregate(state, sent)
    for name, tensor in named_tensors(after).items():
        assert relative(numpy(tensor), numpy(named_tensors(state)[name])) < 1e-12


def test_a_client_moves_what_it_held_and_nothing_else() -> None:
    rule = make_rule("fslora", {"rank": 5})
    state = SMALL.start(rule)
    update = SMALL.update(rule, state, 1)
    after, _ = rule.aggregate(state, [update])
    before, now = state.adapters["layer"], after.adapters["layer"]
    moved = (now.A != before.A).any(dim=1)
    assert int(moved.sum()) == 2
    assert bool(((now.B != before.B).any(dim=0) == moved).all())
    assert_same_bits({"A": now.A[~moved]}, {"A": before.A[~moved]})


def test_clients_of_low_rank_train_all_directions_of_a_higher_one() -> None:
    rule = make_rule("fslora", {"rank": 5})
    state = start = SMALL.start(rule)
    for _ in range(4):
        state, _ = rule.aggregate(state, SMALL.updates(rule, state))
    assert state.adapters["layer"].rank == 5
    assert bool((state.adapters["layer"].A != start.adapters["layer"].A).any(dim=1).all())


def test_the_model_at_the_start_does_not_depend_on_the_global_rank() -> None:
    small, large = (SMALL.start(make_rule("fslora", {"rank": r})) for r in (0, 5))
    assert relative(effective(large)["layer"], effective(small)["layer"]) < 1e-12


@pytest.mark.parametrize("rank", [-1, 1])
def test_a_rank_below_the_clients_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"strategy.options rank = {rank}: must be"):
        SMALL.start(make_rule("fslora", {"rank": rank}))
