"""Evaluations that leave a node with noise: charged to its ledger, within its limit, with nothing beside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from clients import owner
from clients.handler import EVALUATE, TRAIN, handle
from clients.node_settings import node_settings
from fedlora import wire
from fedlora.config import RunConfig, to_flat
from fedlora.errors import ConfigError
from fedlora.privacy.ledger import read_ledgers
from tests.conftest import tiny_config
from tests.deployment.test_limits import LABELS, PRIVATE, order
from tests.in_process import RUNTIMES

OWN: dict[str, Any] = {"dataset-id": "ward 7", "test-fraction": 0.4, "max-epsilon": 9.0}
NOISY: dict[str, Any] = {**OWN, "max-evaluations": 3, "evaluation-epsilon": 3.0}
HIDDEN: dict[str, Any] = {"privacy.neighboring-relation": "add_or_remove_one"}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"text": f"word {i} of ward", "label": ("neg", "pos")[i % 2]} for i in range(30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "own.jsonl")


def reply(kind: str, config: RunConfig, home: Path, server_round: int = 1, **node: Any) -> wire.Reply:
    node_config = {"partition-id": 0, "state-dir": str(home), **node}
    content = handle(kind, order(config, server_round, LABELS), to_flat(config), node_config, RUNTIMES)
    return wire.decode_reply(content)


def test_so_many_leave_with_noise_and_each_is_on_the_ledger(
    tmp_path: Path, cache: Path, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(**PRIVATE)
    replies = [reply(EVALUATE, config, tmp_path, r, data=data, **NOISY) for r in (1, 1, 2, 3)]
    assert [r.status for r in replies] == [wire.OK] * 3 + [wire.DECLINED]
    assert replies[3].reason == owner.REFUSAL
    assert "evaluations have spent 9" in caplog.text
    assert not (tmp_path / owner.EVALUATIONS).exists()
    measured = [r.metrics for r in replies[:3]]
    assert all(m.keys() == {"num-examples", "accuracy", "loss"} for m in measured)
    assert {m["num-examples"] for m in measured} == {12.0}
    assert len({(m["loss"], m["accuracy"]) for m in measured}) == 3
    claims = [r.privacy for r in replies[:3] if r.privacy]
    assert [c["epsilon"] for c in claims] == [3.0, 6.0, 9.0]
    assert {c["delta"] for c in claims} == {0.0}
    (account,) = read_ledgers(tmp_path / "ledger")
    assert (account.identity, account.standing.on_evaluations) == ("ward 7", 9.0)


def test_training_and_evaluations_of_one_ledger_are_of_like_examples(
    tmp_path: Path, cache: Path, data: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = {"task": "causal-lm", "model.name": "tiny-lm", "train.batch-size": 2, "data.partitioner": "iid"}
    node = {"data": data, **NOISY, "label-column": "", "max-epsilon": 50.0}
    long, short = (
        tiny_config(**{**PRIVATE, **text, "data.num-partitions": 1, "data.max-length": n}) for n in (64, 8)
    )
    kinds = (EVALUATE, long), (EVALUATE, short), (TRAIN, short), (TRAIN, long)
    replies = [reply(kind, config, tmp_path, **node) for kind, config in kinds]
    assert [r.status for r in replies] == [wire.OK, wire.DECLINED, wire.DECLINED, wire.OK]
    assert replies[1].reason == owner.REFUSAL
    assert caplog.text.count("data.max-length = 8: ") == 2


def test_training_leaves_alone_what_is_set_aside(tmp_path: Path, cache: Path, data: str) -> None:
    config = tiny_config(**{**PRIVATE, "privacy.target-epsilon": 9.0, "train.batch-size": 4})
    node = {"data": data, **NOISY, "evaluation-epsilon": 1.0}
    trained = [reply(TRAIN, config, tmp_path, r, **node) for r in range(1, 5)]
    assert [r.status for r in trained][-1] == wire.DECLINED
    assert trained[0].status == wire.OK
    evaluated = [reply(EVALUATE, config, tmp_path, r, **node).status for r in range(1, 5)]
    assert evaluated == [wire.OK] * 3 + [wire.DECLINED]
    (account,) = read_ledgers(tmp_path / "ledger")
    standing = account.standing
    assert 0 < standing.epsilon - standing.on_evaluations <= 6.0
    assert standing.on_evaluations == 3.0
    assert standing.delta == 1e-5


def test_a_hidden_count_stays_hidden(tmp_path: Path, cache: Path, data: str) -> None:
    config = tiny_config(**{**PRIVATE, **HIDDEN})
    node = {"data": data, **NOISY, "declared-examples": 50, "max-evaluations": 8, "evaluation-epsilon": 0.5}
    replies = [reply(EVALUATE, config, tmp_path, 1, **node) for _ in range(8)]
    counts = [r.metrics["num-examples"] for r in replies]
    assert len(set(counts)) > 3
    assert {(r.privacy or {})["neighboring_relation"] for r in replies} == {"add_or_remove_one"}


def test_a_hidden_count_of_no_test_example_is_answered_and_a_public_one_is_not(
    tmp_path: Path, cache: Path, data: str
) -> None:
    node = {"data": data, **NOISY, "test-fraction": 0.0}
    hidden = tiny_config(**{**PRIVATE, **HIDDEN})
    assert reply(EVALUATE, hidden, tmp_path / "a", **node, **{"declared-examples": 50}).status == wire.OK
    assert reply(EVALUATE, tiny_config(**PRIVATE), tmp_path / "b", **node).status == wire.DECLINED
    assert not list((tmp_path / "b" / "ledger").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({"evaluation-epsilon": 1.0, "max-evaluations": 2}, "takes test examples of the node's own"),
        ({"evaluation-epsilon": 1.0, **OWN, "data": "/own.jsonl"}, "takes max-evaluations"),
        (
            {**NOISY, "data": "/own.jsonl", "evaluation-epsilon": 3.5},
            "evaluation-epsilon = 3.5: max-evaluations = 3 of them take 10.5, max-epsilon is 9",
        ),
        ({**NOISY, "data": "/own.jsonl", "evaluation-epsilon": -1.0}, "evaluation-epsilon = -1.0"),
    ],
)
def test_limits_that_contradict_each_other_are_named(node: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        node_settings({"partition-id": 0, **node})
    assert named in str(caught.value)
