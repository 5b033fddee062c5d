"""A base that moves in every round takes no more room with every round: its patches are added up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.config import from_flat
from fedlora.core import base_patches
from fedlora.core.base_patches import Patch, summed
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.in_process import InProcessEngine
from strategies.transport import Transport

pytestmark = pytest.mark.slow

KEYS: dict[str, Any] = {
    "model.name": "tiny", "data.name": "synthetic", "data.evaluate-examples": 8, "lora.rank": 24,
    "train.local-steps": 1, "train.batch-size": 2, "engine.name": "in-process", "strategy.name": "flora",
    "fraction-train": 0.5, "data.num-partitions": 6,
}  # fmt: skip
ROUNDS = 12
ENGINE = InProcessEngine()


def run(path: Path, rounds: int = ROUNDS, *, resume: bool = False, **keys: str) -> FederatedRun:
    config = from_flat(
        {**KEYS, "num-server-rounds": rounds, **{k.replace("_", "-"): v for k, v in keys.items()}}
    )
    made = FederatedRun(ENGINE.session(config, path), RunDirectory(path, resume=resume))
    made.run()
    return made


def chain(made: FederatedRun) -> list[str]:
    return [patch.digest() for patch in made.state.base]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FederatedRun]:
    path = tmp_path_factory.mktemp("folded") / "run"
    return path, run(path)


def test_patches_are_added_up_and_files_of_no_use_go(
    whole: tuple[Path, FederatedRun], tmp_path: Path
) -> None:
    path, made = whole
    assert made.state.base[0].sum_of
    assert len(made.state.base) < ROUNDS
    assert len(list((path / "checkpoint").glob("patch-*"))) == len(made.state.base)
    (first,) = chain(run(tmp_path / "run", 1))
    assert list(tmp_path.rglob(f"{first}.safetensors")) == []  # of round 1 no client has been told
    assert any(path.rglob(f"{made.state.base[0].digest()}.safetensors"))
    assert not any(path.rglob(f"{first}.safetensors"))


def test_the_model_is_that_of_all_patches(
    whole: tuple[Path, FederatedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_patches, "FOLD_AT", 10**6)
    plain = run(tmp_path / "run")
    assert len(plain.state.base) == ROUNDS
    for name in plain.state.adapters:
        expected, found = (made.state.product(name).dense() for made in (plain, whole[1]))
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max())), name


@pytest.mark.parametrize("stop", [3, 9])
def test_a_resumed_run_has_the_same_bits(stop: int, whole: tuple[Path, FederatedRun], tmp_path: Path) -> None:
    run(tmp_path / "run", stop)
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "result.json").unlink()
    again = run(tmp_path / "run", resume=True)
    assert chain(again) == chain(whole[1])
    assert again.state.base[0].sum_of == whole[1].state.base[0].sum_of
    for name, adapter in again.state.adapters.items():
        for side, tensor in adapter.tensors().items():
            assert torch.equal(tensor, whole[1].state.adapters[name].tensors()[side])


def test_the_best_model_keeps_the_patches_that_it_had(tmp_path: Path) -> None:
    kept: dict[int, list[str]] = {}
    config = from_flat({**KEYS, "num-server-rounds": ROUNDS, "load-best-model-at-end": True})
    made = FederatedRun(ENGINE.session(config, tmp_path / "run"), RunDirectory(tmp_path / "run"))
    restore = made.strategy.rule.aggregate

    def noted(*given: Any, **named: Any) -> Any:
        kept[made.state.round] = chain(made)
        return restore(*given, **named)

    object.__setattr__(made.strategy.rule, "aggregate", noted)
    made.run()
    kept[ROUNDS] = kept.get(ROUNDS, chain(made))
    assert chain(made) == kept[made.state.round]


def test_who_has_the_terms_adds_them_up_and_others_are_sent_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, FederatedRun]
) -> None:
    sent: list[tuple[bool, bool]] = []
    message = Transport.message

    def watched(self: Transport, request: Any, *rest: Any) -> Any:
        made = message(self, request, *rest)
        first = self._patches[self._base[0]] if self._base else None
        if first is not None and first.sum_of:
            sent.append((bool(request.needs.sum_of), f"{self._base[0]}/" in str(_names(made))))
        return made

    monkeypatch.setattr(Transport, "message", watched)
    run(tmp_path / "same")
    assert (True, False) in sent
    assert (True, True) not in sent
    sent.clear()
    made = run_with_other_arithmetic(tmp_path / "other", monkeypatch)
    assert (True, True) in sent  # asked to add up, came to something else, and was sent it
    assert chain(made) == chain(whole[1])


def run_with_other_arithmetic(path: Path, monkeypatch: pytest.MonkeyPatch) -> FederatedRun:
    def other(base: Any) -> Patch:
        found = summed(base)
        return Patch.from_tensors({name: t + 1e-6 for name, t in found.tensors().items()})

    monkeypatch.setattr("clients.store.summed", other)
    return run(path)


def _names(message: Any) -> list[str]:
    from fedlora import wire

    parts = message.content.array_records.get(wire.PARTS)
    return [] if parts is None else list(wire.from_record(parts))


def test_in_half_precision_the_sum_stays_exact(tmp_path: Path) -> None:
    made = run(tmp_path / "run", wire_dtype="float16")
    first = made.state.base[0]
    assert first.sum_of
    rounded = {n: t.half().float() for n, t in first.tensors().items()}
    assert any(not torch.equal(t, rounded[n]) for n, t in first.tensors().items())
