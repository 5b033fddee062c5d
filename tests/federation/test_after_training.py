"""What a run leaves: an adapter of a largest rank, what vLLM makes of it, and its intruder dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ConfigError
from fedlora.models.export import global_adapters
from fedlora.server.validate import check
from tests.conftest import tiny_config
from tests.federation.test_kinds import run

FLORA: dict[str, Any] = {"strategy.name": "flora", "num-server-rounds": 2, "train.learning-rate": 0.05}


def result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "run" / "result.json").read_text())
    return found


def test_the_adapter_is_cut_and_the_run_is_not(tmp_path: Path, cache: Path) -> None:
    whole, short = (run(tmp_path / str(r), **FLORA, **{"max-rank": r}) for r in (0, 3))
    for name in whole.state.adapters:
        assert torch.equal(whole.state.product(name).dense(), short.state.product(name).dense())
    first, second = result(tmp_path / "0"), result(tmp_path / "3")
    assert first["adapter"]["rank"] > 8
    assert first["adapter"]["energy_lost"] == 0.0
    assert second["adapter"]["rank"] == 3
    energy = gone = 0.0
    for factors in global_adapters(whole.state).values():
        S = torch.linalg.svdvals(factors.delta().double())
        energy, gone = energy + float(S.square().sum()), gone + float(S[3:].square().sum())
    assert second["adapter"]["energy_lost"] == pytest.approx(gone / energy, rel=1e-3)
    assert "modules_to_save" in second["adapter"]["vllm"]
    config = json.loads((tmp_path / "3" / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3


def test_intruders_are_counted_against_the_pristine_base(tmp_path: Path, cache: Path) -> None:
    done = run(tmp_path, **FLORA)
    found, count = result(tmp_path), 0
    for name in done.state.adapters:
        W = done.runtime.model.base.pristine(name).double()
        X = torch.linalg.svd(W, full_matrices=False).U
        U = torch.linalg.svd(W + done.state.product(name).dense().double(), full_matrices=False).U[:, :10]
        count += int(((X.T @ U).abs().amax(0) < 0.5).sum())
    assert (found["intruders"], found["intruder_layers"]) == (count, len(done.state.adapters))
    assert found["intruder_candidates"] >= found["intruders"]


def test_another_largest_rank_may_be_asked_for_later(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **FLORA)
    (tmp_path / "run" / "result.json").unlink()
    run(tmp_path, resume=True, **FLORA, **{"max-rank": 2})
    assert result(tmp_path)["adapter"]["rank"] == 2


def test_other_kinds_have_no_rank_to_cut() -> None:
    with pytest.raises(ConfigError, match="max-rank = 4: a rank to cut is of lora alone"):
        check(tiny_config(**{"lora.method": "vera", "max-rank": 4}))
