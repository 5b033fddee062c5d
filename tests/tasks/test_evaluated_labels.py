"""An adapter on somebody's labels: the whole file is read by name, or by number, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import ModelConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import State
from fedlora.errors import ConfigError
from fedlora.evaluation.adapter import evaluate_adapter
from fedlora.models import AdapterCard
from fedlora.models.export import save_adapter
from tests.models.samples import adapted


@pytest.fixture(scope="module")
def adapter(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Untrained adapters whose labels have these names."""

    def made(*names: str) -> Path:
        card = AdapterCard(model=ModelConfig(name="tiny"), label_names=names, max_length=32, seed=0)
        model = adapted("tiny", num_labels=len(names))
        path = tmp_path_factory.mktemp("adapter") / "adapter"
        state = State(
            round=1, adapters=fresh_adapters(model.modules, 2, 1.0, 0), head=model.initial_head, base=()
        )
        save_adapter(path, state, {}, card)
        return path

    return made


def hits(adapter: Path, path: Path, labels: list[Any]) -> int:
    """How many of the texts an adapter gives the labels that a file says."""
    rows = [{"text": f"film number {i}", "label": label} for i, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate_adapter(adapter, str(path), text_column="text", label_column="label")
    assert found["examples"] == len(labels)
    return round(found["accuracy"] * found["examples"])


def test_names_and_their_numbers_mean_the_same(adapter: Callable[..., Path], tmp_path: Path) -> None:
    saved, path = adapter("bad", "good"), tmp_path / "a.jsonl"
    named = [hits(saved, path, [name] * 5) for name in ("bad", "good")]
    numbered = [hits(saved, path, [number] * 5) for number in (0, 1)]
    assert named == numbered
    assert sum(named) == 5, "every text has one of the two labels; each alone can be evaluated"
    assert hits(saved, path, ["bad", "good"] * 3) == hits(saved, path, ["0", "1"] * 3)


@pytest.mark.parametrize(
    ("names", "labels", "odd"),
    [
        (("1", "2", "3"), [1, 2, 0], "'0' in row 3"),
        (("1", "2", "3"), [0, 0, 0], "'0' in row 1"),
        (("1", "2", "3"), [1, 2, 4], "'4' in row 3"),
        (("1", "other"), [1, 0], "'0' in row 2"),
        (("bad", "good"), ["bad", "1"], "'1' in row 2"),
        (("bad", "good"), [0, 1, 2], "'0' in row 1"),
        (("bad", "good"), ["00", "01"], "'00' in row 1"),
        (("bad", "good"), [-1, 1], "'-1' in row 1"),
        (("bad", "good"), ["Bad", "Good"], "'Bad' in row 1"),
    ],
)
def test_what_could_mean_something_else_is_refused(
    names: tuple[str, ...], labels: list[Any], odd: str, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"holds {odd}, the adapter has {len(names)} labels: '{names[0]}'"):
        hits(adapter(*names), tmp_path / "a.jsonl", labels)


def test_labels_that_are_numbers_are_read_by_name(adapter: Callable[..., Path], tmp_path: Path) -> None:
    saved, path = adapter("1", "2", "3"), tmp_path / "a.jsonl"
    assert sum(hits(saved, path, [label] * 4) for label in (1, 2, 3)) == 4


def test_a_run_still_needs_two_labels(cache: Path, tmp_path: Path) -> None:
    from fedlora.prepared.cache import prepare
    from tests.conftest import tiny_config

    rows = [{"text": f"film number {i}", "label": "a"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data.name": str(tmp_path / "a.jsonl"), "data.partitioner": "iid", "data.num-partitions": 1}
    for _ in range(2):  # also where the examples lie in the cache already
        with pytest.raises(ConfigError, match="has one label only, 'a'"):
            prepare(tiny_config(**keys))
