"""Rounds of tiers: a timeline by hand, one tier that is a round that waits, going on in the middle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import strategies
from fedlora.config import from_flat
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate import check
from strategies.flower import FactorStrategy
from strategies.late import FACTORS, PRODUCT
from strategies.report import RoundReport
from strategies.tiered import TieredStrategy
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import bits, initial_arrays, watched
from tests.simulation.test_buffered_rounds import buffered, timed
from tests.simulation.test_buffered_runs import KEYS, Killed, run

LATE = [name for name, rule in strategies.RULES.items() if rule.facts.stale in (FACTORS, PRODUCT)]
TIERS = {"devices.tiers": 2}


def tiered(name: str, **options: Any) -> TieredStrategy:
    given = {"scaling": 2.0, "seed": 3, "fraction_evaluate": 0.0, "tiers": 2} | options
    return TieredStrategy(strategies.make_rule(name), **given)


def timeline(strategy: TieredStrategy, grid: Any, last: int) -> list[tuple[float, dict[int, float], int]]:
    """Of each round the time, who arrived when, and how stale they were."""
    seen = []
    strategy.open(initial_arrays())
    for _ in strategy.rounds(grid, last=last):
        (stale,) = set(grid.staleness.values())
        seen.append((grid.seconds, grid.arrivals, stale))
    return seen


def test_a_timeline_of_five_clients_in_two_tiers_by_hand(tmp_path: Path) -> None:
    """Clients 0, 1 and 2 take 4, 6 and 7 s: a round of theirs ends at 7, 14, 21 and so on.

    Clients 3 and 4 take 10 and 25 s; when theirs ends three others have been merged. The fast ones' next
    round began at 21, one version earlier.
    """
    assert timeline(tiered("fedavg"), timed(ToyClient(tmp_path)), 5) == [
        (7.0, {0: 4.0, 1: 6.0, 2: 7.0}, 0),
        (14.0, {0: 11.0, 1: 13.0, 2: 14.0}, 0),
        (21.0, {0: 18.0, 1: 20.0, 2: 21.0}, 0),
        (25.0, {3: 10.0, 4: 25.0}, 3),
        (28.0, {0: 25.0, 1: 27.0, 2: 28.0}, 1),
    ]


def test_a_fraction_is_of_each_tier_and_others_follow(tmp_path: Path) -> None:
    seen = timeline(tiered("fedavg", fraction_train=0.5, tiers=1), timed(ToyClient(tmp_path)), 12)
    assert all(len(arrivals) == 2 for _, arrivals, _ in seen)
    assert {p for _, arrivals, _ in seen for p in arrivals} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", LATE)
def test_one_tier_of_all_has_the_bits_of_rounds_that_wait(name: str, tmp_path: Path) -> None:
    waits = FactorStrategy(strategies.make_rule(name), scaling=2.0, seed=3, fraction_evaluate=0.0)
    waits.start(FakeGrid(range(5), ToyClient(tmp_path / "a")), initial_arrays(), num_rounds=3)
    one = tiered(name, tiers=1)
    one.start(timed(ToyClient(tmp_path / "b")), initial_arrays(), num_rounds=3)
    assert bits(waits) == bits(one)


def test_a_tier_goes_on_without_whoever_vanishes(tmp_path: Path) -> None:
    strategy = tiered("fedavg")
    reports, grid = watched(strategy), timed(ToyClient(tmp_path), failure=0.4)
    grid.timeout = 30.0
    strategy.start(grid, initial_arrays(), num_rounds=8)
    gone = [why for report in reports for why in report.refused.values()]
    assert gone
    assert all(why.startswith("vanished after ") for why in gone)
    assert any(len(r.participants) > 0 and r.refused for r in reports)


def test_a_tier_that_is_too_slow_is_dropped_and_begins_again(tmp_path: Path) -> None:
    strategy = tiered("fedavg", max_staleness=2)
    reports = watched(strategy)
    strategy.start(timed(ToyClient(tmp_path)), initial_arrays(), num_rounds=6)
    assert [set(report.participants) for report in reports] == [{0, 1, 2}] * 6
    assert set(reports[3].refused) == {3, 4}
    assert all(why.endswith("devices.max-staleness = 2") for why in reports[3].refused.values())


@pytest.mark.parametrize("name", ["fedavg", "flora"])
def test_a_run_that_was_killed_goes_on_with_the_same_bits_and_times(name: str, tmp_path: Path) -> None:
    keys = KEYS | TIERS | {"strategy.name": name, "seed": 2}
    run(keys, tmp_path / "whole")
    with pytest.raises(Killed):
        run(keys, tmp_path / "twice", dies_after=2)
    assert json.loads((tmp_path / "twice/checkpoint/latest.json").read_text())["in-flight"]
    run(keys, tmp_path / "twice", resume=True)
    found = []
    for folder in (tmp_path / "whole", tmp_path / "twice"):
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("seconds")
        adapter = load_file(folder / "adapter/adapter_model.safetensors")
        found.append((lines, {name: tensor.numpy().tobytes() for name, tensor in adapter.items()}))
    assert found[0] == found[1]
    assert any(set(line["staleness"].values()) != {0} for line in found[0][0]), "a stale tier was merged"


@pytest.mark.parametrize(
    ("keys", "error", "why"),
    [
        ({"strategy.name": "fedsvd"}, NotApplicable, "devices.tiers = 2: fedsvd cannot take late updates"),
        ({"strategy.name": "fedsa"}, NotApplicable, "devices.tiers = 2: what clients keep to themselves"),
        (
            {"privacy.mode": "client"},
            NotApplicable,
            "devices.tiers = 2: privacy.mode = 'client' needs rounds",
        ),
        ({"devices.buffer-size": 2}, ConfigError, "devices.tiers = 2: devices.buffer-size is set, too"),
        ({"devices.in-flight": 2}, ConfigError, "devices.in-flight = 2: means nothing without"),
        ({"devices.over-selection": 1.2, "fraction-train": 0.5}, ConfigError, "rounds of devices.tiers"),
        ({"devices.profiles": ""}, ConfigError, "devices.tiers = 2: means nothing without devices.profiles"),
    ],
)
def test_what_tiers_exclude_is_refused(keys: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        check(from_flat(KEYS | TIERS | keys))


def test_more_tiers_than_clients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"devices\.tiers = 7: only 6 clients take part"):
        run(KEYS | {"devices.tiers": 7}, tmp_path / "run")
    assert not (tmp_path / "run/rounds.jsonl").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("kind", ["waits", "buffered", "tiered"])
def test_a_loss_that_is_no_number_or_huge_is_left_out_of_the_mean(
    kind: str, bad: float, tmp_path: Path
) -> None:
    """Its update counts; and where nobody has another loss, the round has none."""

    def reports(loss: Callable[[int], float]) -> list[RoundReport]:
        client = ToyClient(tmp_path, loss=loss)
        waits = FactorStrategy(strategies.make_rule("fedavg"), scaling=2.0, seed=3, fraction_evaluate=0.0)
        made = {"waits": waits, "buffered": buffered("fedavg"), "tiered": tiered("fedavg")}[kind]
        seen = watched(made)
        made.start(
            FakeGrid(range(5), client) if kind == "waits" else timed(client), initial_arrays(), num_rounds=2
        )
        return seen

    some = reports(lambda partition: 3.0 if partition else bad)
    assert 0 in some[0].participants
    assert [report.train_loss for report in some] == [3.0, 3.0]
    assert all(report.train_loss is None for report in reports(lambda partition: bad))
