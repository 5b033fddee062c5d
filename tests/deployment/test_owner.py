"""What leaves a protected node is up to its owner, and a refusal is always the same one."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from clients import owner
from clients.handler import EVALUATE, TRAIN, handle
from fedlora import wire
from fedlora.config import RunConfig, to_flat
from fedlora.core.sealed import read_sealed
from fedlora.errors import UpdateRefused
from tests.conftest import tiny_config
from tests.deployment.test_limits import PRIVATE, order
from tests.in_process import RUNTIMES

LIMIT: dict[str, Any] = {"max-epsilon": 100.0}
HIDDEN: dict[str, Any] = {**PRIVATE, "privacy.neighboring-relation": "add_or_remove_one"}


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each refusal waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def reply(kind: str, config: RunConfig, home: Path, server_round: int = 1, **node: Any) -> wire.Reply:
    node_config = {"partition-id": 0, "state-dir": str(home), **node}
    return wire.decode_reply(
        handle(kind, order(config, server_round), to_flat(config), node_config, RUNTIMES)
    )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no guarantee at all": ({"privacy.mode": "none"}, LIMIT),
    "a looser delta": ({**PRIVATE, "privacy.target-delta": 1e-3}, LIMIT),
    "more examples a batch than there are": ({**PRIVATE, "train.batch-size": 5000}, {}),
    "a budget that one step breaks": (
        {**PRIVATE, "privacy.target-epsilon": 1e-3, "privacy.noise-multiplier": 1.0}, {},
    ),
    "a target that no noise reaches": ({**PRIVATE, "privacy.target-epsilon": 1e-9}, {"max-epsilon": 1.0}),
    "a ledger of the run's choice": ({**PRIVATE, "privacy.ledger": "/elsewhere"}, {}),
    "a count that the owner does not declare": (HIDDEN, {}),
    "more examples than are declared": (HIDDEN, {"declared-examples": 9}),
    "own data that cannot be read": (PRIVATE, {"data": "/nowhere.jsonl", "dataset-id": "x"}),
    "a partition that does not exist": (PRIVATE, {"partition-id": 99}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_every_refusal_is_the_same_reply_at_the_same_time(
    why: str, tmp_path: Path, cache: Path, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    keys, node = REFUSED[why]
    began = time.monotonic()
    refused = reply(TRAIN, tiny_config(**keys), tmp_path, **node)
    took = time.monotonic() - began
    assert refused == wire.Reply(status=wire.DECLINED, reason=owner.REFUSAL, answers=refused.answers)
    assert len(pauses) == 1
    whole = (took + pauses[0]) / owner.REFUSAL_SECONDS
    assert abs(whole - round(whole)) < 0.2
    assert [record for record in caplog.records if record.levelname == "WARNING"]
    assert not list((tmp_path / "ledger").glob("*.jsonl")) or why == "a budget that one step breaks"


def test_an_error_that_nobody_foresaw_is_a_refusal_too(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("row 17 of ward 7")

    monkeypatch.setattr("clients.budget.plan_release", broken)
    refused = reply(TRAIN, tiny_config(**PRIVATE), tmp_path)
    assert (refused.status, refused.reason) == (wire.DECLINED, owner.REFUSAL)


@pytest.mark.parametrize("allowed", [False, True])
def test_training_metrics_leave_only_if_owner_and_run_want_it(
    allowed: bool, tmp_path: Path, cache: Path
) -> None:
    asking = tiny_config(**{**PRIVATE, "privacy.release-metrics": True})
    told = reply(TRAIN, asking, tmp_path / "asked", **LIMIT, **{"release-metrics": allowed})
    assert told.status == wire.OK
    assert set(told.metrics) == ({"num-examples", "train-loss"} if allowed else set())
    silent = reply(TRAIN, tiny_config(**PRIVATE), tmp_path / "silent", **{"release-metrics": True})
    assert silent.status == wire.OK
    assert silent.metrics == {}


@pytest.mark.parametrize("mode", ["none", "example"])
def test_no_evaluation_leaves_unless_the_owner_allows_it(mode: str, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**{**PRIVATE, "privacy.mode": mode})
    assert reply(EVALUATE, config, tmp_path, **LIMIT).reason == owner.REFUSAL
    allowed = {**LIMIT, "max-evaluations": 2}
    statuses = [reply(EVALUATE, config, tmp_path, n, **allowed).status for n in (1, 2, 3)]
    assert statuses == [wire.OK, wire.OK, wire.DECLINED]
    assert read_sealed(tmp_path / owner.EVALUATIONS) == {"done": 2}


def test_a_damaged_count_lets_nothing_out(tmp_path: Path, cache: Path) -> None:
    (tmp_path / owner.EVALUATIONS).write_text('{"done": "no')
    assert reply(EVALUATE, tiny_config(**PRIVATE), tmp_path, **{"max-evaluations": 9}).status == wire.DECLINED


def test_an_unprotected_node_says_what_is_wrong_and_evaluates(tmp_path: Path, cache: Path) -> None:
    config = tiny_config()
    refused = reply(TRAIN, config, tmp_path, **{"partition-id": 99})
    assert refused.reason.startswith("partition-id = 99: the data has partitions 0 to")
    assert "accuracy" in reply(EVALUATE, config, tmp_path).metrics


def spoiled(kind: str, value: float) -> tuple[RunConfig, RecordDict]:
    """A message with one value out of range."""
    config = tiny_config(**PRIVATE)
    content = order(config, 1)
    if kind == "scaling":
        content.config_records[wire.CONFIG]["scaling"] = value
        return config, content
    arrays = wire.from_record(content.array_records[wire.ARRAYS])
    name = next(name for name in sorted(arrays) if kind in name)
    arrays[name] = arrays[name].clone()
    arrays[name].view(-1)[3] = value
    content.array_records[wire.ARRAYS] = wire.to_record(arrays)
    return config, content


@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "scaling"])
@pytest.mark.parametrize("value", [1.0001e4, -3e38, float("nan"), float("inf")])
def test_values_beyond_the_range_are_refused_by_the_one_refusal(
    kind: str, value: float, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, content = spoiled(kind, value)
    if kind == "scaling" and not math.isfinite(value):
        pytest.skip("is no setting at all")
    node = {"partition-id": 0, "state-dir": str(tmp_path)}
    refused = wire.decode_reply(handle(TRAIN, content, to_flat(config), node, RUNTIMES))
    assert (refused.status, refused.reason) == (wire.DECLINED, owner.REFUSAL)
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert re.search(rf"{kind.removeprefix('lora_')} of .* was received, at most 10000 is taken", said)
    assert not list((tmp_path / "ledger").glob("*.jsonl"))


def test_the_largest_value_itself_is_trained_on(tmp_path: Path, cache: Path) -> None:
    config, content = spoiled("lora_A", owner.LARGEST_VALUE)
    node = {"partition-id": 0, "state-dir": str(tmp_path)}
    assert wire.decode_reply(handle(TRAIN, content, to_flat(config), node, RUNTIMES)).status == wire.OK


def test_a_base_that_patches_move_beyond_the_range_is_refused() -> None:
    from types import SimpleNamespace

    import torch

    from clients.execute import check_received

    base = SimpleNamespace(moved_weights={"q": torch.full((2, 2), 2e4)})
    runtime, resolved = (
        SimpleNamespace(model=SimpleNamespace(base=base)),
        SimpleNamespace(adapters={}, head={}),
    )
    with pytest.raises(UpdateRefused, match="weight of q: a value of size 20000"):
        check_received(runtime, resolved, owner.LARGEST_VALUE)  # type: ignore[arg-type]
    check_received(runtime, resolved, float("inf"))  # type: ignore[arg-type]
    head = SimpleNamespace(adapters={}, head={"classifier.bias": torch.tensor([2e4])})
    base.moved_weights.clear()
    with pytest.raises(UpdateRefused, match=r"classifier\.bias"):
        check_received(runtime, head, owner.LARGEST_VALUE)  # type: ignore[arg-type]
