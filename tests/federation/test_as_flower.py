"""Side by side with Flower's own FedAvg on the same grid: the same calls, the same Result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from flwr.serverapp.strategy import Result, Strategy

from fedlora.errors import ConfigError
from strategies import FedAvg, FFALoRA
from tests.federation.fake_grid import FakeGrid
from tests.federation.small import initial_arrays

CLIENTS = 5
Metrics = Callable[[int], dict[str, Any]]


def plain_client(metrics: Metrics, asked: list[tuple[Any, ...]]) -> Callable[[Message, int], Message]:
    """A client as Flower's users write it: it moves what it was sent and answers under names of its own."""

    def client(message: Message, partition: int) -> Message:
        kind = message.metadata.message_type
        (arrays,) = message.content.array_records.values()
        (config,) = message.content.config_records.values()
        asked.append((kind, config["server-round"], config["lr"], sorted(message.content)))
        found = {"num-examples": partition + 1, "round": config["server-round"], **metrics(partition)}
        content = RecordDict({"numbers": MetricRecord(found)})
        if kind == "train":
            moved = {name: t + 0.1 * (partition + 1) for name, t in arrays.to_torch_state_dict().items()}
            content["weights"] = ArrayRecord(moved)
        return Message(content, reply_to=message)

    return client


def run(strategy: Strategy, metrics: Metrics = lambda p: {}) -> tuple[Result, list[Any], list[int]]:
    asked: list[Any] = []
    measured: list[int] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        measured.append(server_round)
        total = sum(float(array.numpy().sum()) for array in arrays.values())
        return None if server_round == 2 else MetricRecord({"sum": total})

    result = strategy.start(
        FakeGrid(range(CLIENTS), plain_client(metrics, asked)),
        initial_arrays(),
        num_rounds=3,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_config=ConfigRecord({"lr": 0.2}),
        evaluate_fn=evaluate,
    )
    return result, asked, measured


def numbers(records: dict[int, MetricRecord]) -> dict[int, dict[str, Any]]:
    return {t: {k: pytest.approx(v) for k, v in record.items()} for t, record in records.items()}


def third_metric(contents: list[RecordDict], key: str) -> MetricRecord:
    """A user's own: it is given what the clients sent, and the key."""
    weights = [float(record[key]) for content in contents for record in content.metric_records.values()]  # type: ignore[arg-type]
    return MetricRecord({"clients": len(weights), "examples": sum(weights)})


SETTINGS: dict[str, dict[str, Any]] = {
    "Flower's defaults": {},
    "shares": {"fraction_train": 0.4, "fraction_evaluate": 0.6},
    "minima": {
        "fraction_train": 0.1,
        "fraction_evaluate": 0.1,
        "min_train_nodes": 3,
        "min_evaluate_nodes": 4,
    },
    "nobody evaluates": {"fraction_evaluate": 0.0},
    "nobody trains": {"fraction_train": 0.0},
    "names of records": {"arrayrecord_key": "model", "configrecord_key": "settings"},
    "another weight": {"weighted_by_key": "steps"},
    "own functions": {"train_metrics_aggr_fn": third_metric, "evaluate_metrics_aggr_fn": third_metric},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_fedavg_does_what_flowers_does(name: str) -> None:
    """Whom it samples is its own affair; how many, what they are asked, and what comes of it is Flower's."""
    settings = SETTINGS[name]
    metrics: Metrics = lambda p: {"steps": 7.0 - p, "loss": 0.5 * p, "by-layer": [1.0 * p, 2.0]}  # noqa: E731
    ours, our_calls, our_rounds = run(FedAvg(scaling=2.0, **settings), metrics)
    theirs, their_calls, their_rounds = run(FlowersFedAvg(**settings), metrics)
    assert our_rounds == their_rounds == [0, 1, 2, 3]
    assert sorted(our_calls) == sorted(their_calls)
    for kind in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        mine, flowers = getattr(ours, kind), getattr(theirs, kind)
        assert {t: set(r) for t, r in mine.items()} == {t: set(r) for t, r in flowers.items()}
        if "fraction_train" not in settings:
            assert {t: dict(r) for t, r in mine.items()} == numbers(flowers)
    if "fraction_train" not in settings:
        assert ours.evaluate_metrics_serverapp.keys() == theirs.evaluate_metrics_serverapp.keys() == {0, 1, 3}
        assert list(ours.arrays) == list(theirs.arrays)
        for key, array in theirs.arrays.items():
            np.testing.assert_allclose(ours.arrays[key].numpy(), array.numpy(), rtol=1e-5)


def test_evaluate_fn_is_given_the_start_of_the_rule() -> None:
    """What clients start from: a drawn A where the rule draws it."""
    seen: dict[int, ArrayRecord] = {}
    strategy = FFALoRA(scaling=2.0, init_a="orthonormal")
    strategy.start(
        FakeGrid(range(2), plain_client(lambda p: {}, [])), initial_arrays(), num_rounds=0,
        evaluate_fn=lambda server_round, arrays: seen.update({server_round: arrays}),
    )  # fmt: skip
    A = torch.from_numpy(seen[0]["base_model.model.encoder.q.lora_A.weight"].numpy())
    torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-5, rtol=0)


class TestMetrics:
    """Where Flower stops or averages a NaN into everything: each metric over the clients that have it."""

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_metric_that_is_not_finite_refuses_no_update_and_does_not_count(self, bad: float) -> None:
        metrics: Metrics = lambda p: {"auc": bad if p == 0 else 0.1 * p, "train-loss": bad if p else 3.0}  # noqa: E731
        strategy = FedAvg(scaling=2.0)
        result, *_ = run(strategy, metrics)
        assert strategy.report.participants == list(range(CLIENTS))
        assert strategy.report.train_loss == 3.0
        weights = np.arange(2, CLIENTS + 1)
        expected = (weights * 0.1 * np.arange(1, CLIENTS)).sum() / weights.sum()
        for records in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
            assert records[1]["auc"] == pytest.approx(expected)
            assert records[1]["train-loss"] == pytest.approx(3.0)

    def test_nan_where_nobody_has_a_finite_value(self) -> None:
        result, *_ = run(FedAvg(scaling=2.0), lambda p: {"auc": math.nan, "each": [1.0, math.nan]})
        found = result.train_metrics_clientapp[3]
        assert math.isnan(found["auc"])  # type: ignore[arg-type]
        assert found["each"] == pytest.approx([1.0, math.nan], nan_ok=True)

    def test_metrics_of_some_clients_integers_and_lists_of_unequal_length(self) -> None:
        def metrics(partition: int) -> dict[str, Any]:
            some = {"rare": partition} if partition in (1, 3) else {}
            return {"count": 2 * partition, "odd": [0] * (1 + partition % 2), **some}

        result, *_ = run(FedAvg(scaling=2.0), metrics)
        found = result.train_metrics_clientapp[1]
        assert found["rare"] == pytest.approx((2 * 1 + 4 * 3) / 6)
        assert found["count"] == pytest.approx(sum((p + 1) * 2 * p for p in range(5)) / 15)
        assert "odd" not in found

    def test_without_a_key_all_weigh_alike(self) -> None:
        result, *_ = run(FedAvg(scaling=2.0, weighted_by_key=None), lambda p: {"loss": p})
        assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(2.0)

    @pytest.mark.parametrize("weight", [math.nan, -1.0, [1.0]], ids=str)
    def test_a_weight_must_be_a_number(self, weight: object) -> None:
        strategy = FedAvg(scaling=2.0)
        run(strategy, lambda p: {"num-examples": weight} if p == 1 else {})
        assert "'num-examples'" in strategy.report.refused[1]
        assert strategy.report.participants == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"fraction_train": 1.5}, "fraction_train = 1.5"),
        ({"fraction_evaluate": -0.1}, "fraction_evaluate = -0.1"),
        ({"min_evaluate_nodes": -1}, "min_evaluate_nodes = -1"),
        ({"arrayrecord_key": "same", "configrecord_key": "same"}, "arrayrecord_key = 'same'"),
        ({"weighted_by_key": None, "train_metrics_aggr_fn": third_metric}, "weighted_by_key = None"),
    ],
)
def test_impossible_settings_are_refused_at_once(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        FedAvg(**settings)


def test_a_setting_of_the_app_may_not_be_one_of_the_orders() -> None:
    grid = FakeGrid(range(2), plain_client(lambda p: {}, []))
    with pytest.raises(ConfigError, match="train_config 'rank'"):
        FedAvg(scaling=2.0).start(grid, initial_arrays(), train_config=ConfigRecord({"rank": 4}))
