"""FedAvg of factors: Flower's own mean, and what it drops."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given

from strategies.registry import make_rule
from tests import oracles
from tests.strategies.federations import Federation, federations, numpy, oracle_layer, relative

RULE = make_rule("fedavg")


@given(federation=federations(equal_scalings=True))
def test_flower_averages_the_same_arrays_to_the_same_numbers(federation: Federation) -> None:
    """`aggregate_arrayrecords` is the arithmetic of Flower's FedAvg; A, B and the head, by weight."""
    federation = federation.suited(RULE.facts)
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, _ = RULE.aggregate(before, updates)
    records = []
    for update in sorted(updates, key=lambda u: u.partition_id):
        arrays = {f"A {n}": Array(numpy(f.A)) for n, f in update.adapters.items()}
        arrays |= {f"B {n}": Array(numpy(f.B)) for n, f in update.adapters.items()}
        arrays |= {f"head {n}": Array(numpy(t)) for n, t in update.head.items()}
        metrics = MetricRecord({"num-examples": update.weight})
        records.append(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}))
    theirs = {name: array.numpy() for name, array in aggregate_arrayrecords(records, "num-examples").items()}
    ours = {f"A {n}": numpy(f.A) for n, f in after.adapters.items()}
    ours |= {f"B {n}": numpy(f.B) for n, f in after.adapters.items()}
    ours |= {f"head {n}": numpy(t) for n, t in after.head.items()}
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert relative(array, theirs[name]) < 1e-14, name


@given(federation=federations(min_clients=2, equal_scalings=True))
def test_what_is_dropped_is_the_covariance_of_the_factors(federation: Federation) -> None:
    """``T - s B' A' == s sum_k p_k (B_k - B') (A_k - A')``, for equal scalings."""
    federation = federation.suited(RULE.facts)
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, _ = RULE.aggregate(before, updates)
    for name, factors in after.adapters.items():
        _, clients = oracle_layer(before, updates, name)
        A, B = numpy(factors.A), numpy(factors.B)
        covariance = sum(k.p * k.s * (k.B - B) @ (k.A - A) for k in clients)
        target = oracles.mean_update(clients)
        dropped = target - numpy(factors.delta())
        assert np.linalg.norm(dropped - covariance) < 1e-12 * (1.0 + np.linalg.norm(target))
