"""What a client in deployment sends and logs: nothing that undoes the noise, no count, no training loss."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

from clients.execute import train_instruction
from clients.node import Node
from clients.training import dp_sgd, opacus_parts
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import Broadcast
from tests.conftest import tiny_config
from tests.in_process import client_runtime

PRIVATE: dict[str, Any] = {
    "privacy.mode": "example",
    "privacy.target-epsilon": 3.0,
    "privacy.accountant": "rdp",
}
COUNTS = ("num-examples", "sample_rate", "noise_multiplier")
"""Each of them tells how many examples the client holds."""


def order(config: RunConfig) -> wire.TrainInstruction:
    """The first order of a run, as it arrives."""
    adapters = fresh_adapters(client_runtime(config).model.modules, 4, 2.0, 0)
    both = frozenset("AB")
    broadcast = Broadcast(
        adapters=adapters, trained=both, uploaded=both, modules=frozenset(adapters), head={}
    )
    settings = {
        "server-round": 1,
        "run-key": "run",
        **wire.instruction_config(broadcast, wire.Needs(), "kaiming"),
    }
    return wire.decode_instruction(
        RecordDict(
            {
                wire.ARRAYS: wire.to_record(wire.moving_tensors(broadcast)),
                wire.CONFIG: ConfigRecord({k: v for k, v in settings.items() if v != []}),
            }
        )
    )


def train(config: RunConfig, state_dir: Path, *, simulation: bool = False) -> wire.Reply:
    node = Node(partition_id=0, state_dir=state_dir, simulation=simulation)
    reply = train_instruction(client_runtime(config), order(config), config, node)
    assert reply.status == wire.OK, reply.reason
    return wire.decode_reply(wire.encode_reply(reply))


class Recorder:
    """The randomness of private training as it goes by."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.draws: list[list[int]] = []
        self.noise: list[list[float]] = []
        self.seeds: list[int] = []
        batches, normal, bits = dp_sgd.poisson_batches, opacus_parts.system_normal, dp_sgd.secrets.randbits

        def drawn(*arguments: Any) -> Any:
            self.noise.clear()  # what the self-test drew
            for batch in batches(*arguments):
                self.draws.append(batch.tolist())
                yield batch

        def noisy(shape: torch.Size) -> torch.Tensor:
            noise = normal(shape)
            self.noise.append(noise.flatten().tolist())
            return noise

        def seeded(number: int) -> int:
            self.seeds.append(bits(number))
            return self.seeds[-1]

        patch.setattr(dp_sgd, "poisson_batches", drawn)
        patch.setattr(opacus_parts, "system_normal", noisy)
        patch.setattr(dp_sgd.secrets, "randbits", seeded)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_two_deployed_runs_with_one_seed_differ_in_draw_and_noise(
    mode: str, tmp_path: Path, cache: Path
) -> None:
    config = tiny_config(**PRIVATE, **{"privacy.grad-sample-mode": mode})
    seen = []
    for number in range(2):
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(patch)
            torch.manual_seed(0)
            reply = train(config, tmp_path / str(number))
        seen.append((reply, recorder))
    (one, first), (other, second) = seen
    assert len(first.draws) == len(second.draws) == 3
    assert first.draws != second.draws
    assert first.noise
    numbers = [{n for noise in recorder.noise for n in noise} for recorder in (first, second)]
    assert not set.intersection(*numbers)
    assert not any(torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_in_simulation_one_seed_gives_one_reply(tmp_path: Path, cache: Path) -> None:
    """So that the test above fails where deployment is taken for simulation."""
    config = tiny_config(**PRIVATE)
    one, other = (train(config, tmp_path / str(number), simulation=True) for number in range(2))
    assert all(torch.equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_neither_reply_nor_log_tells_what_is_private(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    config = tiny_config(**PRIVATE)
    recorder = Recorder(monkeypatch)
    reply = train(config, tmp_path)
    assert reply.metrics == {}
    assert reply.privacy is not None
    assert not set(COUNTS) & set(reply.privacy)
    output = capfd.readouterr()
    told = "\n".join([json.dumps(reply.privacy), reply.reason, caplog.text, output.out, output.err])
    assert recorder.seeds
    secret = [*map(str, recorder.seeds), *map(str, recorder.draws), *(str(n[0]) for n in recorder.noise)]
    assert not [value for value in secret if value in told]


def test_the_configuration_can_release_counts_and_loss(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE, **{"privacy.release-metrics": True})
    reply = train(config, tmp_path)
    assert set(reply.metrics) == {"num-examples", "train-loss"}
    assert reply.privacy is not None
    assert {"sample_rate", "noise_multiplier"} <= set(reply.privacy)
