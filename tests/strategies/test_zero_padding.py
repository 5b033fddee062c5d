"""Zero-padding and RBLA: row by row, for any ranks; FedAvg for equal ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from strategies.registry import make_rule
from strategies.robust import make_center
from strategies.rules.zero_padding import ZeroPaddingRule
from strategies.server_optimizer import ServerOptimizer
from tests import oracles
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    federations,
    named_tensors,
    numpy,
    oracle_layer,
    relative,
)

both = pytest.mark.parametrize("renormalise", [False, True], ids=["plain", "renormalised"])


def mixed(ranks: tuple[int, ...], rank: int = 4) -> Federation:
    return Federation(
        modules={"layer": ModuleSpec(out_features=9, in_features=12)},
        rank=rank,
        scaling=2.0,
        clients=tuple(ClientSpec(partition_id=i, rank=r, scaling=1.0) for i, r in enumerate(ranks)),
        weights=tuple(float(i + 1) for i in range(len(ranks))),
        seed=1,
    )


def played(rule: ZeroPaddingRule, federation: Federation) -> tuple[State, list[ClientUpdate], State]:
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    return before, updates, rule.aggregate(before, updates)[0]


@given(federation=federations())
def test_for_equal_ranks_it_is_fedavg_bit_for_bit(federation: Federation) -> None:
    fedavg = make_rule("fedavg")
    before, updates, after = played(ZeroPaddingRule(), federation.suited(fedavg.facts))
    assert_same_bits(named_tensors(after), named_tensors(fedavg.aggregate(before, updates)[0]))


@given(federation=federations())
def test_and_so_is_the_renormalised_one_up_to_rounding(federation: Federation) -> None:
    fedavg = make_rule("fedavg")
    before, updates, after = played(ZeroPaddingRule(renormalise=True), federation.suited(fedavg.facts))
    expected = named_tensors(fedavg.aggregate(before, updates)[0])
    assert all(torch.allclose(t, expected[name], atol=1e-12) for name, t in named_tensors(after).items())


@both
@given(federation=federations(), rank=st.integers(1, 4))
def test_each_row_is_the_papers(renormalise: bool, federation: Federation, rank: int) -> None:
    """The factors themselves, not only their product; also where clients have more than r."""
    federation = replace(federation, rank=rank)
    before, updates, after = played(ZeroPaddingRule(renormalise=renormalise), federation)
    for name, factors in after.adapters.items():
        expected = oracles.zero_padding(*oracle_layer(before, updates, name), 1, renormalise).adapter
        assert relative(numpy(factors.A), expected.A) < 1e-12
        assert relative(numpy(factors.B), expected.B) < 1e-12


def test_a_row_that_nobody_has_is_zero_or_stays() -> None:
    federation = mixed((1, 2))
    for renormalise in (False, True):
        before, _, after = played(ZeroPaddingRule(renormalise=renormalise), federation)
        start, factors = before.adapters["layer"], after.adapters["layer"]
        kept = start if renormalise else LoraFactors(0 * start.A, 0 * start.B, start.scaling)
        assert torch.equal(factors.A[2:], kept.A[2:])
        assert torch.equal(factors.B[:, 2:], kept.B[:, 2:])


def test_renormalising_ends_the_dilution() -> None:
    """Clients 1 of rank 4 and 0 of rank 1 with weights 2:1 that agree on what both have."""
    federation = mixed((1, 4))
    before = federation.start(ZeroPaddingRule())
    _, large = federation.updates(ZeroPaddingRule(), before)
    f = large.adapters["layer"]
    small = replace(
        large, partition_id=0, weight=1.0, adapters={"layer": LoraFactors(f.A[:1], f.B[:, :1], 1.0)}
    )
    for renormalise, share in ((False, 2 / 3), (True, 1.0)):
        rule = ZeroPaddingRule(renormalise=renormalise)
        after = rule.aggregate(before, [small, large])[0].adapters["layer"]
        assert torch.allclose(after.A[0], f.A[0])
        assert torch.allclose(after.A[1:], share * f.A[1:])
        assert torch.allclose(after.B[:, 1:], share * f.B[:, 1:] / 2)


@both
def test_a_server_optimiser_steps_from_the_start(renormalise: bool) -> None:
    """Half of the way to the centre at learning rate 1/2, for all rows."""
    federation = mixed((1, 3, 2))
    half = ServerOptimizer(name="fedavgm", learning_rate=0.5, beta_1=0.0)
    before, updates, whole = played(ZeroPaddingRule(renormalise=renormalise), federation)
    stepped = ZeroPaddingRule(renormalise=renormalise, optimizer=half).aggregate(before, updates)[0]
    start, end = before.adapters["layer"], whole.adapters["layer"]
    assert torch.allclose(stepped.adapters["layer"].A, (start.A + end.A) / 2)
    assert torch.allclose(stepped.adapters["layer"].B, (start.B + end.B) / 2)


def test_a_median_of_renormalised_rows_counts_only_who_has_them() -> None:
    federation = mixed((4, 4, 1, 1, 4))
    rule = ZeroPaddingRule(renormalise=True, center=make_center("median"))
    _, updates, after = played(rule, federation)
    have = torch.stack([u.adapters["layer"].A for u in updates if u.adapters["layer"].rank == 4])
    assert torch.allclose(after.adapters["layer"].A[1:], have.median(dim=0).values[1:])


def test_multi_krum_compares_updates_of_unequal_rank() -> None:
    """The one that lies is left out, whatever its rank; the others keep their own."""
    federation = mixed((4, 2, 1, 3, 2))
    rule = ZeroPaddingRule(center=make_center("multi-krum", malicious=1))
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    f = updates[3].adapters["layer"]
    updates[3] = replace(updates[3], adapters={"layer": replace(f, A=1e3 * f.A)})
    chosen = rule.choose(updates)
    assert [u.partition_id for u in chosen] == [0, 1, 2, 4]
    assert all(any(u is given for given in updates) for u in chosen)
