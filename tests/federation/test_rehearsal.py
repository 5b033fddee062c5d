"""A step that all clients would refuse is refused once, with nothing written and nothing charged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.errors import ConfigError
from tests.conftest import tiny_config
from tests.in_process import federated
from tests.models.families import words

PRIVATE = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0, "train.batch-size": 2}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("modernbert", PRIVATE, "head.norm is a LayerNorm"),
        ("albert", {**PRIVATE, "privacy.grad-sample-mode": "ghost"}, "Parameter tying is not supported"),
        ("deberta-v3", {"engine.cohort-size": 2}, "mixes examples"),
    ],
)
def test_before_the_run_in_one_line(
    family: str, more: dict[str, object], reason: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"text": " ".join(words(n % 9 + 1, seed=n)), "label": "abc"[n % 3]} for n in range(30)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        **{
            "model.name": str(saved(family)), "model.pooling": "model", "data.partitioner": "iid",
            "data.name": str(tmp_path / "d.jsonl"), "data.num-partitions": 2, "data.max-length": 16,
            "lora.rank": 2, "lora.target-modules": "all-linear", **more,
        }
    )  # fmt: skip
    out = tmp_path / "run"
    with pytest.raises(ConfigError) as error:
        federated(config, out, stores=out / "clients")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in out.rglob("*") if path.is_file()]
