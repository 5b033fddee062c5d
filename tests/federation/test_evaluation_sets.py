"""Several evaluation sets: measured in every round, chosen by, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.best import best_round, metric_of
from fedlora.server.tracking import numbers
from fedlora.server.validate import check
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.in_process import client_runtime


def rows(number: int, label: str = "") -> list[dict[str, Any]]:
    return [
        {"text": f"{('dull', 'superb')[n % 2]} film {n}", "label": label or "ab"[n % 2], "who": f"w{n % 3}"}
        for n in range(number)
    ]


def jsonl(path: Path, given: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, given)))
    return str(path)


@pytest.fixture
def keys(tmp_path: Path, cache: Path) -> dict[str, Any]:
    sets = {
        "same": jsonl(tmp_path / "same.jsonl", rows(8)),
        "all-b": jsonl(tmp_path / "b.jsonl", rows(5, "b")),
    }
    return {
        "data.name": jsonl(tmp_path / "a.jsonl", rows(30)), "data.test": sets["same"],
        "data.partition-by": "who", "data.max-length": 16, "data.evaluation-sets": json.dumps(sets),
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_evaluation_is_of_each_set(precision: str, keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {
        "evaluation-precision": precision,
        "data.evaluate-examples": 4,
        "metric-for-best-model": "all-b_loss",
        "load-best-model-at-end": True,
    }
    run(tmp_path, **keys)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for line in lines:
        assert line["evaluation_sets"]["same"]["loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert line["evaluation_sets"]["all-b"]["examples"] == 4
    assert {name: found["examples"] for name, found in result["evaluation_sets"].items()} == {
        "same": 8,
        "all-b": 5,
    }
    assert result["evaluation_sets"]["same"]["loss"] == pytest.approx(result["loss"], rel=1e-6)
    losses = {line["round"]: line["evaluation_sets"]["all-b"]["loss"] for line in lines}
    assert result["best_round"] == min(losses, key=losses.__getitem__)
    assert result["best_on"] == "all-b"
    assert numbers(lines[0])["all-b/loss"] == losses[1]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("head", ["train", "local"])
def test_evaluation_in_half_precision_moves_the_figures_a_little_and_no_bit_of_training(
    head: str, tmp_path: Path
) -> None:
    """Measured by the server, and by clients who keep their heads."""
    found, trained = {}, {}
    for precision in ("float32", "bfloat16"):
        path = tmp_path / precision
        done = run(path, **{"model.head": head, "evaluation-precision": precision})
        lines = [json.loads(line) for line in (path / "run" / "rounds.jsonl").read_text().splitlines()]
        result = json.loads((path / "run" / "result.json").read_text())
        found[precision] = [record["loss"] for record in (*lines, result)]
        trained[precision] = values(done), [line["train_loss"] for line in lines]
    assert all(0 < abs(a - b) < 0.01 for a, b in zip(*found.values(), strict=True))
    (one, losses), (other, same) = trained.values()
    assert losses == same
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_round_is_that_of_the_set_that_is_named(keys: dict[str, Any]) -> None:
    records = [
        {"round": n, "loss": -float(n), "evaluation_sets": {"same": {"accuracy": a}}}
        for n, a in ((1, 0.2), (2, 0.9), (3, 0.4))
    ]
    chosen = tiny_config(**keys, **{"metric-for-best-model": "same_accuracy", "load-best-model-at-end": True})
    check(chosen)
    assert best_round(chosen, records) == 2


def test_a_set_hides_no_metric_of_the_task() -> None:
    sets = {"task": "multi-label-classification", "data.evaluation-sets": '{"f1": "a.jsonl"}'}
    for given, meant in (("f1_micro", ("", "f1_micro")), ("f1_f1_micro", ("f1", "f1_micro"))):
        config = tiny_config(**sets, **{"metric-for-best-model": given})
        check(config)
        assert metric_of(config) == meant


def test_what_sets_cannot_be_is_one_line(keys: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has loss, accuracy, each of them also after same_ or all-b_$"):
        check(tiny_config(**keys, **{"metric-for-best-model": "other_loss"}))
    with pytest.raises(NotApplicable, match=r"stays at clients, must be empty$"):
        check(tiny_config(**keys, **{"model.head": "local"}))
    for odd in ('{"a b": "x"}', '{"a": 3}', '["a"]', "a.jsonl", '{"a": ""}'):
        with pytest.raises(ConfigError, match=r"^data\.evaluation-sets = "):
            tiny_config(**{"data.evaluation-sets": odd})
    with pytest.raises(ConfigError, match=r"^data\.evaluation-sets = .*none\.jsonl': no such file"):
        client_runtime(tiny_config(**keys | {"data.evaluation-sets": '{"a": "none.jsonl"}'}))
    odd = jsonl(tmp_path / "odd.jsonl", rows(3, "c"))
    with pytest.raises(ConfigError, match=r"holds 'c' in row 1"):
        client_runtime(tiny_config(**keys | {"data.evaluation-sets": json.dumps({"a": odd})}))
