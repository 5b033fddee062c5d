"""``kill -9`` of a deployed run's SuperLink and ServerApp, then ``--resume``: the same adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlora.errors import RunFailed
from tests.faults.deployed import NODES, Up, adapter, federation, run, trusting, wait_for_nodes

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(1500)]

ROUNDS = 4
KEYS: dict[str, Any] = {
    "num_server_rounds": ROUNDS,
    "strategy.name": "flora",
    "fraction_train": 0.67,
    "min_available_nodes": NODES,
}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with federation(tmp_path_factory.mktemp("resume"), prepare=trusting) as found:
        yield found


def kill_superlink(up: Up) -> None:
    up.kill("superlink")


def kill_server_app(up: Up) -> None:
    family = psutil.Process(up.loopback.processes["superlink"].pid).children(recursive=True)
    (app,) = [p for p in family if any("flwr-serverapp" in word for word in p.cmdline())]
    app.kill()


@pytest.fixture(scope="module")
def undisturbed(up: Up, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(up, out, **KEYS)
    return out


@pytest.mark.parametrize("kill", [kill_server_app, kill_superlink])
def test_a_killed_server_goes_on_where_it_was(
    kill: Callable[[Up], None], up: Up, undisturbed: Path, tmp_path: Path
) -> None:
    def after_round(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            kill(up)

    out = tmp_path / "run"
    with pytest.raises(RunFailed, match="go on with --resume"):
        run(up, out, after_round, **KEYS)
    assert not (out / "adapter").exists()
    wait_for_nodes(up)
    told: list[dict[str, Any]] = []
    records = run(up, out, told.append, resume=True, **KEYS)
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    # killed between a round's line and its checkpoint, that round is carried out again, with the same bits
    assert [record["round"] for record in told] in ([2, 3, 4], [3, 4], [4])
    assert adapter(out) == adapter(undisturbed)
