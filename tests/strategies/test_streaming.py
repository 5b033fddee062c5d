"""A mean may be taken of updates that are never in memory together."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientUpdate
from fedlora.errors import ConfigError, FedLoraError
from strategies.registry import RULES, make_rule
from strategies.robust import make_center
from strategies.streaming import aggregate_stream, streams
from tests.strategies.federations import Federation, effective, federations, numpy, one_layer, relative

STREAMED = [name for name in RULES if streams(make_rule(name))]
streamed = pytest.mark.parametrize("name", STREAMED)


def test_the_rules_that_average_are_streamed_and_others_are_not() -> None:
    assert {"fedavg", "ffa", "fedsvd", "fedsvd-renew", "fedsa", "rolora", "head-only"} <= set(STREAMED)
    assert not {"flora", "flexlora", "fedex", "lora-fair", "hetlora", "fedrot"} & set(STREAMED)
    assert not streams(make_rule("fedavg", center=make_center("median")))


@streamed
@given(federation=federations(min_clients=2))
def test_a_stream_gives_the_same_model(name: str, federation: Federation) -> None:
    rule = make_rule(name)
    clients = tuple(replace(c, rank=federation.rank) for c in federation.clients)
    federation = replace(federation, clients=clients).suited(rule.facts)
    before = federation.start(rule)
    updates = sorted(federation.updates(rule, before), key=lambda u: u.partition_id)
    after, _ = rule.aggregate(before, updates)
    given = aggregate_stream(rule, before, iter(updates))
    for module, delta in effective(given).items():
        assert relative(delta, effective(after)[module]) < 1e-9
    for key, tensor in given.head.items():
        assert relative(numpy(tensor), numpy(after.head[key])) < 1e-12
    assert given.round == after.round


def test_no_two_updates_are_kept() -> None:
    rule = make_rule("fedavg")
    alive: list[weakref.ref[torch.Tensor]] = []

    def produced(template: ClientUpdate) -> Iterator[ClientUpdate]:
        for number in range(5):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            f = template.adapters["layer"]
            A = f.A + number
            alive.append(weakref.ref(A))
            yield replace(template, partition_id=number, adapters={"layer": LoraFactors(A, f.B, f.scaling)})
            del A

    federation = one_layer(head_shapes=((2, 3),))
    before = federation.start(rule)
    aggregate_stream(rule, before, produced(federation.update(rule, before, 0)))
    assert len(alive) == 5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda us: us[::-1], "ascending order"),
        (lambda us: [us[0], us[0]], "ascending order"),
        (lambda us: [replace(u, weight=0.0) for u in us], "sum to 0"),
        (lambda us: [], "sum to 0"),
        (lambda us: [us[0], replace(us[1], weight=-1.0)], "weight -1.0"),
        (lambda us: [us[0], replace(us[1], head={})], "head.0"),
        (lambda us: [us[0], replace(us[1], adapters={})], "lacks module layer"),
    ],
)
def test_bad_streams_are_refused(change: object, named: str) -> None:
    federation, rule = one_layer(head_shapes=((2, 3),)), make_rule("fedavg")
    before = federation.start(rule)
    updates = change(federation.updates(rule, before))  # type: ignore[operator]
    with pytest.raises(FedLoraError, match=named):
        aggregate_stream(rule, before, updates)
    with pytest.raises(ConfigError, match="flora needs all updates at once"):
        aggregate_stream(make_rule("flora"), before, updates)
