"""Whole runs of every strategy, the clients in one cohort: the same model comes out as one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, MessageType
from torch import Tensor

from clients.handler import handle, handle_together
from fedlora.config import RunConfig
from fedlora.config.files import to_flat
from strategies.registry import RULES
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid
from tests.in_process import RUNTIMES, client_runtime, federated
from tests.models.samples import logits, token_batch

UNEQUAL_RANKS = {name for name, rule in RULES.items() if rule.facts.mixed_ranks and rule.facts.uploaded}
"""Rules whose clients may have other ranks."""
MIXED = {"lora.ranks": "2,4,3,4"}
SEEN = {
    (facts.trained, facts.uploaded, facts.updates_base, facts.draws_ranks, name in {"rolora", "turns"}): name
    for name, facts in ((name, RULES[name].facts) for name in sorted(RULES, reverse=True))
}
"""A rule for each kind of work that clients can tell apart; what the server makes of it is its own."""
SGD = {"train.optimizer": "sgd", "train.learning-rate": 0.5}
PRIVATE = {
    "privacy.mode": "example", "privacy.target-epsilon": 20.0, "privacy.accountant": "rdp",
    "privacy.release-metrics": True,
}  # fmt: skip


class CohortGrid(FakeGrid):
    """All orders to train of a round go to one process at once."""

    def __init__(self, partitions: Iterable[int], config: RunConfig, path: Path, *, together: bool) -> None:
        super().__init__(partitions, lambda message, partition: None)
        self._config, self._path, self._together = to_flat(config), path, together

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        given = list(messages)
        for number, message in enumerate(given):
            message.metadata.__dict__["_message_id"] = str(number)
        nodes = [
            {
                "partition-id": self.nodes[m.metadata.dst_node_id],
                "state-dir": str(self._path),
                "simulation": True,
            }
            for m in given
        ]
        if self._together and given[0].metadata.message_type == MessageType.TRAIN:
            contents = handle_together(
                [m.content for m in given], [self._config] * len(given), nodes, RUNTIMES
            )
        else:
            contents = [
                handle(m.metadata.message_type.split(".")[0], m.content, self._config, node, RUNTIMES)
                for m, node in zip(given, nodes, strict=True)
            ]
        return [
            Message(Error(1, content), reply_to=m)
            if isinstance(content, str)
            else Message(content, reply_to=m)
            for m, content in zip(given, contents, strict=True)
        ]


def run(config: RunConfig, path: Path, *, together: bool) -> tuple[dict[str, Tensor], Tensor, list[Any]]:
    """How far each layer and the head have moved, the logits of the last model, and the records."""
    federation = federated(config, path / "run")
    federation.run(CohortGrid(federation.partitions, config, path / "clients", together=together))
    state = federation.state
    moved = {f"head.{name}": tensor for name, tensor in state.head.items()}
    for name, factors in state.adapters.items():
        moved[name] = factors.delta() + sum(patch.products[name].dense() for patch in state.base)
    runtime = client_runtime(config)
    runtime.model.base.reset()
    runtime.base = ()
    runtime.model.base.move(state.base)
    runtime.model.load(state.adapters, state.head)
    found = logits(runtime.model.module, token_batch())
    runtime.model.base.reset()
    return moved, found, federation.directory.rounds()


@pytest.mark.parametrize(
    ("name", "optimizer", "private"),
    [
        *((name, "sgd", False) for name in sorted(RULES)),
        *((name, "adamw", True) for name in SEEN.values()),
        ("fedavg", "sgd", True),
        ("fedavg", "adamw", False),
    ],
)
def test_a_run_in_cohorts_is_the_run(
    name: str, optimizer: str, private: bool, tmp_path: Path, cache: Path
) -> None:
    keys: dict[str, Any] = {"strategy.name": name, "num-server-rounds": 2}
    keys |= MIXED if name in UNEQUAL_RANKS else {}
    keys |= SGD if optimizer == "sgd" else {}
    keys |= PRIVATE if private else {}
    config = tiny_config(**keys)
    one, wanted, _ = run(config, tmp_path / "one", together=False)
    other, found, records = run(config, tmp_path / "other", together=True)
    assert all(record["refused"] == {} for record in records)
    for layer, tensor in one.items():
        if optimizer == "sgd":
            assert (other[layer] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-8, layer
    assert (found - wanted).abs().max() <= (1e-3 if optimizer == "adamw" else 1e-4)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_budget_of_directions_in_cohorts_is_that_one_by_one(
    private: bool, tmp_path: Path, cache: Path
) -> None:
    """After a round of all directions three of them train: up goes that share of the adapter."""
    keys: dict[str, Any] = {
        "strategy.name": "fedavg", "num-server-rounds": 2 if private else 3, "lora.rank": 4, **SGD,
        "strategy.allocation": "sized-ranks", "strategy.allocation-options": '{"ranks": 3}',
        "model.head": "freeze", "strategy.screening": "off",
    }  # fmt: skip
    config = tiny_config(**keys, **(PRIVATE if private else {}))
    one, wanted, _ = run(config, tmp_path / "one", together=False)
    other, found, records = run(config, tmp_path / "other", together=True)
    assert all(record["refused"] == {} for record in records)
    for layer, tensor in one.items():
        assert (other[layer] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-8, layer
    assert (found - wanted).abs().max() <= 1e-4
    directions = 4 * len(one)
    up = [record["bytes_up"] for record in records]
    assert up[1:] == [up[0] * 3 // directions] * len(up[1:])
    assert len(up) > 1


def test_groups_with_layers_steps_and_ranks_of_their_own(tmp_path: Path, cache: Path) -> None:
    groups = [
        {"partitions": "0", "target-modules": "query", "rank": 2, "local-steps": 5},
        {"partitions": "2", "target-modules": "value", "local-steps": 1},
    ]
    config = tiny_config(
        **{"strategy.name": "flexlora", "num-server-rounds": 2, "client-groups": json.dumps(groups), **SGD}
    )
    one, wanted, _ = run(config, tmp_path / "one", together=False)
    other, found, records = run(config, tmp_path / "other", together=True)
    assert all(record["refused"] == {} for record in records)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    for layer, tensor in one.items():
        assert (other[layer] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-8, layer
