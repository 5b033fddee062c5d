"""Planted words: no log and no record holds a text, and the server's hold no label, path or secret."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from clients.handler import TRAIN, handle
from fedlora.config import to_flat
from tests.conftest import tiny_config
from tests.federation.fake_grid import FakeGrid
from tests.in_process import RUNTIMES, federated

TEXT, LABEL, PLACE, SECRET = "zanzibarite", "quuxlabel", "quietfolder", "hf_swordfish"
NODES = 4


def nodes(home: Path) -> list[dict[str, Any]]:
    """Two that train, one whose data has a label of its own, one whose data is not there."""
    settings = []
    for number in range(NODES):
        folder = home / f"{PLACE}-{number}"
        folder.mkdir()
        rows = [{"text": f"{TEXT} film {i}", "label": ("neg", "pos")[i % 2]} for i in range(12)]
        rows += [{"text": TEXT, "label": LABEL}] if number == 2 else []
        file = folder / "own.jsonl"
        if number != 3:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        more = {"data": str(file), "dataset-id": f"data-{number}", "state-dir": str(folder / "state")}
        settings.append({"partition-id": number, **more})
    return settings


def carried_out(home: Path, settings: list[dict[str, Any]]) -> Path:
    test = home / "test.jsonl"
    test.write_text(
        "".join(json.dumps({"text": f"a {y} one", "label": y}) + "\n" for y in ("neg", "pos") * 4)
    )
    keys = {"data.name": str(test), "data.test": str(test), "data.partitioner": "iid"}
    config = tiny_config(**keys, **{"data.num-partitions": NODES, "train.batch-size": 4})

    def client(message: Message, partition: int) -> Message:
        told = {**to_flat(config)}
        return Message(handle(TRAIN, message.content, told, settings[partition], RUNTIMES), reply_to=message)

    federated(config, home / "run", nodes=range(NODES)).run(FakeGrid(range(NODES), client))
    return home / "run"


def test_logs_and_records_hold_nothing_that_was_planted(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    (tmp_path / "nodes").mkdir()
    settings = nodes(tmp_path / "nodes")
    with caplog.at_level(logging.DEBUG):
        run = carried_out(tmp_path, settings)
    (first, *_) = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert first["participants"] == [0, 1]
    assert set(first["refused"]) == {"2", "3"}
    at_server = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert len(at_server) > 8
    for file, content in at_server.items():
        for planted in (TEXT, LABEL, PLACE, SECRET):
            assert planted.encode() not in content, file
    journals = [(Path(node["state-dir"]) / "sent.jsonl").read_text() for node in settings]
    for planted in (TEXT, SECRET):
        assert planted not in "".join(journals)
        assert planted not in caplog.text
    assert LABEL in journals[2]
    assert LABEL in caplog.text, "the owner reads which"
