"""A disk that is full at any one write: one line, nothing half done, and the round or the run goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clients import owner
from clients.handler import TRAIN, handle
from clients.journal import read_journal
from fedlora import wire
from fedlora.config import from_flat, to_flat
from fedlora.errors import RunFailed, system_errors_in_words
from fedlora.privacy.ledger import read_ledgers
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.simulation.in_process import InProcessEngine
from tests.conftest import tiny_config
from tests.deployment.test_limits import PRIVATE, order
from tests.in_process import RUNTIMES

ENGINE = InProcessEngine()
RUN: dict[str, Any] = {
    "model.name": "tiny", "data.name": "synthetic", "data.evaluate-examples": 8, "lora.rank": 2,
    "train.local-steps": 1, "train.batch-size": 2, "engine.name": "in-process", "num-server-rounds": 3,
    "strategy.name": "flora", "data.num-partitions": 3,
}  # fmt: skip
FULL = "the node's system refuses: No space left on device"
PLAIN: dict[str, Any] = {"privacy.mode": "none"}


@contextmanager
def full_at(number: int, below: Path) -> Iterator[list[str]]:
    """Inside, the write with this number (from 0) to a file below a directory breaks off; yields all."""
    written: list[str] = []
    fsync = os.fsync

    def flush(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_file() and path.is_relative_to(below):
            written.append(str(path.relative_to(below)))
            if len(written) == number + 1:
                os.ftruncate(handle, max(0, path.stat().st_size - 10))
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", flush)
        yield written


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "REFUSAL_SECONDS", 0.01)


def answered(home: Path, keys: dict[str, Any]) -> wire.Reply:
    config = tiny_config(**{**PRIVATE, **keys}, **{"model.head": "local"})
    content = order(config, 1)
    content.config_records[wire.CONFIG]["base-digest"] = RUNTIMES.get(config).model.base_digest()
    node = {"partition-id": 0, "state-dir": str(home)}
    return wire.decode_reply(handle(TRAIN, content, to_flat(config), node, RUNTIMES))


@pytest.mark.parametrize("keys", [PLAIN, {}], ids=["plain", "private"])
def test_a_node_declines_in_one_line_and_takes_part_again(
    keys: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    with full_at(-1, tmp_path) as writes:
        assert answered(tmp_path / "whole", keys).status == wire.OK
    assert len(writes) >= (3 if keys else 4)
    for number in range(len(writes)):
        home = tmp_path / str(number)
        with full_at(number, home):
            reply = answered(home, keys)
        ledgers = read_ledgers(home / "ledger") if (home / "ledger").exists() else []
        reserved = sum(account.standing.epsilon > 0 for account in ledgers)
        if reply.status == wire.OK:  # what failed was a note that nothing depends on
            assert reserved == (0 if keys else 1), writes[number]
        else:
            assert reply.status == wire.DECLINED
            assert reply.reason in (owner.REFUSAL, FULL), writes[number]
            assert str(home) not in reply.reason
        again = answered(home, keys)
        assert again.status == wire.OK, (writes[number], again.own_reason)
        assert read_journal(home)[-1].status == wire.OK


def adapter(path: Path) -> bytes:
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


def carry_out(path: Path, *, resume: bool = False) -> None:
    with system_errors_in_words():
        config = from_flat(RUN)
        FederatedRun(ENGINE.session(config, path), RunDirectory(path, resume=resume)).run()


def test_a_server_stops_in_one_line_and_the_run_is_resumed(tmp_path: Path, cache: Path) -> None:
    whole = tmp_path / "whole"
    with full_at(-1, whole) as writes:
        carry_out(whole)
    ours = [n for n, name in enumerate(writes) if not name.startswith("clients/")]
    assert len(ours) > 12
    for number in ours[::3]:
        path = tmp_path / str(number)
        with full_at(number, path), pytest.raises(RunFailed) as stopped:
            carry_out(path)
        told = str(stopped.value)
        assert "No space left on device; what was written before is kept" in told, told
        assert "\n" not in told
        carry_out(path, resume=True)
        assert adapter(path) == adapter(whole), writes[number]
