"""Client-level privacy: the mean of clipped updates over the planned cohort, noise of the claimed size."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from clients.privacy import mechanism_of
from fedlora.config import ModelConfig, PrivacyConfig, RunConfig, StrategyConfig
from fedlora.core.adapters import as_lora
from fedlora.core.directions import most_changed
from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate import check
from strategies.allocation import make_allocation
from strategies.client_dp import ClientDP
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from strategies.robust import ROBUST, make_center
from strategies.rule import Rule
from tests.strategies.federations import Federation, numpy

MEANS = [n for n, r in RULES.items() if r.facts.client_dp and r.facts.uploaded]
FEDERATION = Federation(
    modules={
        "a": ModuleSpec(out_features=30, in_features=40),
        "b": ModuleSpec(out_features=20, in_features=30),
    },
    rank=3,
    scaling=2.0,
    clients=tuple(ClientSpec(partition_id=i, rank=3, scaling=2.0) for i in (1, 4, 7)),
    weights=(1.0, 20.0, 300.0),
    seed=11,
    head_shapes=((4, 5),),
)
SILENT = ClientDP(clipping_norm=0.7, noise_multiplier=1e-9, seed=0)


def played(rule: Rule, mechanism: ClientDP, planned: int = 3) -> tuple[State, list[ClientUpdate], State]:
    before = FEDERATION.start(rule)
    updates = FEDERATION.updates(rule, before)
    sent = {c.partition_id: rule.broadcast(before, c) for c in FEDERATION.clients}
    private = mechanism.privatise(updates, sent, planned, before.round + 1)
    return before, updates, rule.aggregate(before, private, diagnostics=False)[0]


def changes(rule: Rule, update: ClientUpdate, before: State) -> dict[str, np.ndarray]:
    """What a client ships, minus the start."""
    shipped = {
        f"{factor} {name}": numpy(update.adapters[name].tensors()[factor] - f.tensors()[factor])
        for name, f in before.adapters.items()
        for factor in rule.shipped(1)
    }
    return shipped | {f"head {n}": numpy(t - before.head[n]) for n, t in update.head.items()}


@pytest.mark.parametrize("planned", [3, 5])
def test_the_mean_is_of_clipped_updates_over_the_planned_cohort(planned: int) -> None:
    """Naively: each change cut to norm S, added, divided by m, whatever the weights and who is away."""
    rule = make_rule("fedavg")
    before, updates, after = played(rule, SILENT, planned)
    total: dict[str, np.ndarray] = {}
    for update in updates:
        own = changes(rule, update, before)
        norm = math.sqrt(sum(float((c**2).sum()) for c in own.values()))
        assert norm > SILENT.clipping_norm
        for name, change in own.items():
            total[name] = total.get(name, 0) + change * SILENT.clipping_norm / norm / planned
    for name, factors in after.adapters.items():
        for factor in "AB":
            moved = numpy(factors.tensors()[factor] - before.adapters[name].tensors()[factor])
            np.testing.assert_allclose(moved, total[f"{factor} {name}"], atol=1e-7)
    np.testing.assert_allclose(
        numpy(after.head["head.0"] - before.head["head.0"]), total["head head.0"], atol=1e-7
    )


def test_small_updates_are_not_stretched() -> None:
    rule = make_rule("fedavg")
    before, updates, after = played(rule, replace(SILENT, clipping_norm=1e6, noise_multiplier=1e-15))
    plain = rule.aggregate(before, [replace(u, weight=1.0) for u in updates])[0]
    for name, factors in after.adapters.items():
        torch.testing.assert_close(factors.A, plain.adapters[name].A, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", MEANS)
def test_no_client_moves_the_sum_further_than_the_clipping_norm(name: str) -> None:
    """Replacing a client by a zero update moves what is shipped by at most S / m: the sensitivity."""
    rule = make_rule(name)
    before = FEDERATION.start(rule)
    updates = FEDERATION.updates(rule, before)
    sent = {c.partition_id: rule.broadcast(before, c) for c in FEDERATION.clients}
    huge = replace(
        updates[1],
        adapters={
            n: LoraFactors(
                scaling=f.scaling,
                **{k: t * (1e3 if k in rule.shipped(1) else 1) for k, t in f.tensors().items()},
            )
            for n, f in updates[1].adapters.items()
        },
    )
    with_it = SILENT.privatise([updates[0], huge, updates[2]], sent, 3, 1)
    without = SILENT.privatise([updates[0], updates[2]], sent, 3, 1)
    sums = []
    for private in (with_it, without):
        total: dict[str, np.ndarray] = {}
        for update in private:
            for key, change in changes(rule, update, before).items():
                total[key] = total.get(key, 0) + update.weight * change
        sums.append(total)
    distance = math.sqrt(sum(float(((sums[0][k] - sums[1][k]) ** 2).sum()) for k in sums[0]))
    assert distance == pytest.approx(SILENT.clipping_norm / 3, rel=1e-6)


def test_directions_at_rest_are_neither_in_the_norm_nor_noised() -> None:
    """Naively over rows of A and columns of B that train, and the head; whatever is claimed of the others."""
    rule = make_rule("fedavg", allocation=make_allocation("sized-ranks", {"warmup": 0, "ranks": 4}))
    before = FEDERATION.start(rule)
    directions = rule.allocation.directions(before)
    rests = {n: [j for j in range(3) if j not in directions.get(n, range(3))] for n in before.adapters}
    assert any(0 < len(own) < 3 for own in rests.values())
    sent = {c.partition_id: rule.broadcast(before, c) for c in FEDERATION.clients}
    updates = FEDERATION.updates(rule, before)
    total: dict[str, np.ndarray] = {}
    for update in updates:
        own = {f"head {n}": numpy(t - before.head[n]) for n, t in update.head.items()}
        for name, began in sent[update.partition_id].adapters.items():
            for factor in "AB":
                own[f"{factor} {name}"] = numpy(
                    update.adapters[name].tensors()[factor] - began.tensors()[factor]
                )
        norm = math.sqrt(sum(float((c**2).sum()) for c in own.values()))
        for name, change in own.items():
            total[name] = total.get(name, 0) + change * min(1.0, SILENT.clipping_norm / norm) / 3
    lying = [
        replace(u, adapters={n: replace(as_lora(f), A0=f.tensors()["A0"] + 1e3) if rests[n] else f
                             for n, f in u.adapters.items()})
        for u in updates
    ]  # fmt: skip
    loud = replace(SILENT, noise_multiplier=1.0, seed=1)
    silent, noisy = (
        rule.aggregate(before, mechanism.privatise(lying, sent, 3, 1), diagnostics=False)[0]
        for mechanism in (SILENT, loud)
    )
    for name in before.adapters:
        began, quiet, found = (as_lora(s.adapters[name]) for s in (before, silent, noisy))
        moves = [j for j in range(3) if j not in rests[name]]
        np.testing.assert_allclose(numpy((quiet.A - began.A)[moves]), total[f"A {name}"], atol=1e-7)
        np.testing.assert_allclose(numpy((quiet.B - began.B)[:, moves]), total[f"B {name}"], atol=1e-7)
        assert torch.equal(found.A[rests[name]], began.A[rests[name]])
        assert torch.equal(found.B[:, rests[name]], began.B[:, rests[name]])
        assert (found.A != quiet.A)[moves].all()
        assert (found.B != quiet.B)[:, moves].all()


def test_noise_is_on_directions_that_nobody_chose() -> None:
    """What a client chose is a part of its update, and no more to be seen in the mean than its values."""
    rule = make_rule("lora-a2", {"rank": 5})
    before = FEDERATION.start(rule)
    sent = {c.partition_id: rule.broadcast(before, c) for c in FEDERATION.clients}
    updates = [
        replace(u, adapters=most_changed(sent[u.partition_id].adapters, u.adapters, 1))
        for u in FEDERATION.updates(rule, before)
    ]
    mechanism = ClientDP(clipping_norm=0.5, noise_multiplier=3.0, seed=5)
    after = rule.aggregate(before, mechanism.privatise(updates, sent, 3, 1), diagnostics=False)[0]
    chosen = {n: torch.stack([(u.adapters[n].tensors()["B"] != 0).any(dim=0) for u in updates]).any(dim=0)
              for n in before.adapters}  # fmt: skip
    drawn = torch.cat([as_lora(after.adapters[n]).B[:, ~own].reshape(-1) for n, own in chosen.items()])
    assert drawn.numel() >= 100
    assert float(drawn.std()) == pytest.approx(3.0 * 0.5 / 3, rel=0.2)


@pytest.mark.parametrize("seed", [5, None])
def test_every_shipped_coordinate_has_noise_of_the_claimed_size(seed: int | None) -> None:
    """Also in modules that the first client does not train."""
    rule, mechanism = make_rule("fedavg"), ClientDP(clipping_norm=0.5, noise_multiplier=3.0, seed=seed)
    before = FEDERATION.start(rule)
    narrow = replace(FEDERATION.clients[0], modules=frozenset({"a"}))
    federation = replace(FEDERATION, clients=(narrow, *FEDERATION.clients[1:]))
    updates = federation.updates(rule, before)
    sent = {c.partition_id: rule.broadcast(before, c) for c in federation.clients}
    noisy, plain = (
        rule.aggregate(before, m.privatise(updates, sent, 4, 1), diagnostics=False)[0]
        for m in (mechanism, replace(SILENT, clipping_norm=0.5))
    )
    parts = []
    for name, factors in noisy.adapters.items():
        for factor in "AB":
            drawn = numpy(factors.tensors()[factor] - plain.adapters[name].tensors()[factor]).ravel()
            assert drawn.std() == pytest.approx(3.0 * 0.5 / 4, rel=0.35)
            parts.append(drawn)
    parts.append(numpy(noisy.head["head.0"] - plain.head["head.0"]).ravel())
    assert np.concatenate(parts).std() == pytest.approx(3.0 * 0.5 / 4, rel=0.15)


def test_seeded_noise_repeats_within_a_round_only_and_system_noise_never() -> None:
    rule = make_rule("fedavg")
    before = FEDERATION.start(rule)
    updates = FEDERATION.updates(rule, before)
    sent = {c.partition_id: rule.broadcast(before, c) for c in FEDERATION.clients}

    def drawn(seed: int | None, server_round: int) -> torch.Tensor:
        mechanism = ClientDP(clipping_norm=1.0, noise_multiplier=1.0, seed=seed)
        return mechanism.privatise(updates, sent, 3, server_round)[0].adapters["a"].A

    assert torch.equal(drawn(1, 1), drawn(1, 1))
    assert not torch.equal(drawn(1, 1), drawn(1, 2))
    assert not torch.equal(drawn(1, 1), drawn(2, 1))
    assert not torch.equal(drawn(None, 1), drawn(None, 1))


def config(**changes: object) -> RunConfig:
    privacy = PrivacyConfig(mode="client", target_epsilon=2.0, max_participations=4)
    return replace(RunConfig(privacy=privacy), **changes)  # type: ignore[arg-type]


def test_what_a_client_has_spent_counts_its_own_participations() -> None:
    """Against the analytic Gaussian mechanism: z / sqrt(n) for n rounds (Balle and Wang, ICML 2018)."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    run = config()
    mechanism = mechanism_of(run).server(seeded=True)
    assert mechanism is not None

    def delta_of(epsilon: float, sigma: float) -> float:
        a, b = 1 / (2 * sigma) - epsilon * sigma, -1 / (2 * sigma) - epsilon * sigma
        return float(norm.cdf(a) - math.exp(epsilon) * norm.cdf(b))

    spent = mechanism_of(run).spent({0: 1, 3: 4})
    for partition, rounds in ((0, 1), (3, 4)):
        sigma = mechanism.noise_multiplier / math.sqrt(rounds)
        exact = brentq(lambda e, s=sigma: delta_of(e, s) - 1e-5, 1e-3, 50)
        assert spent[partition]["epsilon"] == pytest.approx(exact, abs=0.02)
        assert spent[partition]["granularity"] == "client"
    assert spent[3]["epsilon"] <= 2.0
    assert spent[0]["epsilon"] < spent[3]["epsilon"]
    assert mechanism_of(RunConfig()).server(seeded=True) is None


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if not r.facts.client_dp])
def test_rules_that_are_no_mean_refuse_it_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=f"privacy.mode = 'client': the aggregate of {name} is no mean"):
        check(config(strategy=StrategyConfig(name=name)))
    with pytest.raises(ConfigError, match=f"client_dp: the aggregate of {name} is no mean"):
        FactorStrategy(make_rule(name), client_dp=SILENT)


@pytest.mark.parametrize("robust", [name for name in ROBUST if name != "none"])
@pytest.mark.parametrize("name", MEANS)
def test_a_robust_centre_is_refused_by_the_run_and_by_the_strategy(name: str, robust: str) -> None:
    with pytest.raises(NotApplicable, match=f"strategy.robust = {robust!r} is no mean"):
        check(config(strategy=StrategyConfig(name=name, robust=robust)))
    with pytest.raises(NotApplicable, match=f"client_dp: the centre {robust!r} is no mean"):
        FactorStrategy(make_rule(name, center=make_center(robust)), client_dp=SILENT)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strategy": StrategyConfig(max_update_norm=0.1)}, "strategy.max-update-norm = 0.1 tells who is"),
        ({"model": ModelConfig(head="local")}, "model.head = 'local'"),
        (
            {"client_groups": '[{"partitions": "0", "alpha": 3.0}]'},
            "needs equal ranks and alphas",
        ),
    ],
)
def test_combinations_outside_the_guarantee_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(config(**changes))
    for wrong in ({"clipping_norm": 0.0}, {"noise_multiplier": 0.0}, {"noise_multiplier": float("nan")}):
        with pytest.raises(ConfigError, match="must be > 0"):
            replace(SILENT, **wrong)  # type: ignore[arg-type]
