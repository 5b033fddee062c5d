"""Runs whose directions rest or are chosen: they go on with the same bits, and what they leave is PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedlora.core.adapters import as_lora
from fedlora.models import build_model
from fedlora.server.federated_run import FederatedRun
from tests.clients.cohort.test_runs import CohortGrid
from tests.conftest import tiny_config
from tests.in_process import client_runtime, federated
from tests.models.samples import logits, token_batch

RESTS: dict[str, Any] = {
    "strategy.allocation": "sized-ranks", "strategy.allocation-options": '{"ranks": 5, "period": 1}',
}  # fmt: skip
CHOSEN: dict[str, Any] = {"strategy.name": "lora-a2", "lora.ranks": "4,1,2,4"}


def run(path: Path, *, resume: bool = False, **keys: Any) -> FederatedRun:
    common = {"train.optimizer": "sgd", "train.learning-rate": 0.5, "lora.target-modules": "value"}
    config = tiny_config(**common, **keys)
    federation = federated(config, path / "run", resume=resume)
    federation.run(CohortGrid(federation.partitions, config, path / "clients", together=False))
    return federation


def assert_pefts(done: FederatedRun, path: Path) -> None:
    """PEFT computes with the adapter that was written what the run's model computes."""
    runtime, batch = client_runtime(done.config), token_batch()
    runtime.model.base.reset()
    runtime.base = ()
    runtime.model.load(done.state.adapters, done.state.head)
    ours = logits(runtime.model.module, batch)
    base = build_model(done.config.model, len(runtime.data.label_names), done.config.seed)
    assert (logits(base, batch) - ours).abs().max() > 1e-2
    found = PeftModel.from_pretrained(base, path / "run" / "adapter").eval()
    torch.testing.assert_close(logits(found, batch), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [RESTS, CHOSEN], ids=["sized-ranks", "lora-a2"])
def test_a_run_goes_on_with_the_same_bits_and_leaves_what_peft_computes(
    keys: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    """Stopped while directions rest, and after the turn of A that follows that of B."""
    whole = run(tmp_path / "whole", **keys)
    stopped = run(tmp_path / "cut", **keys, **{"num-server-rounds": 2})
    assert_pefts(stopped, tmp_path / "cut")
    if keys is RESTS:
        state, before = stopped.state, whole.state
        directions = stopped.strategy.rule.allocation.directions(state)
        assert any(directions.values())
        for name, own in directions.items():
            rests = [j for j in range(4) if j not in own]
            begun, ended = as_lora(state.adapters[name]), as_lora(before.adapters[name])
            assert torch.equal(begun.B[:, rests], ended.B[:, rests])
            assert begun.B[:, rests].any()
    (tmp_path / "cut" / "run" / "result.json").unlink(missing_ok=True)
    again = run(tmp_path / "cut", resume=True, **keys)
    assert again.state.round == whole.state.round == 3
    for name, adapter in whole.state.adapters.items():
        for factor, tensor in adapter.tensors().items():
            assert torch.equal(again.state.adapters[name].tensors()[factor], tensor), (name, factor)
    assert_pefts(again, tmp_path / "cut")
