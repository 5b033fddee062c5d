"""Bounds on one client's part in a round: they act beyond, nowhere else, and no aggregate is infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import given
from hypothesis import strategies as st

from fedlora import wire
from fedlora.config import RunConfig, from_flat
from fedlora.core.factors import LoraFactors
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, State
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.server.validate import UNEQUAL_STEPS, check_asynchronous, configured_rule, configured_screening
from strategies.client_dp import ClientDP
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from strategies.robust import make_center, product_distances
from strategies.screening import Screening, way
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, bits, initial_arrays, watched

PULLS = st.lists(st.floats(0, 1e12) | st.sampled_from([0.0, 1.0, 2.0**53]), min_size=1, max_size=12)


@given(pulls=PULLS, share=st.floats(1, 4))
def test_no_pull_is_above_its_share_and_those_within_stay(pulls: list[float], share: float) -> None:
    bounded = Screening(largest_share=share).bounded(pulls)
    assert all(0 <= after <= before for before, after in zip(pulls, bounded, strict=True))
    if sum(p > 0 for p in pulls) * share >= len(pulls):  # else so few of any weight cannot be bounded so
        assert max(bounded) <= share / len(pulls) * sum(bounded) * (1 + 1e-9)
    if max(pulls) <= share / len(pulls) * sum(pulls) * (1 - 1e-9):
        assert bounded == pulls


def updates_of(ways: list[float], weights: list[float]) -> tuple[list[ClientUpdate], dict[int, Broadcast]]:
    """Updates whose tensors all moved by one number, in one layer and the head."""
    rule = make_rule("fedavg")
    start = LoraFactors(torch.zeros(2, 3), torch.zeros(4, 2), 1.0)
    state = State(round=0, adapters={"q": start}, head={"h": torch.zeros(2)}, base=(), seed=0)
    starts = {
        p: rule.broadcast(state, ClientSpec(partition_id=p, rank=2, scaling=1.0)) for p in range(len(ways))
    }
    made = [
        ClientUpdate(
            partition_id=p,
            adapters={"q": LoraFactors(torch.full((2, 3), w), torch.full((4, 2), -w), 1.0)},
            head={"h": torch.full((2,), w)},
            weight=weight,
        )
        for p, (w, weight) in enumerate(zip(ways, weights, strict=True))
    ]
    return made, starts


def test_the_way_is_the_root_mean_square_of_what_is_shipped() -> None:
    updates, starts = updates_of([0.5, 3.0], [1, 1])
    assert [way(u, starts[u.partition_id]) for u in updates] == pytest.approx([0.5, 3.0])
    only_b = {p: replace(start, uploaded=frozenset({"B"})) for p, start in starts.items()}
    moved = replace(
        updates[0], adapters={"q": updates[0].adapters["q"].replaced({"A": torch.full((2, 3), 9.0)})}
    )
    assert way(moved, only_b[0]) == pytest.approx(0.5)


def test_who_moves_beyond_the_bound_is_refused_and_the_others_keep_their_bits() -> None:
    updates, starts = updates_of([1.0, 1.0, 1.9, -1.0, 2.1], [1.0] * 5)
    kept, refused = Screening().screened(updates, starts)
    assert kept == updates[:4]
    assert all(one is other for one, other in zip(kept, updates, strict=False))
    assert refused == {4: "moved 2.1 times as far as the round's median, strategy.max-relative-norm = 2"}


def test_claims_are_cut_by_weight_times_way() -> None:
    updates, starts = updates_of([1.0, 1.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 1e9])
    kept, refused = Screening().screened(updates, starts)
    assert refused == {}
    assert [u.weight for u in kept[:4]] == [3.0] * 4
    # share 2/5: w * 2 = 0.4 (12 + w * 2), w = 4
    assert kept[4].weight == pytest.approx(4.0)


def test_two_updates_have_no_median_that_means_anything() -> None:
    updates, starts = updates_of([1.0, 100.0], [1.0, 1.0])
    assert Screening().screened(updates, starts) == (updates, {})


@pytest.mark.parametrize("key", ["largest_share", "max_relative_norm"])
@pytest.mark.parametrize("value", [0.5, -1.0, math.inf, math.nan])
def test_bounds_are_none_or_at_least_one(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"strategy.{key.replace('_', '-')} = .*: must be 0 or at least 1"):
        Screening(**{key: value})


def screened(config: RunConfig, *, simulation: bool) -> Screening | None:
    return configured_screening(config, configured_rule(config.strategy), simulation=simulation)


def test_screening_is_on_in_a_deployment_and_off_in_a_simulation() -> None:
    config = from_flat({})
    assert screened(config, simulation=True) is None
    assert screened(config, simulation=False) == Screening(largest_share=2.0, max_relative_norm=2.0)
    assert screened(from_flat({"strategy.screening": "on"}), simulation=True) == Screening()
    assert screened(from_flat({"strategy.screening": "off"}), simulation=False) is None
    epochs = screened(from_flat({"train.local-epochs": 1}), simulation=False)
    assert epochs == Screening(max_relative_norm=2.0 * UNEQUAL_STEPS)


def test_screening_and_client_level_privacy_exclude_each_other() -> None:
    private = {"privacy.mode": "client", "privacy.noise-multiplier": 1.0}
    assert screened(from_flat(private), simulation=False) is None
    with pytest.raises(NotApplicable, match=r"strategy.screening = 'on'"):
        screened(from_flat({**private, "strategy.screening": "on"}), simulation=False)
    mechanism = ClientDP(clipping_norm=1.0, noise_multiplier=1.0, seed=0)
    with pytest.raises(ConfigError, match="screening"):
        FactorStrategy(make_rule("fedavg"), client_dp=mechanism, screening=Screening())


def test_a_private_aggregate_is_made_once_whatever_it_is(tmp_path: Path) -> None:
    """Neither another draw of noise nor a client that is left out tells more than the accountant knows."""
    rule, drawn = make_rule("fedavg"), list[int]()

    class Counted(ClientDP):
        def privatise(self, updates: Any, sent: Any, planned: int, server_round: int) -> list[ClientUpdate]:
            drawn.append(server_round)
            (private,) = ClientDP.privatise(self, updates, sent, planned, server_round)
            return [replace(private, head={n: t * math.inf for n, t in private.head.items()})]

    mechanism = Counted(clipping_norm=1.0, noise_multiplier=1.0, seed=0)
    strategy = FactorStrategy(rule, scaling=2.0, client_dp=mechanism)
    with pytest.raises(RunFailed, match="private aggregate holds a NaN or an infinity"):
        strategy.start(FakeGrid(range(3), ToyClient(tmp_path)), initial_arrays(), num_rounds=2)
    assert drawn == [1]


def test_a_private_round_counts_updates_that_weigh_nothing(tmp_path: Path) -> None:
    """There weights are no part of the aggregate, so that they cannot tell who was in it."""
    mechanism = ClientDP(clipping_norm=1.0, noise_multiplier=1.0, seed=0)
    toy = ToyClient(tmp_path, num_examples=lambda p: 0)
    strategy = FactorStrategy(make_rule("fedavg"), scaling=2.0, client_dp=mechanism)
    strategy.start(FakeGrid(range(3), toy), initial_arrays(), num_rounds=1)
    assert strategy.report.participants == [0, 1, 2]


def test_rounds_that_do_not_wait_refuse_screening_in_words() -> None:
    late = {"devices.profiles": "equal", "devices.buffer-size": 2, "devices.in-flight": 3}
    with pytest.raises(NotApplicable, match=r"screening = 'on' needs rounds that wait"):
        check_asynchronous(from_flat({**late, "strategy.screening": "on"}), make_rule("fedavg"))
    check_asynchronous(from_flat({**late, "min-train-nodes": 1}), make_rule("fedavg"))


# --- whole rounds ----------------------------------------------------------------------------------

HONEST = 6


def rounds_with(
    rule: str, root: Path, lie: str, *, wire_dtype: str = "float32", **settings: object
) -> FactorStrategy:
    """Two rounds of toy clients, of which partition 1 lies."""
    toy = ToyClient(root, num_examples=lambda p: 5)

    def client(message: Message, partition: int) -> Message | None:
        reply = toy(message, partition)
        if partition != 1 or reply is None or not lie:
            return reply
        tensors = wire.from_record(reply.content["arrays"])
        if lie == "weight":
            reply.content["metrics"]["num-examples"] = 1.7e308
        elif lie == "claim":
            reply.content["metrics"]["num-examples"] = 10**12
        else:
            tensors = {k: torch.full_like(t, float(lie)) for k, t in tensors.items()}
        reply.content["arrays"] = wire.to_record(tensors, wire_dtype)
        return reply

    strategy = FactorStrategy(make_rule(rule), scaling=2.0, wire_dtype=wire_dtype, **settings)  # type: ignore[arg-type]
    strategy.reports = watched(strategy)  # type: ignore[attr-defined]
    strategy.start(FakeGrid(range(HONEST), client), initial_arrays(), num_rounds=2)
    return strategy


GLOBAL = [
    name
    for name, rule in RULES.items()
    if rule.facts.uploaded and not rule.facts.personal and rule.facts.trained <= {"A", "B"}
    and name not in ("lora-fair",)
]  # fmt: skip


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """The bits that a rule's rounds end with where partition 1 is not there."""

    @cache
    def of(rule: str) -> dict[str, bytes]:
        return bits(rounds_with(rule, tmp_path_factory.mktemp("honest"), "", partitions={0, 2, 3, 4, 5}))

    return of


@pytest.mark.parametrize("lie", ["1e19", "3e38", "-1e30", "2e6", "weight"])
@pytest.mark.parametrize("rule", GLOBAL)
def test_enormous_values_are_refused_and_attributed_and_the_round_goes_on(
    rule: str, lie: str, honest: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    strategy = rounds_with(rule, tmp_path, lie)
    for report in strategy.reports:  # type: ignore[attr-defined]
        assert set(report.refused) == {1}
        assert "\n" not in report.refused[1]
        assert report.participants == [0, 2, 3, 4, 5]
    assert bits(strategy) == honest(rule)


@pytest.mark.parametrize("rule", GLOBAL)
def test_what_a_rule_makes_infinite_is_made_again_without_the_furthest(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.replies.LARGEST", 3.5e38)
    strategy = rounds_with(rule, tmp_path, "3e38")
    for report in strategy.reports:  # type: ignore[attr-defined]
        assert list(report.refused) in ([1], [])
    assert all(np.isfinite(np.frombuffer(b, np.float32)).all() for b in bits(strategy).values())


def test_half_precision_overflows_of_one_client_are_refused(tmp_path: Path) -> None:
    strategy = rounds_with("flexlora", tmp_path, "60000", wire_dtype="float16")
    for report in strategy.reports:  # type: ignore[attr-defined]
        assert report.refused == {1: "with it the aggregate would hold a NaN or an infinity"}


def test_a_claim_of_more_examples_than_are_known_is_refused(tmp_path: Path) -> None:
    strategy = rounds_with("fedavg", tmp_path, "claim", known_examples=lambda p: 5)
    assert [r.refused for r in strategy.reports] == [{1: "claims 1e+12 examples, it is known to have 5"}] * 2  # type: ignore[attr-defined]


def test_a_round_in_which_nobody_weighs_anything_ends_in_words(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path, num_examples=lambda p: 0)
    strategy = FactorStrategy(make_rule("fedavg"), scaling=2.0)
    with pytest.raises(RunFailed, match=r"0 valid updates.*weighs nothing"):
        strategy.start(FakeGrid(range(3), toy), initial_arrays(), num_rounds=1)


# --- multi-krum by products ----------------------------------------------------------------------------


def test_distances_are_those_of_the_dense_products_whatever_the_ranks() -> None:
    g = torch.Generator().manual_seed(3)
    updates = [
        ClientUpdate(
            partition_id=p,
            adapters={
                n: LoraFactors(torch.randn(r, i, generator=g), torch.randn(o, r, generator=g), 0.5 + p)
                for n, (o, i) in MODULES.items()
            },
            head={"h": torch.randn(4, generator=g)},
            weight=1.0,
        )
        for p, r in enumerate([1, 2, 3, 5])
    ]
    found = product_distances(updates).numpy()
    for k, one in enumerate(updates):
        for j, other in enumerate(updates):
            gaps = [
                (one.adapters[n].delta() - other.adapters[n].delta()).double().numpy()  # type: ignore[attr-defined]
                for n in MODULES
            ]
            gaps.append((one.head["h"] - other.head["h"]).double().numpy())
            assert found[k, j] == pytest.approx(sum((gap**2).sum() for gap in gaps), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("rule", [name for name, r in RULES.items() if not r.facts.mean and name in GLOBAL])
def test_multi_krum_leaves_a_liar_out_under_rules_that_stack_or_multiply(rule: str) -> None:
    lied = make_rule(rule, center=make_center("multi-krum"))
    assert lied.center.products  # type: ignore[attr-defined]
    updates, _ = updates_of([1.0, 1.1, 0.9, 1.0, 1.2, 40.0], [1.0] * 6)
    assert [u.partition_id for u in lied.choose(updates)] == [0, 1, 2, 3, 4]


def test_other_robust_centres_name_multi_krum_where_there_is_no_mean() -> None:
    with pytest.raises(NotApplicable, match="multi-krum chooses for every rule"):
        make_rule("flora", center=make_center("median"))
