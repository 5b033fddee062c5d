"""Where a run may start: every rule with every ``init_a`` that it accepts begins at the base's own weights.

Some of them leave the base (PiSSA: ``W <- W_0 - s B_0 A_0``), so that an update counts from ``B_0 A_0``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.core.init_drawn import DRAWN, INIT_A, fresh_adapters
from fedlora.core.init_svd import KINDS, subtract_from_base
from fedlora.core.state import ClientUpdate, State
from fedlora.errors import ConfigError
from strategies.registry import RULES, make_rule
from strategies.rule import Rule
from tests import oracles
from tests.strategies.federations import DEFAULTS, Federation, effective, one_layer, oracle_layer

FEDERATION = replace(one_layer(head_shapes=((2,),)), dtype=torch.float32)
TOLERANCE = 1e-4
"""Of float32 weights of size 1 to 10; LoRA-FAIR stops a little before its minimum."""
PAIRS = [(rule, kind) for rule in DEFAULTS.values() for kind in rule.facts.supported_inits]
EXACT = [(rule, kind) for rule, kind in PAIRS if rule.facts.exact]


def named(pairs: list[tuple[Rule, str]]) -> list[str]:
    return [f"{rule.facts.name}-{kind}" for rule, kind in pairs]


every_start = pytest.mark.parametrize(("rule", "kind"), PAIRS, ids=named(PAIRS))


def started(rule: Rule, kind: str, federation: Federation = FEDERATION) -> tuple[Rule, State]:
    """The rule with that start, and its state before round 1 over a random W_0."""
    rule, template = replace(rule, init_a=kind), replace(federation.template(), adapters=None)
    if kind in KINDS:
        shapes = {n: (m.out_features, m.in_features) for n, m in federation.modules.items()}
        template = subtract_from_base(template, lambda n: federation.normal(shapes[n], "weight", n), kind)
    if kind == "eva":
        adapters = fresh_adapters(federation.modules, federation.rank, federation.scaling, 0, "orthonormal")
        template = replace(template, adapters=adapters)
    return rule, rule.init(template, federation.seed)


def still(rule: Rule, state: State, federation: Federation) -> list[ClientUpdate]:
    """Replies of clients that trained nothing."""
    sent = [rule.broadcast(state, client) for client in federation.clients]
    return [
        ClientUpdate(partition_id=c.partition_id, adapters=s.adapters, head=s.head, weight=w)
        for c, s, w in zip(federation.clients, sent, federation.weights, strict=True)
    ]


@every_start
def test_updates_of_zero_keep_the_bases_weights(rule: Rule, kind: str) -> None:
    rule, state = started(rule, kind)
    for _ in range(4):
        assert np.abs(effective(state)["layer"]).max() < TOLERANCE
        state, _ = rule.aggregate(state, still(rule, state, FEDERATION))
    assert np.abs(effective(state)["layer"]).max() < TOLERANCE


@every_start
def test_a_client_begins_at_the_global_model(rule: Rule, kind: str) -> None:
    """What is broadcast, over the patched base; also after a round in which everybody trained.

    Where each begins at an adapter of its own, only in round 1.
    """
    rule, state = started(rule, kind)
    for _ in range(1 if rule.facts.by_client else 2):
        sent = rule.broadcast(state, FEDERATION.clients[0]).adapters["layer"].delta()
        own = state.adapters["layer"].delta()
        assert np.abs((sent - own).numpy()).max() < TOLERANCE
        state, _ = rule.aggregate(state, FEDERATION.updates(rule, state))


@pytest.mark.parametrize(("rule", "kind"), EXACT, ids=named(EXACT))
def test_exact_rules_lose_nothing_of_the_updates(rule: Rule, kind: str) -> None:
    """``W = W_0 + sum_t sum_k p_k dW_k`` with dW_k counted from the product that was sent."""
    rule, state = started(rule, kind)
    wanted = np.zeros((9, 12))
    for _ in range(3):
        sent = rule.broadcast(state, FEDERATION.clients[0]).adapters["layer"].delta()
        updates = FEDERATION.updates(rule, state)
        wanted = (
            wanted + oracles.mean_update(oracle_layer(state, updates, "layer")[1]) - sent.double().numpy()
        )
        state, _ = rule.aggregate(state, updates)
    np.testing.assert_allclose(effective(state)["layer"], wanted, rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_starts_from_what_is_drawn_and_says_why_not_from_the_rest(name: str) -> None:
    facts = RULES[name].facts
    assert set(DRAWN) <= set(facts.supported_inits) <= set(INIT_A)
    for kind in set(INIT_A) - set(facts.supported_inits):
        with pytest.raises(ConfigError) as error:
            make_rule(name, {"init_a": kind})
        accepted = ", ".join(facts.supported_inits)
        assert facts.inits_why
        assert str(error.value) == (
            f"strategy.init-a = {kind!r}: {name} {facts.inits_why}, accepted are {accepted}"
        )


def test_hetlora_would_lose_a_part_of_the_base_where_it_prunes() -> None:
    """Why it is refused: a pruned client is sent fewer rows than were taken out of the base."""
    rule = make_rule("hetlora", {"gamma": 0.5, "min_rank": 1})
    _, state = started(make_rule("fedavg"), "pissa")
    pruned = replace(FEDERATION.clients[0], rank=1)
    lost = state.adapters["layer"].delta() - rule.broadcast(state, pruned).adapters["layer"].delta()
    assert float(lost.norm()) > 0.1
