"""Between which data sets the claim holds: two modes, each against a hockey-stick computation of its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from clients.budget import plan_release, rate_of
from clients.handler import in_owners_name
from clients.ledger_ref import LedgerRef
from clients.node_settings import node_settings
from fedlora.config import from_flat
from fedlora.errors import ConfigError, OwnDataRefused
from fedlora.privacy.calibration import calibrate_noise, warn_of_delta
from fedlora.privacy.entries import BEFORE_RELATIONS
from fedlora.privacy.filter import Budget
from fedlora.privacy.ledger import Ledger, read_ledgers
from fedlora.privacy.types import NeighboringRelation
from fedlora.server.identity import config_digest
from tests.conftest import tiny_config
from tests.in_process import client_runtime, federated
from tests.privacy.hockey_stick import epsilon, sums
from tests.privacy.ledgers import DATASET, WIDE, made, release

DELTA = 1e-5
HIDDEN = NeighboringRelation.ADD_OR_REMOVE_ONE
HIDING: dict[str, Any] = {
    "privacy.mode": "example", "privacy.accountant": "rdp", "privacy.neighboring-relation": HIDDEN.value,
}  # fmt: skip
FOUR = Budget(target_epsilon=4.0, target_delta=DELTA, accountant="rdp")
ALIGNED = [(1, 10, 1000, 3.0, 5.68), (8, 16, 100, 1.0, 1.97), (16, 137, 60, 1.0, 1.34)]
"""Batch size, examples that all push the same way, steps; the epsilon claimed, and what one more example that
pushes the other way makes of it where the rate is batch size / examples."""


@pytest.mark.parametrize(("batch", "n", "steps", "claimed", "really"), ALIGNED)
def test_each_mode_keeps_its_claim_and_a_rate_that_follows_the_count_does_not(
    batch: int, n: int, steps: int, claimed: float, really: float
) -> None:
    rate, one_more = batch / n, batch / (n + 1)
    noise = calibrate_noise(claimed, DELTA, rate, steps)
    with_one, without = sums(n - 1, rate, -1, rate), sums(n - 1, rate)
    assert epsilon(with_one, without, noise, steps, DELTA) <= claimed, "zero_out_one"
    found = epsilon(sums(n, rate), sums(n, one_more, -1, one_more), noise, steps, DELTA)
    assert found == pytest.approx(really, abs=0.01), "one example more, when the rate follows"
    declared = batch / (n + 1)
    noise = calibrate_noise(claimed, DELTA, declared, steps)
    found = epsilon(sums(n, declared), sums(n, declared, -1, declared), noise, steps, DELTA)
    assert found <= claimed, "add_or_remove_one by a declared count"


def test_the_rate_goes_by_the_declared_count_and_the_real_one_moves_nothing() -> None:
    config = tiny_config(**HIDING, **{"privacy.declared-examples": 400, "train.batch-size": 16})
    assert {rate_of(config, 0, n) for n in (1, 15, 16, 399, 400)} == {16 / 400}
    with pytest.raises(OwnDataRefused, match="declared-examples = 400: there are 401") as refused:
        rate_of(config, 0, 401)
    assert "401" not in refused.value.told
    public = tiny_config(**{"privacy.mode": "example", "train.batch-size": 16})
    assert rate_of(public, 0, 64) == 16 / 64


def test_a_client_below_its_declared_count_plans_and_tells_the_same(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**HIDING, **{"privacy.declared-examples": 500})
    runtime = client_runtime(config)
    sizes = {p: len(runtime.data.indices(p)) for p in range(runtime.data.num_partitions)}
    few, many = min(sizes, key=lambda p: sizes[p]), max(sizes, key=lambda p: sizes[p])
    told = []
    for partition in (few, many):
        ref = LedgerRef(directory=tmp_path / str(partition), run_key="run")
        plan = plan_release(
            runtime, config, ref, partition_id=partition, server_round=1, local_steps=3, seed=None
        )
        spent = plan.reserve()
        assert spent.neighboring_relation == HIDDEN
        told.append({key: value for key, value in spent.told(count=False).items() if key != "ledger_head"})
    assert sizes[few] < sizes[many]
    assert told[0] == told[1]
    assert told[0]["sample_rate"] == config.train.batch_size / 500


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"privacy.neighboring-relation": "swap"}, "accepted are zero_out_one, add_or_remove_one"),
        ({"privacy.declared-examples": 9}, "privacy.declared-examples = 9: must be 0 where"),
        ({**HIDING, "privacy.declared-examples": -1}, "must be >= 0"),
        ({**HIDING, "privacy.mode": "client"}, "must be 'zero_out_one' where privacy.mode = 'client'"),
        ({**HIDING, "privacy.release-metrics": True}, "privacy.release-metrics = True: must be false where"),
    ],
)
def test_contradictions_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        from_flat(keys)
    assert "\n" not in str(refused.value)


def test_a_simulation_without_a_count_or_below_the_largest_client_does_not_begin(
    tmp_path: Path, cache: Path
) -> None:
    for declared in (0, 5):
        config = tiny_config(**HIDING, **{"privacy.declared-examples": declared})
        with pytest.raises(ConfigError, match=f"declared-examples = {declared}: there are"):
            federated(config, tmp_path / str(declared), stores=tmp_path / "stores")
    assert not (tmp_path / "stores").exists()


def test_the_owner_of_a_node_declares_and_the_run_does_not() -> None:
    declares = node_settings({"partition-id": 0, "declared-examples": 300})
    silent = node_settings({"partition-id": 0})
    hidden = tiny_config(**HIDING, **{"privacy.declared-examples": 50})
    public = tiny_config(**{"privacy.mode": "example"})
    assert in_owners_name(hidden, declares, simulation=False).privacy.declared_examples == 300
    assert in_owners_name(hidden, silent, simulation=True) == hidden
    assert in_owners_name(public, silent, simulation=False) == public
    with pytest.raises(
        ConfigError, match="declares how many examples count, which takes 'add_or_remove_one'"
    ):
        in_owners_name(public, declares, simulation=False)
    with pytest.raises(ConfigError, match="declares no declared-examples"):
        in_owners_name(hidden, silent, simulation=False)


def test_an_entry_from_before_holds_for_zero_out_one_only_whatever_was_claimed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    hidden = release(1, neighboring_relation=HIDDEN)
    assert ledger.reserve(hidden, WIDE).neighboring_relation == HIDDEN
    with ledger._chain.locked():
        line = dict(ledger._chain.entries[-1], round=2)
        for key in (*BEFORE_RELATIONS, "previous"):
            line.pop(key, None)
        ledger._chain.append(line)
    other = release(1, run_key="another", neighboring_relation=HIDDEN)
    again = Ledger(tmp_path, DATASET)
    assert again.reserve(other, WIDE).neighboring_relation == HIDDEN, "the run's own releases"
    assert again.standing().neighboring_relation == "zero_out_one"
    assert read_ledgers(tmp_path)[0].standing.releases == 3
    said = [json.loads(text) for text in ledger.path.read_text().splitlines()]
    assert said[1]["neighboring_relation"] == HIDDEN


def test_keys_at_their_defaults_leave_a_run_what_it_was() -> None:
    plain = tiny_config(**{"privacy.mode": "example"})
    assert config_digest(plain) != config_digest(tiny_config(**HIDING))
    assert config_digest(from_flat({})) == "b9523331f4cca2b9", "as it was before there were these keys"


def test_a_delta_that_gives_examples_away_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        warn_of_delta(1e-3, 1234, "examples")
        warn_of_delta(1e-4, 1234, "examples")
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "privacy.target-delta = 0.001: is not below 1 / 1234 examples" in caplog.text


# --- what is told, and what is charged --------------------------------------------------------------------


def test_a_run_is_told_its_own_releases_and_the_owner_all(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    first = [ledger.reserve(release(n, run_key="first"), WIDE) for n in (1, 2)][-1]
    second = ledger.reserve(release(1, run_key="second"), WIDE)
    assert (first.releases, first.steps, second.releases, second.steps) == (2, 6, 1, 3)
    assert second.epsilon < first.epsilon < ledger.standing().epsilon
    assert ledger.standing().releases == 3


def test_a_second_run_with_a_little_more_noise_costs_what_the_first_one_does(tmp_path: Path) -> None:
    more = release(2, noise_multiplier=1.0001, sample_rate=0.0499, steps=40)
    two = [release(1, steps=40), release(2, steps=40)]
    alone = made(tmp_path / "same", *two)
    both = made(tmp_path / "more", release(1, steps=40), more)
    assert both.epsilon == alone.epsilon
    assert both.delta == 1e-5
    entry = json.loads(read_ledgers(tmp_path / "more")[0].path.read_text().splitlines()[3])
    assert (entry["noise_multiplier"], entry["sample_rate"], entry["charged_as"]) == (
        1.0001,
        0.0499,
        [1, 0.05],
    )
    much = release(2, noise_multiplier=9.0, steps=40)
    eight = made(tmp_path / "much", release(1, steps=40), much, budget=FOUR)
    assert eight.epsilon < made(tmp_path / "twice", *two, budget=FOUR).epsilon


def test_what_is_not_dominated_is_charged_as_it_is_and_states_both_deltas(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, DATASET)
    ledger.reserve(release(1), WIDE)
    changed = ledger.reserve(release(2, noise_multiplier=0.9), WIDE)
    assert (changed.accountant, changed.delta) == ("rdp", 2e-5)
    assert made(tmp_path, release(3)).delta == 2e-5
    with pytest.raises(Exception, match=r"delta 2e-05 would be stated, allowed is 1e-05"):
        ledger.reserve(release(4), WIDE, max_delta=1e-5)
