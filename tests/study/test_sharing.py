"""Finished cells that are not run again: those of other studies, and of the same one under another name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.config import from_flat, to_flat
from fedlora.core.sealed import read_sealed, sealed
from fedlora.errors import ConfigError, RunFailed
from fedlora.study.execute import reuse
from fedlora.study.execute.cell import Engine
from fedlora.study.execute.outlook import outlook
from fedlora.study.execute.runner import run_study
from tests.study.simulation import Simulation, study

SAME = '{"mean": {"strategy.name": "fedavg"}}'


@pytest.fixture
def shared(simulation: Simulation) -> Simulation:
    """Runs whose inputs are known."""
    simulation.inputs = lambda config: f"weights {config.seed}"
    return simulation


def provenance(cell: Path) -> dict[str, Any]:
    return read_sealed(cell / "provenance.json")


def everything(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_a_cell_of_a_study_beside_is_taken_whatever_it_is_called(
    shared: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    run_study(study(strategies="fedavg,flora"), one)
    before = everything(one)
    capsys.readouterr()
    page = run_study(study(title="Other", strategies="ffa", seeds="0,1", variants=SAME), other).read_text()
    assert shared.ran == ["fedavg", "flora", "ffa-seed-0", "ffa-seed-1", "mean-seed-1"]
    assert "1 cell taken from" in (said := capsys.readouterr().err)
    assert "one: same configuration, same code" in said
    for name in ("config.toml", "rounds.jsonl", "result.json"):
        assert (other / "mean-seed-0" / name).read_bytes() == (one / "fedavg" / name).read_bytes()
    assert provenance(other / "mean-seed-0") == {
        **provenance(one / "fedavg"), "taken-from": "one/fedavg"
    }  # fmt: skip
    assert everything(one) == before
    assert "Taken over (same configuration, same code): 1 of one." in page
    assert "mean-seed-0" in page


def test_who_ran_a_cell_stays_known(shared: Simulation, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        run_study(study(strategies="fedavg"), tmp_path / name)
    assert shared.ran == ["fedavg"]
    assert provenance(tmp_path / "c" / "fedavg")["taken-from"] == "a/fedavg"


def test_a_study_elsewhere_is_named(shared: Simulation, tmp_path: Path) -> None:
    run_study(study(strategies="fedavg"), tmp_path / "far" / "one")
    run_study(study(strategies="fedavg"), tmp_path / "near" / "alone")
    assert shared.ran == ["fedavg", "fedavg"]
    (tmp_path / "study.toml").write_text(
        'num-server-rounds = 2\n[model]\nname = "tiny"\n[data]\nname = "synthetic"\n'
        '[study]\nstrategies = "fedavg,flora"\n'
    )
    arguments = ["compare", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out" / "two")]
    done = CliRunner().invoke(cli, [*arguments, "--share", str(tmp_path / "far" / "one")])
    assert done.exit_code == 0, done.stderr
    assert shared.ran == ["fedavg", "fedavg", "flora"]


def test_a_shared_directory_that_is_no_study_is_refused(shared: Simulation, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--share .*nothing: is no directory of a study"):
        run_study(study(strategies="fedavg"), tmp_path / "out", share=[tmp_path / "nothing"])
    assert shared.ran == []


def test_the_same_cell_under_two_names_runs_once(
    shared: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(study(strategies="fedavg,flora", variants=SAME), tmp_path / "out")
    assert shared.ran == ["fedavg", "flora"]
    assert "mean: taken from fedavg: same configuration, same code" in capsys.readouterr().err


def test_trials_are_shared_too(shared: Simulation, tmp_path: Path) -> None:
    keys = {"tune_learning_rates": "0.01,0.02", "tune_seeds": "7", "strategies": "fedavg"}

    config = from_flat({**to_flat(study(**keys)), "data.validation-fraction": 0.1})
    run_study(config, tmp_path / "one")
    ran = list(shared.ran)
    run_study(config, tmp_path / "two")
    assert shared.ran == ran


# --- what is not the same ----------------------------------------------------------------------------


def _other_code(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    monkeypatch.setattr(reuse, "code_digest", lambda: "tomorrow's")


def _other_weights(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    shared.inputs = lambda config: "others"


def _unknown_weights(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    file = one / "fedavg" / "provenance.json"
    record = provenance(one / "fedavg")
    record["identity"]["inputs"] = None
    file.write_text(json.dumps(record))
    shared.inputs = lambda config: None


def _no_identity(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    record = provenance(one / "fedavg")
    del record["identity"]
    (one / "fedavg" / "provenance.json").write_text(json.dumps(record))


def _half(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    (one / "fedavg" / "result.json").unlink()


def _condemned(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    (one / "fedavg" / "spoiled.txt").write_text("somebody wrote into the base")


def _irreproducible(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    file = one / "fedavg" / "result.json"
    file.write_text(json.dumps(sealed({**read_sealed(file), "reproducible": False})))


def _no_study(shared: Simulation, monkeypatch: pytest.MonkeyPatch, one: Path) -> None:
    (one / "study.json").unlink()


@pytest.mark.parametrize(
    "change",
    [
        _other_code, _other_weights, _unknown_weights, _no_identity, _half, _condemned, _irreproducible,
        _no_study,
    ],
)  # fmt: skip
def test_what_is_not_the_same_or_not_whole_is_run(
    change: Callable[..., None], shared: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study(strategies="fedavg"), tmp_path / "one")
    change(shared, monkeypatch, tmp_path / "one")
    run_study(study(strategies="fedavg"), tmp_path / "two")
    assert shared.ran == ["fedavg", "fedavg"]


@pytest.mark.parametrize("keys", [{"lora.rank": 4}, {"seed": 3}, {"privacy.ledger": "/ledger"}])
def test_every_key_that_has_an_effect_counts(
    keys: dict[str, Any], shared: Simulation, tmp_path: Path
) -> None:

    shared.inputs = lambda config: "the same"
    run_study(study(strategies="fedavg"), tmp_path / "one")
    run_study(from_flat({**to_flat(study(strategies="fedavg")), **keys}), tmp_path / "two")
    assert shared.ran == ["fedavg", "fedavg"]


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("study.json", '{"schema": 99}', "nothing is taken from one: "),
        ("fedavg/result.json", "{", "fedavg: nothing is taken from "),
        ("fedavg/provenance.json", "{", ""),
    ],
)
def test_a_broken_neighbour_costs_a_line_at_most(
    file: str, text: str, line: str, shared: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(study(strategies="fedavg"), tmp_path / "one")
    (tmp_path / "one" / file).write_text(text)
    capsys.readouterr()
    run_study(study(strategies="fedavg"), tmp_path / "two")
    assert shared.ran == ["fedavg", "fedavg"]
    assert line in capsys.readouterr().err


def test_a_cell_that_was_begun_goes_on_by_itself(shared: Simulation, tmp_path: Path) -> None:
    run_study(study(strategies="fedavg"), tmp_path / "one")
    shared.fails["flora"] = RunFailed("once")
    with pytest.raises(RunFailed):
        run_study(study(strategies="flora"), tmp_path / "two")
    shared.fails.clear()
    run_study(study(strategies="flora"), tmp_path / "three")
    before = everything(tmp_path / "two" / "flora")
    with pytest.raises(RunFailed):
        run_study(study(strategies="fedavg,flora"), tmp_path / "two", resume=True)
    assert shared.ran == ["fedavg", "flora", "flora"]
    assert everything(tmp_path / "two" / "flora") == before


# --- other code --------------------------------------------------------------------------------------


def test_cells_by_other_code_stay_and_the_report_says_so(
    shared: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_study(study(strategies="fedavg"), tmp_path / "out")
    assert "other code" not in capsys.readouterr().err
    record = provenance(tmp_path / "out" / "fedavg")
    record["identity"]["code"] = "yesterday's"
    (tmp_path / "out" / "fedavg" / "provenance.json").write_text(json.dumps(record))
    config = study(strategies="fedavg,flora", variants=SAME)
    page = run_study(config, tmp_path / "out", resume=True).read_text()
    assert shared.ran == ["fedavg", "flora", "mean"], "the variant is the strategy, but by today's code"
    assert "1 cell finished by other code than today" in capsys.readouterr().err
    assert "2 versions of the code (yesterday&#39;s: 1 and " in page


# --- other data --------------------------------------------------------------------------------------


def _begun(cell: Path) -> None:
    (cell / "result.json").unlink()
    (cell / "checkpoint").mkdir()


def _finished(cell: Path) -> None:
    pass


@pytest.mark.parametrize("state", [_begun, _finished])
def test_new_cells_do_not_stand_beside_those_on_other_data(
    state: Callable[[Path], None], shared: Simulation, tmp_path: Path
) -> None:
    run_study(study(strategies="fedavg"), tmp_path / "out")
    state(tmp_path / "out" / "fedavg")
    shared.inputs = lambda config: "others"
    before = everything(tmp_path / "out")
    refused = r"^data.name = 'synthetic', model.name = 'tiny': the rounds in .*fedavg were made with other"
    with pytest.raises(ConfigError, match=refused):
        outlook(study(strategies="fedavg,flora"), tmp_path / "out", resume=True)
    with pytest.raises(ConfigError, match=refused):
        run_study(study(strategies="fedavg,flora"), tmp_path / "out", resume=True)
    assert shared.ran == ["fedavg"]
    assert everything(tmp_path / "out") == before


def test_where_nothing_is_to_run_no_data_are_read(
    shared: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared.fails["flora"] = RunFailed("once")
    with pytest.raises(RunFailed):
        run_study(study(strategies="fedavg,flora"), tmp_path / "out")
    monkeypatch.setattr(Engine, "gives", lambda *cell: pytest.fail("nothing is to run"))
    with pytest.raises(RunFailed, match="flora: once"):
        run_study(study(strategies="fedavg,flora"), tmp_path / "out", resume=True)
    run_study(study(strategies="fedavg"), tmp_path / "out", resume=True)
    assert shared.ran == ["fedavg", "flora"]
    with pytest.raises(pytest.fail.Exception):
        run_study(study(strategies="fedavg,flora"), tmp_path / "out", resume=True, retry_failed=True)


def test_a_report_on_cells_of_different_data_says_so(shared: Simulation, tmp_path: Path) -> None:
    config = study(strategies="fedavg,flora,ffa", seeds="0,1")
    assert "Given other data" not in run_study(config, tmp_path / "out").read_text()
    record = provenance(tmp_path / "out" / "flora-seed-1")
    record["identity"]["inputs"] = "others"
    (tmp_path / "out" / "flora-seed-1" / "provenance.json").write_text(json.dumps(record))
    page = run_study(config, tmp_path / "out", resume=True).read_text()
    assert "runs of the same seed and data keys: flora-seed-1. What differs" in page
    assert len(shared.ran) == 6
