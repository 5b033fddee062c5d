"""The audit finds what is broken, at a claimed epsilon of 2, and lets stand what is right."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlora.audit.run import FINAL, SERVER, Audit, audit
from fedlora.cli import cli
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from tests.audit import broken
from tests.conftest import tiny_config

ROOT = Path(__file__).parent.parent.parent
KEYS: dict[str, Any] = {
    "num-server-rounds": 2,
    "data.partitioner": "iid",
    "data.num-partitions": 4,
    "train.optimizer": "sgd",
    "train.learning-rate": 0.1,
    "train.local-steps": 4,
    "train.batch-size": 64,
    "privacy.mode": "example",
    "privacy.accountant": "prv",
    "privacy.target-epsilon": 2.0,
    "privacy.noise-multiplier": 3.2,
}
"""512 examples at four clients, so that every step draws half of them; noise for an epsilon of 2."""

RELEASED = {"privacy.release-metrics": True}


def config(**overrides: Any) -> RunConfig:
    return tiny_config(**{**KEYS, **overrides})


def shown(found: Audit, view: str, group: str) -> float:
    return found.bounds[view][group].epsilon


@lru_cache(maxsize=8)
def right(seed: int) -> Audit:
    return audit(config(seed=seed))


def test_the_claim_is_close_to_two_and_comes_from_the_ledger() -> None:
    assert 1.9 < right(1).claimed_epsilon <= 2.0
    assert right(1).clients == 4
    assert right(1).draws == 2 * 4 * 64 / 128


@pytest.mark.parametrize("seed", [1, 2])
def test_right_privacy_stays_below_its_claim(seed: int) -> None:
    found = right(seed)
    assert found.outcome == "stands"
    for view in (SERVER, FINAL):
        for group in ("factors", "head"):
            bound = found.bounds[view][group]
            assert bound.canaries == 512
            assert bound.epsilon < found.claimed_epsilon / 2
            assert bound.largest > 2 * found.claimed_epsilon


def test_the_same_seed_finds_the_same() -> None:
    assert audit(config(seed=1)) == right(1)
    assert right(2).bounds != right(1).bounds


def test_missing_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.no_noise(monkeypatch)
    found = audit(config())
    assert found.outcome == "refuted"
    assert found.claimed_epsilon == right(1).claimed_epsilon
    assert shown(found, SERVER, "factors") > 3.0
    assert shown(found, SERVER, "head") > found.claimed_epsilon
    assert shown(found, FINAL, "factors") > 3.0


def test_noise_after_averaging_is_found_by_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.noise_after_averaging_only(monkeypatch)
    found = audit(config())
    assert found.outcome == "refuted"
    assert shown(found, SERVER, "factors") > 3.0
    assert shown(found, SERVER, "head") > found.claimed_epsilon
    assert shown(found, FINAL, "factors") < found.claimed_epsilon


def test_a_head_left_out_is_found_at_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.head_left_out(monkeypatch)
    found = audit(config())
    view, group, _ = found.strongest
    assert found.outcome == "refuted"
    assert (view, group) == (SERVER, "head")
    assert shown(found, SERVER, "factors") < found.claimed_epsilon


def test_missing_clipping_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.no_clipping(monkeypatch)
    assert audit(config()).outcome == "refuted"


def test_missing_noise_is_found_under_adamw_too(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.no_noise(monkeypatch)
    assert audit(config(**{"train.optimizer": "adamw", "train.learning-rate": 3e-3})).outcome == "refuted"


@pytest.mark.parametrize(
    ("keys", "views", "groups"),
    [
        ({"strategy.name": "flora"}, [SERVER], ["factors", "head"]),
        ({"strategy.name": "rolora"}, [SERVER, FINAL], ["factors", "head"]),
        ({"strategy.name": "head-only"}, [SERVER, FINAL], ["head"]),
        ({"model.head": "freeze"}, [SERVER, FINAL], ["factors"]),
        ({"strategy.name": "fedsa", "model.head": "local", **RELEASED}, [SERVER, FINAL], ["factors"]),
        ({"strategy.name": "flora", "lora.ranks": "2,4"}, [SERVER], ["factors", "head"]),
    ],
)
def test_what_is_not_shipped_is_not_looked_at(
    keys: dict[str, Any], views: list[str], groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken.no_noise(monkeypatch)
    found = audit(config(**keys), canaries=256)
    assert list(found.bounds) == views
    assert all(list(of_view) == groups for of_view in found.bounds.values())
    assert bool(found.unmeasured) == (FINAL not in views)
    assert found.outcome == "refuted"
    assert (found.membership is None) == (keys.get("model.head") == "local")


def test_a_head_has_room_for_as_many_canaries_as_it_has_numbers() -> None:
    found = audit(config(**{"num-server-rounds": 1}), canaries=1000)
    assert found.bounds[SERVER]["head"].canaries == 4 * (32 * 4 + 4)
    assert found.bounds[SERVER]["factors"].canaries == 1000


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"privacy.mode": "none"}, {}, r"privacy\.mode = 'none'"),
        ({"strategy.name": "local-only", "model.head": "local", **RELEASED}, {}, "clients send nothing"),
        ({}, {"canaries": 7}, "--canaries 7"),
        ({}, {"confidence": 1.0}, "--confidence 1"),
    ],
)
def test_what_cannot_be_audited_is_refused(keys: dict[str, Any], options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        audit(config(**keys), **options)


def test_the_ledger_of_the_data_is_left_alone(tmp_path: Path) -> None:
    audit(config(**{"privacy.ledger": str(tmp_path / "ledger"), "num-server-rounds": 1}))
    assert not (tmp_path / "ledger").exists()


def test_the_command_says_bound_largest_and_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(ROOT / "experiments" / "audit.toml")
    quick = ["--set", "num-server-rounds=1", "--set", "privacy.accountant=pld"]
    plain = CliRunner().invoke(cli, ["privacy", "audit", path, *quick])
    assert plain.exit_code == 0
    assert "with 95 % confidence; the largest that 512 canaries could show is 4.30; " in plain.output
    assert "claimed: 2.00 at delta 1e-05" in plain.output
    assert "The claim is not refuted" in plain.output
    assert "true positives at 1 % false positives: not resolvable, 500 non-members would do" in plain.output
    few = CliRunner().invoke(
        cli, ["privacy", "audit", path, *quick, "--canaries", "16", "--set", "train.batch-size=8"]
    )
    assert few.exit_code == 3
    assert "Inconclusive: half the noise would not have been noticed either" in few.output
    assert "was in 0.25 batches on average" in few.output
    assert "on average" not in plain.output
    broken.no_noise(monkeypatch)
    found = CliRunner().invoke(cli, ["privacy", "audit", path, *quick, "--json"])
    record = json.loads(found.stdout.splitlines()[-1])
    assert found.exit_code == 1
    assert record["outcome"] == "refuted"
    assert record["strongest"]["epsilon"] > record["claimed_epsilon"]
    assert np.isfinite(record["membership"]["auc"]["value"])
