"""Server optimisers and robust centres compose with every rule whose aggregate is a mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.state import ClientUpdate, State
from fedlora.errors import ConfigError, RunFailed
from strategies.registry import RULES, make_rule
from strategies.robust import MultiKrum, make_center
from strategies.rule import Rule
from strategies.server_optimizer import LINEAR, SERVER_OPTIMIZERS, ServerOptimizer
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    numpy,
    one_layer,
    relative,
)

MEANS = [name for name, rule in RULES.items() if rule.facts.mean]
every_mean = pytest.mark.parametrize("name", MEANS)
MOMENTUM = ServerOptimizer(name="fedavgm", learning_rate=0.7, beta_1=0.9)


def rounds(rule: Rule, count: int, given: Federation) -> State:
    state = given.start(rule)
    for _ in range(count):
        state, _ = rule.aggregate(state, given.updates(rule, state))
    return state


@every_mean
@given(federation=federations(min_clients=2))
def test_fedavgm_without_momentum_at_rate_one_is_the_rule_itself(name: str, federation: Federation) -> None:
    plain = make_rule(name)
    federation = federation.suited(plain.facts)
    composed = make_rule(name, optimizer=ServerOptimizer(name="fedavgm", learning_rate=1.0, beta_1=0.0))
    before = federation.start(plain)
    updates = federation.updates(plain, before)
    expected, given = plain.aggregate(before, updates)[0], composed.aggregate(before, updates)[0]
    for module, delta in effective(given).items():
        assert relative(delta, effective(expected)[module]) < 1e-10
    for key, tensor in given.head.items():
        assert relative(numpy(tensor), numpy(expected.head[key])) < 1e-12


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam"])
def test_server_optimisers_are_the_papers(kind: str) -> None:
    """Three steps beside the papers' equations in NumPy."""
    optimizer = ServerOptimizer(name=kind, learning_rate=0.5, beta_1=0.8, beta_2=0.95, tau=1e-2)
    rng = np.random.default_rng(0)
    y = rng.normal(size=(4, 3))
    m, v = np.zeros_like(y), np.full_like(y, 1e-4)
    x, memory = torch.from_numpy(y.copy()), Tensors()
    for _ in range(3):
        center = rng.normal(size=(4, 3))
        x, memory = optimizer.step("x", x, torch.from_numpy(center), memory)
        d = center - y
        if kind == "fedavgm":
            m = 0.8 * m + d
            y = y + 0.5 * m
        else:
            m, v = 0.8 * m + 0.2 * d, 0.95 * v + 0.05 * d**2
            y = y + 0.5 * m / (np.sqrt(v) + 1e-2)
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-12)


@every_mean
def test_momentum_goes_on_where_the_clients_stand_still(name: str) -> None:
    """A second round in which nobody moves still moves what is shipped, by beta times the first step."""
    rule, fed = make_rule(name, optimizer=MOMENTUM), one_layer(2, 6, ((2, 3),))
    first = rounds(rule, 1, fed)
    still = [
        ClientUpdate(
            partition_id=c.partition_id,
            adapters=(sent := rule.broadcast(first, c)).adapters,
            head=sent.head,
            weight=1.0,
        )
        for c in fed.clients
    ]
    second, _ = rule.aggregate(first, still)
    step = numpy(second.head["head.0"]) - numpy(first.head["head.0"])
    before = numpy(first.head["head.0"]) - numpy(fed.start(rule).head["head.0"])
    np.testing.assert_allclose(step, 0.9 * before, rtol=1e-10)


def test_the_momentum_of_fedsvd_turns_with_its_basis() -> None:
    """Under FedSVD and under FFA from the same orthonormal A, momentum gives the same products."""
    fed = one_layer(2, 6)
    turning, fixed = (make_rule(name, optimizer=MOMENTUM) for name in ("fedsvd", "ffa"))
    start = fed.template().adapters
    assert start is not None
    rows = torch.linalg.qr(start["layer"].A.T)[0].T.contiguous()
    adapters = {"layer": replace(start["layer"], A=rows)}
    states = [replace(fed.start(rule), adapters=adapters) for rule in (turning, fixed)]
    for number in range(4):
        moves = [fed.normal((9, 12), "common", number, c.partition_id) for c in fed.clients]
        after = []
        for rule, state in zip((turning, fixed), states, strict=True):
            A, B = state.adapters["layer"].A, state.adapters["layer"].B
            updates = [
                ClientUpdate(
                    partition_id=c.partition_id,
                    adapters={"layer": LoraFactors(A, B + move @ A.T, 2.0)},
                    head={},
                    weight=1.0,
                )
                for c, move in zip(fed.clients, moves, strict=True)
            ]
            after.append(rule.aggregate(state, updates)[0])
        states = after
        assert relative(effective(states[0])["layer"], effective(states[1])["layer"]) < 1e-10


@pytest.mark.parametrize("name", [n for n in MEANS if RULES[n].facts.rotates_basis])
def test_fedadam_is_refused_where_the_basis_turns(name: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy.server-optimizer = 'fedadam': {name} turns"):
        make_rule(name, optimizer=ServerOptimizer(name="fedadam"))


@pytest.mark.parametrize("name", [n for n in RULES if n not in MEANS])
def test_rules_without_a_mean_refuse_compositions(name: str) -> None:
    with pytest.raises(ConfigError, match=f"strategy.robust = 'median': the aggregate of {name}"):
        make_rule(name, center=make_center("median"))
    with pytest.raises(ConfigError, match=f"strategy.server-optimizer = 'fedavgm': the aggregate of {name}"):
        make_rule(name, optimizer=MOMENTUM)
    assert make_rule(name, center=make_center("none"), optimizer=ServerOptimizer()) == make_rule(name)


@every_mean
@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "multi-krum"])
def test_one_liar_among_six_moves_a_robust_centre_little(name: str, robust: str) -> None:
    """A client that sends 1e6 times its tensors ruins the mean and not the robust centres."""
    fed = one_layer(2, 6, ((2, 3),))
    rule, plain = make_rule(name, center=make_center(robust, malicious=1)), make_rule(name)
    before = fed.start(rule)
    honest = fed.updates(rule, before)
    lie = replace(honest[2], head={n: 1e6 * t for n, t in honest[2].head.items()})
    lie = replace(lie, adapters={n: _blown_up(f, rule) for n, f in lie.adapters.items()})
    told = [lie if u.partition_id == 2 else u for u in honest]
    sizes = {}
    for each in (rule, plain):
        after = each.aggregate(before, told)[0]
        tensors = [*effective(after).values(), *(numpy(t) for t in after.head.values())]
        sizes[each] = max(float(np.abs(t).max()) for t in tensors)
    assert sizes[rule] < 1e3 < sizes[plain]


def _blown_up(factors: LoraFactors, rule: Rule) -> LoraFactors:
    shipped = rule.shipped(1)
    tensors = {k: t * (1e6 if k in shipped else 1.0) for k, t in factors.tensors().items()}
    return LoraFactors(scaling=factors.scaling, **tensors)


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "multi-krum"])
def test_robust_centres_do_not_see_the_order_and_equal_numpy(robust: str) -> None:
    fed, rule = one_layer(2, 6, ((2, 3),)), make_rule("fedavg", center=make_center(robust))
    before = fed.start(rule)
    updates = fed.updates(rule, before)
    after = rule.aggregate(before, updates)[0]
    assert_same_bits(named_tensors(rule.aggregate(before, updates[::-1])[0]), named_tensors(after))
    heads = np.sort(np.stack([numpy(u.head["head.0"]) for u in updates]), axis=0)
    expected = {"median": heads[2:4].mean(axis=0), "trimmed-mean": heads[1:5].mean(axis=0)}
    if robust in expected:
        np.testing.assert_allclose(numpy(after.head["head.0"]), expected[robust], rtol=1e-12)


def test_multi_krum_averages_the_chosen_with_their_weights() -> None:
    fed, center = one_layer(2, 6, ((2, 3),)), MultiKrum(malicious=1, chosen=2)
    rule = make_rule("fedavg", center=center)
    before = fed.start(rule)
    updates = fed.updates(rule, before)
    kept = center.choose(updates)
    assert len(kept) == 2
    assert_same_bits(
        named_tensors(rule.aggregate(before, updates)[0]),
        named_tensors(make_rule("fedavg").aggregate(before, list(kept))[0]),
    )
    with pytest.raises(RunFailed, match="a round needs 5 updates, it has 4"):
        center.choose(updates[:4])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"name": "adam"}, "strategy.server-optimizer = 'adam': accepted are none, fedavgm, fedadam"),
        ({"learning_rate": 0.0}, "strategy.server-learning-rate = 0.0: must be > 0"),
        ({"learning_rate": float("nan")}, "strategy.server-learning-rate = nan"),
        ({"beta_1": 1.0}, r"strategy.server-beta-1 = 1.0: must be in \[0, 1\)"),
        ({"beta_2": -0.1}, "strategy.server-beta-2 = -0.1"),
        ({"tau": 0.0}, "strategy.server-tau = 0.0: must be > 0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerOptimizer(**wrong)  # type: ignore[arg-type]
    for robust, options, line in [
        ("mode", {}, "strategy.robust = 'mode': accepted are none, median"),
        ("trimmed-mean", {"trim_fraction": 0.5}, "strategy.trim-fraction = 0.5"),
        ("multi-krum", {"malicious": -1}, "strategy.krum-malicious = -1"),
    ]:
        with pytest.raises(ConfigError, match=line):
            make_center(robust, **options)


def test_an_optimiser_says_itself_what_its_step_is() -> None:
    """Linear in the mean where it says so, with a share of the last step in the next, and only then."""
    before, mean = torch.ones(3), torch.tensor([2.0, 0.5, 1.0])
    for name in SERVER_OPTIMIZERS:
        optimizer = ServerOptimizer(name=name, beta_1=0.6)
        once, memory = optimizer.step("A", before, mean, {})
        twice, _ = optimizer.step("A", before, 2 * mean - before, {})
        linear = torch.allclose(twice - before, 2 * (once - before))
        assert linear == (not optimizer.by_coordinate) == (name in LINEAR)
        after, _ = optimizer.step("A", once, once, memory)
        assert torch.equal(after, once) == (optimizer.momentum == 0.0)
        assert optimizer.plain == (not memory)
        assert optimizer.momentum == (0.0 if optimizer.plain else 0.6)
