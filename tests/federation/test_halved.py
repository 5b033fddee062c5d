"""A client that trained in a smaller cohort than was meant is remembered: the run's bits are not its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Message

from fedlora.server.directory import RunDirectory
from fedlora.server.records import result_record, round_record
from strategies import FedAvg
from strategies.report import RoundReport
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import initial_arrays, watched
from tests.in_process import client_runtime


def test_the_report_names_who_trained_in_a_halved_cohort(tmp_path: Path) -> None:
    toy = ToyClient(tmp_path)

    def client(message: Message, partition: int) -> Message | None:
        reply = toy(message, partition)
        if reply is not None and partition == 1:
            reply.content.config_records["config"]["cohort-halved"] = True
        return reply

    strategy = FedAvg(scaling=2.0)
    reports = watched(strategy)
    strategy.start(FakeGrid(range(3), client), initial_arrays(), num_rounds=1)
    assert reports[0].halved == [1]


@pytest.mark.usefixtures("cache")
def test_the_result_says_so_whichever_process_wrote_it(tmp_path: Path) -> None:
    """The mark is in the round's line, so that a run that was resumed after it has it too."""
    config, directory = tiny_config(), RunDirectory(tmp_path / "run")
    data = client_runtime(config).data
    measured = {"accuracy": 0.5, "loss": 0.7}
    for number, halved in ((1, [4]), (2, [])):
        report = RoundReport(server_round=number, halved=halved)
        directory.append_round(round_record(config, report, measured, 1.0))
    records = RunDirectory(tmp_path / "run", resume=True).rounds()
    result = result_record(config, data, records, measured)
    assert result["reproducible"] is False
    assert "in round 1 at partition 4" in result["irreproducible_because"]
    assert "reproducible" not in result_record(config, data, records[1:], measured)
    json.dumps(result)
