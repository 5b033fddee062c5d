"""What no rule aggregates: each refusal is one line that names the client and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from fedlora.errors import ConfigError, FactorShapeError, FedLoraError
from strategies.rule import Rule
from tests.strategies.federations import DEFAULTS, Federation

FEDERATION = Federation(
    modules={
        "layer.a": ModuleSpec(out_features=5, in_features=7),
        "layer.b": ModuleSpec(out_features=6, in_features=4),
    },
    rank=2,
    scaling=4.0,
    clients=tuple(ClientSpec(partition_id=i, rank=2, scaling=4.0) for i in (3, 17, 20)),
    weights=(1.0, 2.0, 3.0),
    seed=11,
    head_shapes=((2, 3),),
)

every_rule = pytest.mark.parametrize("rule", DEFAULTS.values(), ids=list(DEFAULTS))
REFUSE = {
    (type(rule).aggregate, type(rule).check, rule.facts.mixed_ranks, rule.facts.uploaded): name
    for name, rule in DEFAULTS.items()
}
every_way = pytest.mark.parametrize("rule", [DEFAULTS[n] for n in REFUSE.values()], ids=list(REFUSE.values()))
"""A rule for each code that refuses, and each fact that it looks at."""


def one_line(error: pytest.ExceptionInfo[FedLoraError]) -> str:
    text = str(error.value)
    assert text.strip()
    assert "\n" not in text
    return text


def replies(rule: Rule) -> tuple[State, list[ClientUpdate]]:
    state = FEDERATION.start(rule)
    return state, FEDERATION.updates(rule, state)


@every_way
def test_no_updates(rule: Rule) -> None:
    with pytest.raises(ConfigError) as error:
        rule.aggregate(FEDERATION.start(rule), [])
    assert "no update" in one_line(error)


@every_way
@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ((0.0, 0.0, 0.0), "sum to 0"),
        ((1.0, -2.0, 3.0), "partition 17: weight -2.0"),
        ((1.0, 2.0, math.nan), "partition 20: weight nan"),
        ((math.inf, 2.0, 1.0), "partition 3: weight inf"),
        ((1.7e308, 1.7e308, 1.0), "inf"),
    ],
    ids=["all zero", "negative", "nan", "inf", "sum overflows"],
)
def test_weights_that_are_none(rule: Rule, weights: tuple[float, ...], named: str) -> None:
    state, updates = replies(rule)
    wrong = [replace(u, weight=w) for u, w in zip(updates, weights, strict=True)]
    with pytest.raises(ConfigError) as error:
        rule.aggregate(state, wrong)
    assert named in one_line(error)


@every_way
def test_two_replies_of_one_client(rule: Rule) -> None:
    """Their order would decide the sum, and the client would count twice."""
    state, updates = replies(rule)
    with pytest.raises(ConfigError) as error:
        rule.aggregate(state, [*updates, replace(updates[1], weight=5.0)])
    assert "partition 17" in one_line(error)


Change = Callable[[ClientUpdate], ClientUpdate]


def _without(module: str) -> Change:
    return lambda u: replace(u, adapters={n: f for n, f in u.adapters.items() if n != module})


def _with(module: str, out_features: int, in_features: int, rank: int) -> Change:
    factors = LoraFactors(torch.ones(rank, in_features), torch.ones(out_features, rank), 4.0)
    return lambda u: replace(u, adapters={**u.adapters, module: factors})


def _head(**tensors: torch.Tensor) -> Change:
    return lambda u: replace(u, head={n.replace("_", "."): t for n, t in tensors.items()})


@every_way
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_without("layer.b"), ("partition 17", "lacks", "layer.b")),
        (_with("layer.c", 5, 7, 2), ("partition 17", "unknown", "layer.c")),
        (_with("layer.a", 7, 5, 2), ("partition 17", "layer.a", "(7, 5)", "(5, 7)")),
        (_head(), ("partition 17", "head.0", "(2, 3)")),
        (_head(head_0=torch.ones(2, 3), head_9=torch.ones(1)), ("head.9",)),
        (_head(head_0=torch.ones(3)), ("partition 17", "head.0", "(3,)", "(2, 3)")),
        (_head(head_0=torch.ones(3, 2)), ("partition 17", "head.0", "(3, 2)", "(2, 3)")),
    ],
    ids=["module missing", "module foreign", "layer transposed", "head missing", "head foreign",
         "head would be broadcast", "head transposed"],
)  # fmt: skip
def test_replies_that_do_not_fit(rule: Rule, change: Change, named: tuple[str, ...]) -> None:
    state, updates = replies(rule)
    updates[1] = change(updates[1])
    with pytest.raises(FactorShapeError) as error:
        rule.aggregate(state, updates)
    text = one_line(error)
    assert all(part in text for part in named), text


@every_rule
def test_unequal_ranks_are_aggregated_where_declared_and_refused_elsewhere(rule: Rule) -> None:
    clients = tuple(replace(c, rank=r) for c, r in zip(FEDERATION.clients, (1, 2, 4), strict=True))
    mixed = replace(FEDERATION, clients=clients)
    state = mixed.start(rule)
    updates = mixed.updates(rule, state)
    if rule.facts.mixed_ranks:
        assert rule.aggregate(state, updates)[0].round == 1
        return
    with pytest.raises(FactorShapeError) as error:
        rule.aggregate(state, updates)
    text = one_line(error)
    for part in ("round 1", "partition 3", "layer.a", "rank 1", "expected 2", rule.facts.name):
        assert part in text


@every_rule
def test_unequal_alphas_are_aggregated_by_all(rule: Rule) -> None:
    clients = tuple(replace(c, scaling=s) for c, s in zip(FEDERATION.clients, (0.5, 4.0, 9.0), strict=True))
    mixed = replace(FEDERATION, clients=clients)
    state = mixed.start(rule)
    assert rule.aggregate(state, mixed.updates(rule, state))[0].round == 1


def test_factors_that_are_no_pair() -> None:
    for A, B in [(torch.ones(2, 3), torch.ones(4, 3)), (torch.ones(2), torch.ones(4, 2))]:
        with pytest.raises(FactorShapeError) as error:
            LoraFactors(A, B, 1.0)
        assert str(tuple(A.shape)) in one_line(error)
