"""Whole runs of rounds that do not wait: going on after a kill, what is refused, what privacy costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fedlora.config import from_flat
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import check
from fedlora.simulation.in_process import InProcessEngine
from tests.in_process import federated

KEYS = {
    "model.name": "tiny", "data.name": "synthetic", "data.evaluate-examples": 60, "data.partitioner": "iid",
    "data.num-partitions": 6, "train.local-steps": 2, "num-server-rounds": 4, "engine.name": "in-process",
    "devices.profiles": "heavy-tailed",
}  # fmt: skip
WAITS = {"devices.deadline": 0.6}
DOES_NOT = {"devices.buffer-size": 2, "devices.in-flight": 4}


class Killed(Exception):
    pass


def run(keys: Mapping[str, Any], path: Path, *, dies_after: int = 0, resume: bool = False) -> None:
    def progress(record: dict[str, Any]) -> None:
        if record["round"] == dies_after:
            raise Killed

    engine = InProcessEngine()
    session = engine.session(from_flat(dict(keys)), path)
    FederatedRun(session, RunDirectory(path, resume=resume), [Tell(progress)]).run()


@pytest.mark.parametrize("how", [WAITS, DOES_NOT], ids=["waits", "does not"])
@pytest.mark.parametrize("name", ["fedavg", "flora"])
def test_a_run_that_was_killed_goes_on_with_the_same_bits_and_times(
    name: str, how: dict[str, Any], tmp_path: Path
) -> None:
    keys = KEYS | how | {"strategy.name": name}
    run(keys, tmp_path / "whole")
    with pytest.raises(Killed):
        run(keys, tmp_path / "twice", dies_after=2)
    run(keys, tmp_path / "twice", resume=True)
    found = []
    for folder in (tmp_path / "whole", tmp_path / "twice"):
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("seconds")
        adapter = load_file(folder / "adapter/adapter_model.safetensors")
        found.append((lines, {name: tensor.numpy().tobytes() for name, tensor in adapter.items()}))
    assert found[0] == found[1]
    assert len({line["virtual_seconds"] for line in found[0][0]}) == 4


def test_rounds_that_do_not_wait_end_where_they_were_to_end(tmp_path: Path) -> None:
    run(KEYS | DOES_NOT | {"num-server-rounds": 2}, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"num-server-rounds = 3: the run in .* has 2; it cannot change"):
        run(KEYS | DOES_NOT | {"num-server-rounds": 3}, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("keys", "error", "why"),
    [
        (
            {"strategy.name": "fedsvd"},
            NotApplicable,
            "fedsvd cannot take late updates, the basis A",
        ),
        ({"strategy.name": "fedsa"}, NotApplicable, "what clients keep to themselves needs"),
        ({"model.head": "local"}, NotApplicable, "what clients keep to themselves needs"),
        (
            {"strategy.allocation": "random-layers"},
            NotApplicable,
            "strategy.allocation needs rounds",
        ),
        ({"devices.in-flight": 1}, ConfigError, "must be at most devices.in-flight = 1"),
        ({"min-train-nodes": 3}, ConfigError, "min-train-nodes = 3: devices.buffer-size is 2"),
    ],
)
def test_what_needs_rounds_that_wait_is_refused(keys: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        check(from_flat(KEYS | DOES_NOT | keys))


def test_where_time_is_real_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="time is simulated by `fedlora run`"):
        federated(from_flat(KEYS), tmp_path / "run")
    assert not (tmp_path / "run/config.toml").exists()


def test_more_at_work_than_there_are_clients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"devices\.in-flight = 7: only 6 clients take part"):
        run(KEYS | DOES_NOT | {"devices.in-flight": 7}, tmp_path / "run")
    assert not (tmp_path / "run/rounds.jsonl").exists()


def test_a_private_run_spends_for_each_start(tmp_path: Path) -> None:
    keys = KEYS | DOES_NOT | {
        "strategy.name": "fedavg", "privacy.mode": "example", "privacy.noise-multiplier": 1.0,
        "engine.cohort-size": 1,
    }  # fmt: skip
    run(keys, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    spent = set[str]()
    for record in records:  # in the last round only those train that are still to be aggregated
        assert all(epsilon > 0 for epsilon in record["epsilon_by_client"].values())
        spent |= record["epsilon_by_client"].keys()
        assert {str(p) for p in record["participants"]} <= spent
    assert (
        len(records[0]["epsilon_by_client"])
        >= DOES_NOT["devices.in-flight"]
        > len(records[0]["participants"])
    )


def test_a_private_client_whose_reply_is_lost_has_spent(tmp_path: Path) -> None:
    """Its ledger says so before it trains; what arrives in time or not is up to the network."""
    kinds = {"slow": {"tokens-per-second": 1}, "fast": {"tokens-per-second": 1000}}
    groups = [{"partitions": "0", "device": "slow"}, {"partitions": "1-5", "device": "fast"}]
    keys = KEYS | DOES_NOT | {
        "strategy.name": "fedavg", "privacy.mode": "example", "privacy.noise-multiplier": 1.0,
        "engine.cohort-size": 1, "devices.profiles": json.dumps(kinds), "client-groups": json.dumps(groups),
        "devices.deadline": 3.0, "devices.in-flight": 6,
    }  # fmt: skip
    run(keys, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert not any(0 in record["participants"] for record in records)
    (ledger,) = (tmp_path / "run/clients/ledger").glob("*partition-0-*.jsonl")
    assert [json.loads(line)["kind"] for line in ledger.read_text().splitlines()].count("reserve") == 1
