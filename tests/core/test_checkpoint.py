"""What a crash between two files leaves must not reach a resumed run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlora.config import EngineConfig, RunConfig
from fedlora.core.base_patches import Patch
from fedlora.core.factors import LoraFactors, Product
from fedlora.core.state import ServerState, State
from fedlora.errors import ConfigError
from fedlora.server.directory import RunDirectory


def patch(seed: int) -> Patch:
    g = torch.Generator().manual_seed(seed)
    return Patch({"x": Product(torch.randn(4, 1, generator=g), torch.randn(1, 5, generator=g))})


def checkpoint(*patches: Patch) -> ServerState:
    factors = LoraFactors(torch.ones(2, 5), torch.zeros(4, 2), 1.0)
    state = State(round=len(patches), adapters={"x": factors}, head={}, base=patches)
    return ServerState(state)


def test_the_patch_of_a_round_that_is_run_again_replaces_the_one_that_a_crash_left(tmp_path: Path) -> None:
    """With noise from the operating system the second attempt gives another patch."""
    directory = RunDirectory(tmp_path / "run")
    directory.save_checkpoint(checkpoint(patch(1)))
    pointer = tmp_path / "run" / "checkpoint" / "latest.json"
    before = pointer.read_text()
    directory.save_checkpoint(checkpoint(patch(1), patch(2)))
    pointer.write_text(before)  # the crash came before latest.json
    directory.save_checkpoint(checkpoint(patch(1), patch(3)))
    loaded = RunDirectory(tmp_path / "run", resume=True).load_checkpoint()
    assert loaded is not None
    assert [p.digest() for p in loaded.state.base] == [patch(1).digest(), patch(3).digest()]


def test_settled_patches_are_not_written_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.save_checkpoint(checkpoint(patch(1)))
    (first,) = (tmp_path / "run" / "checkpoint").glob("patch-*")
    written = first.stat().st_mtime_ns
    directory.save_checkpoint(checkpoint(patch(1), patch(2)))
    assert first.stat().st_mtime_ns == written
    directory.save_checkpoint(checkpoint(patch(2)))
    assert not first.exists()


def test_memory_and_cores_come_back(tmp_path: Path) -> None:
    directory, given = RunDirectory(tmp_path / "run"), checkpoint()
    cored = LoraFactors(torch.ones(2, 5), torch.ones(4, 2), 0.5, torch.eye(2))
    state = replace(given.state, adapters={"x": cored}, memory={"x/momentum/B": torch.ones(4, 2)})
    directory.save_checkpoint(replace(given, state=state))
    loaded = directory.load_checkpoint()
    assert loaded is not None
    assert loaded.state.adapters["x"].R is not None
    assert list(loaded.state.memory) == ["x/momentum/B"]


def of_size(cohort_size: int, **engine: int) -> RunConfig:
    return replace(RunConfig(), engine=EngineConfig(cohort_size=cohort_size, **engine))


def test_a_resumed_run_keeps_its_cohorts_on_which_its_bits_depend(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").open(of_size(4))
    again = RunDirectory(tmp_path / "run", resume=True)
    again.open(of_size(4, num_actors=3))
    with pytest.raises(ConfigError, match=r"engine.cohort-size = 8: .* has 4; it cannot change"):
        again.open(of_size(8))


def test_engines_that_train_one_by_one_write_no_size(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").open(of_size(0))
    RunDirectory(tmp_path / "run", resume=True).open(of_size(1))
