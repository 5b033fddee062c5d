"""What was published under noise that nobody can draw again is counted, whatever a run goes on from."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ConfigError, RunFailed
from fedlora.privacy.calibration import epsilon_spent
from fedlora.server import callbacks
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.results import PUBLISHED
from fedlora.simulation.in_process import InProcessEngine
from strategies.flower import FactorStrategy
from tests.clients.cohort.test_runs import CohortGrid
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.in_process import federated

KEYS: dict[str, Any] = {
    "strategy.name": "fedavg", "privacy.mode": "client", "privacy.noise-multiplier": 2.0,
    "num-server-rounds": 4, "save-total-limit": 4, "train.local-steps": 1,
}  # fmt: skip
HALF = {"data.num-partitions": 4, "data.partitioner": "iid", "fraction-train": 0.5}
"""Two of four clients in each round."""
BANDS = {**HALF, "privacy.noise-bands": 2}


class Stop(Exception):
    pass


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "run" / PUBLISHED).read_text().splitlines()]


def rounds(path: Path) -> list[dict[str, Any]]:
    return RunDirectory(path / "run", resume=True).rounds()


def set_back(path: Path, server_round: int) -> None:
    """As docs/training.md says."""
    folder = path / "run" / "checkpoint"
    shutil.copy(folder / f"round-{server_round:05d}.json", folder / "latest.json")


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def epsilon(steps: int) -> float:
    privacy = tiny_config(**KEYS).privacy
    return epsilon_spent(2.0, 1.0, steps, privacy.target_delta, privacy.accountant)


def asked(records: list[dict[str, Any]]) -> Counter[int]:
    return Counter(partition for record in records for partition in record["participants"])


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_both_passes_over_a_round_count(clipping: str, tmp_path: Path, cache: Path) -> None:
    keys = {**KEYS, "privacy.clipping": clipping}
    first = values(run(tmp_path, **keys))
    written = (tmp_path / "run" / PUBLISHED).read_bytes()
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert rounds(tmp_path)[-1]["epsilon"] == pytest.approx(epsilon(4))
    set_back(tmp_path, 1)
    again = run(tmp_path, resume=True, **keys)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in values(again).items())
    assert (tmp_path / "run" / PUBLISHED).read_bytes().startswith(written)
    assert [line["round"] for line in lines(tmp_path)[4:]] == [2, 3, 4]
    assert [r["epsilon"] for r in rounds(tmp_path)] == pytest.approx([epsilon(n) for n in (1, 5, 6, 7)])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["epsilon"] == pytest.approx(epsilon(7))
    assert result["claim"]["steps"] == 7


def test_each_client_is_charged_for_the_releases_that_it_is_in(tmp_path: Path, cache: Path) -> None:
    """Also those that are away in the second pass."""
    run(tmp_path, **KEYS, **HALF)
    first = rounds(tmp_path)
    set_back(tmp_path, 1)
    config = tiny_config(**KEYS, **HALF)
    again = federated(config, tmp_path / "run", resume=True)
    again.run(CohortGrid([0], config, tmp_path / "clients", together=False))
    expected = asked(first) + asked(rounds(tmp_path)[1:])
    assert expected != asked(rounds(tmp_path))
    assert again.strategy.snapshot().participations == expected
    assert {int(p) for p in rounds(tmp_path)[-1]["epsilon_by_client"]} == set(expected)


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("crash", ["Evaluate", "Record", "Track", "Checkpoint"])
def test_a_round_without_its_checkpoint_counts(
    crash: str, last: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(callbacks, crash)
    whole = kind.after_round

    def after_round(self: callbacks.Callback, of: FederatedRun, report: Any) -> None:
        if report.server_round == last:
            raise Stop
        whole(self, of, report)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "after_round", after_round)
        with pytest.raises(Stop):
            run(tmp_path, **KEYS)
    with pytest.raises(ConfigError, match="is not empty"):
        run(tmp_path, **KEYS)
    run(tmp_path, resume=True, **KEYS)
    expected = [epsilon(n if n < last else n + 1) for n in (1, 2, 3, 4)]
    assert [r["epsilon"] for r in rounds(tmp_path)] == pytest.approx(expected)
    run(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 5})
    assert rounds(tmp_path)[-1]["epsilon"] == pytest.approx(epsilon(6))


def test_it_is_on_disk_before_anybody_sees_the_round(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[int, int]]()
    configure = FactorStrategy.configure_evaluate

    def watching(self: FactorStrategy, server_round: int, *arguments: Any) -> Any:
        seen.append((server_round, len(lines(tmp_path))))
        return configure(self, server_round, *arguments)

    monkeypatch.setattr(FactorStrategy, "configure_evaluate", watching)
    run(tmp_path, **KEYS)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_what_cannot_be_counted_is_not_published(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(path: Path, server_round: int, participations: Mapping[int, int]) -> None:
        raise OSError("full")

    states = list[int]()
    aggregate = FactorStrategy.aggregate_train

    def watching(self: FactorStrategy, *arguments: Any) -> Any:
        try:
            return aggregate(self, *arguments)
        finally:
            assert self.state is not None
            states.append(self.state.round)

    monkeypatch.setattr("fedlora.server.federated_run.append_release", refusing)
    monkeypatch.setattr(FactorStrategy, "aggregate_train", watching)
    with pytest.raises(OSError, match="full"):
        run(tmp_path, **KEYS)
    assert states == [0]
    assert rounds(tmp_path) == []


def test_correlated_noise_is_published_once(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **KEYS, **BANDS)
    set_back(tmp_path, 2)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"privacy\.noise-bands = 2: a model after round 2 was published"):
        run(tmp_path, resume=True, **KEYS, **BANDS)
    assert contents(tmp_path) == before
    set_back(tmp_path, 4)
    run(tmp_path, resume=True, **{**KEYS, **BANDS, "num-server-rounds": 5})


@pytest.mark.parametrize(
    "limit",
    [
        {"privacy.noise-multiplier": 0.0},
        {"privacy.noise-multiplier": 0.0, "privacy.max-participations": 9},
        {"privacy.max-participations": 4},
    ],
)
def test_nobody_is_asked_beyond_what_the_noise_is_for(
    limit: dict[str, float], tmp_path: Path, cache: Path
) -> None:
    keys = {**KEYS, **limit}
    run(tmp_path, **keys)
    largest = rounds(tmp_path)[-1]["epsilon"]
    set_back(tmp_path, 2)
    with pytest.raises(RunFailed, match=r"^round 3: 0 clients may train, min-train-nodes"):
        run(tmp_path, resume=True, **keys)
    assert len(lines(tmp_path)) == 4
    assert limit.get("privacy.noise-multiplier", 2.0) or largest <= tiny_config(**keys).privacy.target_epsilon


def test_no_run_ends_before_it_has_charged_what_was_published(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **KEYS)
    set_back(tmp_path, 2)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"^num-server-rounds = 2: a model after round 2 was published"):
        run(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 2})
    patience = {"early-stopping-patience": 1, "early-stopping-threshold": 1e6}
    with pytest.raises(ConfigError, match=r"^num-server-rounds = 4: a model after round 2 was published"):
        run(tmp_path, resume=True, **KEYS, **patience)
    assert contents(tmp_path) == before
    run(tmp_path, resume=True, **KEYS, **{**patience, "early-stopping-patience": 3})
    assert rounds(tmp_path)[-1]["epsilon"] == pytest.approx(epsilon(6))


def test_a_half_line_is_of_no_release_and_a_damaged_one_is_refused(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **KEYS)
    file = tmp_path / "run" / PUBLISHED
    written = file.read_bytes()
    file.write_bytes(written + b'{"round": 5, "partic')
    run(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 5})
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert rounds(tmp_path)[-1]["epsilon"] == pytest.approx(epsilon(5))
    whole = file.read_bytes()
    for damaged in (b"", written, whole.replace(b"4", b"3"), whole + b'{"round": 6}\n' + whole[:3]):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"published\.jsonl: is damaged, "):
            run(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 6})
        assert file.read_bytes() == damaged
    file.unlink()
    with pytest.raises(ConfigError, match=r"published\.jsonl: is damaged, a line is missing"):
        run(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 6})


def simulated(path: Path, *, resume: bool = False, **keys: Any) -> dict[str, Any]:
    run, config = path / "run", tiny_config(**keys)
    return FederatedRun(InProcessEngine().session(config, run), RunDirectory(run, resume=resume)).run()


def test_rounds_of_a_simulation_count_as_before(tmp_path: Path, cache: Path) -> None:
    """They are in the checkpoint alone, before those that are published and after them."""
    simulated(tmp_path, **{**KEYS, "num-server-rounds": 1})
    run(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 2})
    simulated(tmp_path, resume=True, **{**KEYS, "num-server-rounds": 3})
    run(tmp_path, resume=True, **KEYS)
    assert [line["round"] for line in lines(tmp_path)] == [2, 4]
    assert [r["epsilon"] for r in rounds(tmp_path)] == pytest.approx([epsilon(n) for n in (1, 2, 3, 4)])


@pytest.mark.parametrize("mode", ["none", "client"])
def test_what_comes_again_with_the_same_bits_counts_once(mode: str, tmp_path: Path, cache: Path) -> None:
    keys = {**KEYS, "privacy.mode": mode}
    first = simulated(tmp_path, **keys)
    set_back(tmp_path, 1)
    assert simulated(tmp_path, resume=True, **keys)["epsilon"] == first["epsilon"]
    assert not (tmp_path / "run" / PUBLISHED).exists()
