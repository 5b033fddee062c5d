"""A node's journal says what left the machine, and in full why something was declined."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from typer.testing import CliRunner

from clients import owner
from clients.handler import TRAIN, handle
from clients.journal import FILE, read_journal
from fedlora import wire
from fedlora.cli import cli
from fedlora.config import RunConfig, to_flat
from fedlora.errors import ConfigError
from fedlora.secure.step import SECURE, STEP
from tests.conftest import tiny_config
from tests.deployment.test_limits import PRIVATE, order
from tests.in_process import RUNTIMES


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def sent(config: RunConfig, home: Path, server_round: int = 1, **node: Any) -> Any:
    settings = {"partition-id": 0, "state-dir": str(home), **node}
    return handle(TRAIN, order(config, server_round), to_flat(config), settings, RUNTIMES)


def test_a_reply_is_written_down_with_all_that_is_in_it(tmp_path: Path, cache: Path) -> None:
    content = sent(tiny_config(), tmp_path)
    (entry,) = read_journal(tmp_path)
    assert (entry.asked, entry.status, entry.round, entry.reason) == (TRAIN, "ok", 1, "")
    assert entry.bytes == wire.payload_bytes(content) > 0
    assert entry.metrics == wire.decode_reply(content).metrics
    assert entry.metrics["train-loss"] > 0
    sent(tiny_config(), tmp_path, 2)
    assert [entry.round for entry in read_journal(tmp_path)] == [1, 2]


def test_of_a_protected_node_it_has_what_was_spent_and_no_metrics(tmp_path: Path, cache: Path) -> None:
    content = sent(tiny_config(**PRIVATE), tmp_path)
    (entry,) = read_journal(tmp_path)
    spent = wire.decode_reply(content).privacy
    assert spent is not None
    assert entry.epsilon == spent["epsilon"] > 0
    assert entry.metrics == {}


LITTLE: dict[str, Any] = {**PRIVATE, "privacy.target-epsilon": 1e-3, "privacy.noise-multiplier": 1.0}
DECLINED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no guarantee": ({}, {"max-epsilon": 8.0}, "the owner of this node allows epsilon 8"),
    "a budget": (LITTLE, {}, "steps would spend"),
    "unprotected": ({}, {"partition-id": 99}, "99"),
}


@pytest.mark.parametrize("why", DECLINED)
def test_what_the_server_is_not_told_stands_in_the_journal(why: str, tmp_path: Path, cache: Path) -> None:
    keys, node, words = DECLINED[why]
    reply = wire.decode_reply(sent(tiny_config(**keys), tmp_path, **node))
    (entry,) = read_journal(tmp_path)
    assert (entry.status, entry.bytes) == (wire.DECLINED, 0)
    assert words in entry.reason
    assert why == "unprotected" or reply.reason == owner.REFUSAL


def test_nothing_leaves_that_cannot_be_written_down(tmp_path: Path, cache: Path) -> None:
    (tmp_path / FILE).mkdir()
    content = sent(tiny_config(), tmp_path)
    assert wire.decode_reply(content).status == wire.DECLINED
    assert wire.payload_bytes(content) == 0


def test_a_simulation_keeps_no_journal(tmp_path: Path, cache: Path) -> None:
    sent(tiny_config(), tmp_path, simulation=True)
    assert read_journal(tmp_path) == []


def test_a_damaged_line_is_named_and_a_cut_one_left_out(tmp_path: Path, cache: Path) -> None:
    sent(tiny_config(), tmp_path)
    whole = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(whole + whole[:20])
    assert len(read_journal(tmp_path)) == 1
    sent(tiny_config(), tmp_path)
    assert len(read_journal(tmp_path)) == 2, "what was cut short is not in the way of what comes after"
    (tmp_path / FILE).write_text(whole[:20] + "\n" + whole)
    with pytest.raises(ConfigError, match=r"sent\.jsonl: line 1 is none of a node's journal"):
        read_journal(tmp_path)


def test_each_step_of_secure_sums_has_a_line(tmp_path: Path, cache: Path) -> None:
    """With its bytes, or why it was refused; a session that is none of a run's is no matter."""
    config, state = tiny_config(**{"secure.mode": "sums"}), RecordDict()
    node = {"partition-id": 0, "state-dir": str(tmp_path)}

    def step(**asked: Any) -> ConfigRecord:
        content = RecordDict({SECURE: ConfigRecord(asked)})
        return handle(STEP, content, to_flat(config), node, RUNTIMES, state)[SECURE]

    told = step(phase="advertise", session="round 2 of run abc, 0123")
    step(phase="unmask", session="round 2 of run abc, 0123", survivors=[0, 1, 2])
    step(phase="x" * 99, session="\n" * 99)
    first, second, third = read_journal(tmp_path)
    assert (first.asked, first.run, first.round, first.status) == ("secure advertise", "abc", 2, "ok")
    assert first.bytes == len(told["keys"]) == 64
    assert (second.asked, second.status, second.bytes) == ("secure unmask", "declined", 0)
    assert second.reason.startswith("out of turn")
    assert (third.run, third.round, third.status) == ("-", 0, "declined")
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    unsaid = step(phase="advertise", session="round 3 of run abc, 0123")
    assert dict(unsaid) == {"reason": owner.REFUSAL}


def test_the_owner_reads_it(tmp_path: Path, cache: Path) -> None:
    node = tmp_path / "nodes" / "node-0"
    node.mkdir(parents=True)
    (node / "node.toml").write_text("partition-id = 0\n")
    sent(tiny_config(), node / "state")
    sent(tiny_config(), node / "state", **{"max-epsilon": 8.0})
    for directory in (tmp_path, node):
        printed = " ".join(CliRunner().invoke(cli, ["node", "log", str(directory)]).stdout.split())
        assert "…" not in printed
        assert "train-loss" in printed
        assert "allows epsilon 8 at delta 1e-05" in printed
    rows = json.loads(CliRunner().invoke(cli, ["node", "log", str(node), "--json", "--declined"]).stdout)
    assert [row["status"] for row in rows] == ["declined"]
    shutil.rmtree(tmp_path / "nodes")
    refused = CliRunner().invoke(cli, ["node", "log", str(tmp_path)])
    assert (refused.exit_code, "there is no node.toml in it" in refused.stderr) == (2, True)
