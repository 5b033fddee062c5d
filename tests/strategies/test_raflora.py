"""raFLoRA: ranks that few clients have do not fade, where FlexLoRA's do at the rate of the paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given

from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from strategies.registry import make_rule
from strategies.rule import Rule
from tests.strategies.federations import Federation, federations, numpy, relative

RANKS, WEIGHTS = (1, 3, 3, 5), (4.0, 1.0, 2.0, 3.0)
MIXED = Federation(
    modules={"layer": ModuleSpec(out_features=9, in_features=12)},
    rank=5,
    scaling=2.0,
    clients=tuple(ClientSpec(partition_id=i, rank=r, scaling=3.0 / r) for i, r in enumerate(RANKS)),
    weights=WEIGHTS,
    seed=5,
)


def returned(rule: Rule, state: State, present: tuple[int, ...]) -> list[ClientUpdate]:
    """Updates of clients that send back what they were sent."""
    return [
        ClientUpdate(
            partition_id=MIXED.clients[k].partition_id,
            adapters=rule.broadcast(state, MIXED.clients[k]).adapters,
            head={},
            weight=WEIGHTS[k],
        )
        for k in present
    ]


def settled(rule: Rule) -> State:
    """A global adapter whose directions are sorted by their strength, as after any round."""
    state = MIXED.start(make_rule("flexlora"))
    whole = [ClientUpdate(partition_id=0, adapters=state.adapters, head={}, weight=1.0)]
    return rule.aggregate(state, whole)[0]


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 3), (0, 1), (0,), (3,)])
def test_what_nobody_moves_stays(present: tuple[int, ...]) -> None:
    """Whoever is there, and of whichever ranks."""
    rule = make_rule("raflora")
    before = after = settled(rule)
    for _ in range(3):
        after, _ = rule.aggregate(after, returned(rule, after, present))
    delta = numpy(before.adapters["layer"].delta())
    assert relative(numpy(after.adapters["layer"].delta()), delta) < 1e-12


def test_under_flexlora_it_fades_by_the_share_of_those_who_have_it() -> None:
    """The paper's geometric rate: ``sigma_j(t) = P_j^t sigma_j(0)``."""
    rule = make_rule("flexlora")
    before = after = settled(rule)
    for _ in range(3):
        after, _ = rule.aggregate(after, returned(rule, after, (0, 1, 2, 3)))
    sigma = [np.linalg.svd(numpy(s.adapters["layer"].delta()), compute_uv=False)[:5] for s in (before, after)]
    total = math.fsum(WEIGHTS)
    shares = [sum(w for r, w in zip(RANKS, WEIGHTS, strict=True) if r > j) / total for j in range(5)]
    assert sigma[1] == pytest.approx(sigma[0] * np.array(shares) ** 3, rel=1e-10)


@given(federation=federations())
def test_with_equal_ranks_it_is_flexlora(federation: Federation) -> None:
    rules = make_rule("raflora"), make_rule("flexlora")
    federation = federation.suited(make_rule("fedavg").facts)
    before = federation.start(rules[0])
    updates = federation.updates(rules[0], before)
    ours, theirs = (rule.aggregate(before, updates)[0].adapters for rule in rules)
    for name, factors in ours.items():
        assert relative(numpy(factors.delta()), numpy(theirs[name].delta())) < 1e-10
