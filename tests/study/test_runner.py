"""A study as a whole: what is run, what cannot be, what fails, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.config import from_flat
from fedlora.core.sealed import read_sealed, sealed
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.server.directory import RunDirectory
from fedlora.study.execute import runner
from fedlora.study.execute.outlook import outlook
from fedlora.study.execute.runner import run_study
from tests.study.simulation import KEYS, Simulation, study


def section(page: Path, name: str) -> str:
    text = page.read_text()
    start = text.index(f'id="{name}"')
    return text[start : text.index("</section>", start)]


MIXED = '{"equal": {}, "mixed": {"lora.ranks": "2,4"}}'


def test_cells_that_cannot_exist_are_listed_and_the_others_run(
    simulation: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run_study(study(strategies="fedavg,flora", settings=MIXED, seeds="1,2"), tmp_path / "out")
    assert simulation.ran == [
        f"{group}-seed-{seed}" for seed in (1, 2) for group in ("fedavg-equal", "flora-equal", "flora-mixed")
    ]
    assert "fedavg-mixed-seed-1: not applicable (lora.ranks: fedavg needs equal" in capsys.readouterr().err
    listed = section(report, "absent")
    assert listed.count("<tr>") == 2
    assert "fedavg-mixed</th><td>not applicable</td><td>lora.ranks: fedavg needs equal ranks" in listed
    assert "6 runs finished, 2 not applicable." in report.read_text()
    assert not (tmp_path / "out" / "fedavg-mixed-seed-1").exists()


def test_client_level_privacy_leaves_stacking_out(simulation: Simulation, tmp_path: Path) -> None:
    settings = '{"client-dp": {"privacy.mode": "client", "privacy.noise-multiplier": 1.0}}'
    report = run_study(study(strategies="fedavg,flora", settings=settings), tmp_path / "out")
    assert simulation.ran == ["fedavg-client-dp"]
    assert "the aggregate of flora is no mean" in section(report, "absent")


def test_claims_may_name_a_method_that_is_not_applicable(simulation: Simulation, tmp_path: Path) -> None:
    config = study(strategies="fedavg,flora", settings=MIXED, comparisons="flora:fedavg")
    report = run_study(config, tmp_path / "out")
    assert section(report, "claims").count("flora against fedavg") == 1


def test_a_study_of_nothing_that_can_exist_is_refused(simulation: Simulation, tmp_path: Path) -> None:
    config = from_flat({**KEYS, "study.strategies": "fedavg", "lora.ranks": "2,4"})
    with pytest.raises(NotApplicable, match=r"no run can exist; fedavg: lora\.ranks"):
        run_study(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"settings": '{"a": {"lora.rnaks": "2,4"}}'}, "lora.rnaks"),
        ({"settings": '{"a": {"data.partitioner": "bootstrap", "privacy.mode": "example"}}'}, "bootstrap"),
        ({"comparisons": "flora:fedvag"}, "fedvag"),
        (
            {"settings": '{"ok": {}, "bad": {"data.name": "nowhere.csv"}}'},
            r"^flora-bad: data.name = 'nowhere.csv': no such file",
        ),
        ({"settings": '{"ok": {}, "bad": {"data.test": "none.csv"}}'}, "flora-bad: data.test = 'none.csv'"),
        (
            {"settings": '{"ok": {}, "bad": {"data.evaluation-sets": "{\\"a\\": \\"none.csv\\"}"}}'},
            r"^flora-bad: data.evaluation-sets = 'none.csv': no such file",
        ),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(
    keys: dict[str, str], message: str, simulation: Simulation, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_study(study(strategies="flora", **keys), tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        outlook(study(strategies="flora", **keys), tmp_path / "out")
    assert simulation.ran == []
    assert not (tmp_path / "out").exists()


# --- failures ----------------------------------------------------------------------------------------


def failing(simulation: Simulation, path: Path, *, resume: bool = False, **options: bool) -> str:
    with pytest.raises(RunFailed) as caught:
        run_study(study(strategies="fedavg,flora,ffa"), path, resume=resume, **options)
    return str(caught.value)


def test_a_failed_cell_is_recorded_and_the_others_run(simulation: Simulation, tmp_path: Path) -> None:
    simulation.fails["flora"] = RunFailed("round 2: too few clients")
    message = failing(simulation, tmp_path)
    assert simulation.ran == ["fedavg", "flora", "ffa"]
    assert message.startswith("1 of 3 runs failed (flora: round 2: too few clients); the others are in ")
    assert message.endswith("try them again with --resume --retry-failed")
    assert json.loads((tmp_path / "flora" / "failed.json").read_text()) == {
        "reason": "round 2: too few clients"
    }
    assert "flora</th><td>failed</td><td>round 2: too few clients" in section(
        tmp_path / "report.html", "absent"
    )
    assert simulation.started == 2, "the cell after a failure has an engine of its own"


def test_failures_are_tried_again_only_on_request(simulation: Simulation, tmp_path: Path) -> None:
    simulation.fails["flora"] = RunFailed("too few clients")
    failing(simulation, tmp_path)
    simulation.ran.clear()
    simulation.fails.clear()
    assert "flora: too few clients" in failing(simulation, tmp_path, resume=True)
    assert simulation.ran == []
    report = run_study(study(strategies="fedavg,flora,ffa"), tmp_path, resume=True, retry_failed=True)
    assert simulation.ran == ["flora"]
    assert not (tmp_path / "flora" / "failed.json").exists()
    assert 'id="absent"' not in report.read_text()


def test_what_nobody_foresaw_is_recorded_with_its_traceback(simulation: Simulation, tmp_path: Path) -> None:
    simulation.fails["flora"] = ZeroDivisionError("division by zero\nsecond line")
    assert "(flora: ZeroDivisionError: division by zero)" in failing(simulation, tmp_path)
    record = json.loads((tmp_path / "flora" / "failed.json").read_text())
    assert "in simulate_on" in record["traceback"]


def test_an_interruption_is_no_failure(simulation: Simulation, tmp_path: Path) -> None:
    simulation.fails["flora"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        run_study(study(strategies="fedavg,flora"), tmp_path)
    assert not (tmp_path / "flora" / "failed.json").exists()


def test_nothing_finished_nothing_reported(simulation: Simulation, tmp_path: Path) -> None:
    simulation.fails = {name: RunFailed(name) for name in ("fedavg", "flora", "ffa")}
    assert "3 of 3 runs failed" in failing(simulation, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_failure_is_exit_code_1_and_one_line(
    simulation: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation.fails["flora"] = RunFailed("too few clients")
    (tmp_path / "study.toml").write_text('[model]\nname = "tiny"\n[study]\nstrategies = "fedavg,flora"\n')
    arguments = ["compare", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]
    outcome = CliRunner().invoke(cli, arguments)
    assert outcome.exit_code == 1
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 2 runs failed")


def test_the_time_that_is_left_counts_the_runs_that_are_left(
    simulation: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_study(study(strategies="fedavg"), tmp_path)
    clock = iter(range(0, 10_000, 60))  # a run begins and ends a minute apart
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    run_study(study(strategies="fedavg,flora,ffa,fedsvd"), tmp_path, resume=True)
    assert simulation.titles[1:] == [
        "[2/4] flora", "[3/4] ffa, about 2 min 0 s left", "[4/4] fedsvd, about 1 min 0 s left",
    ]  # fmt: skip


def test_claims_that_so_many_seeds_can_never_decide_are_named_at_the_start(
    simulation: Simulation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = '{"a": {}, "b": {}}'
    config = study(strategies="fedavg,flora", settings=settings, seeds="1,2", comparisons="flora:fedavg")
    run_study(config, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("study.comparisons: a claim wants 10 seeds, there are 2\n")


def test_a_study_that_was_looked_at_before_its_last_seed_says_so(
    simulation: Simulation, tmp_path: Path
) -> None:
    said = "Looked at before its last seed, with"
    assert said not in run_study(study(strategies="fedavg", seeds="1,2"), tmp_path).read_text()
    again = run_study(study(strategies="fedavg", seeds="1,2"), tmp_path, resume=True)
    assert said not in again.read_text()
    later = run_study(study(strategies="fedavg", seeds="1,2,3"), tmp_path, resume=True)
    assert f"{said} 2: intervals" in later.read_text()
    assert read_sealed(tmp_path / "study.json")["looks"] == [2, 3]


# --- directories -------------------------------------------------------------------------------------


def test_finished_cells_need_no_data(simulation: Simulation, tmp_path: Path) -> None:
    (tmp_path / "here.csv").write_text("text,label\n")
    config = study(strategies="flora", settings=json.dumps({"a": {"data.name": str(tmp_path / "here.csv")}}))
    run_study(config, tmp_path / "out")
    (tmp_path / "here.csv").unlink()
    run_study(config, tmp_path / "out", resume=True)
    assert simulation.ran == ["flora-a"]


def test_finished_cells_are_not_run_again(simulation: Simulation, tmp_path: Path) -> None:
    run_study(study(strategies="fedavg"), tmp_path)
    run_study(study(strategies="fedavg,flora"), tmp_path, resume=True)
    assert simulation.ran == ["fedavg", "flora"]


def _other_study_schema(root: Path) -> None:
    (root / "study.json").write_text('{"schema": 99}')


def _other_cell_schema(root: Path) -> None:
    file = root / "fedavg" / "provenance.json"
    file.write_text(json.dumps(sealed({**read_sealed(file), "schema": 99})))


def _no_schema_at_all(root: Path) -> None:
    (root / "study.json").write_text("[]")


def _another_rank(root: Path) -> None:
    file = root / "fedavg" / "config.toml"
    file.write_text(file.read_text().replace("rank = 8", "rank = 4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_study_schema, "study.json: is of schema 99, this version of fedlora reads and writes 1"),
        (_other_cell_schema, "provenance.json: is of schema 99"),
        (_no_schema_at_all, "study.json: is damaged, it is no JSON object"),
        (_another_rank, "lora.rank = 8: the run in .* has 4; use another --out"),
    ],
)
def test_what_another_study_or_version_wrote_is_left_alone(
    change: Callable[[Path], None], message: str, simulation: Simulation, tmp_path: Path
) -> None:
    run_study(study(strategies="fedavg"), tmp_path)
    change(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=message) as caught:
        run_study(study(strategies="flora,fedavg"), tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert simulation.ran == ["fedavg"]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_single_run_of_another_schema_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('{"schema": 99}')
    with pytest.raises(ConfigError, match="is of schema 99"):
        RunDirectory(tmp_path, resume=True)


def test_without_a_schema_it_is_the_first(simulation: Simulation, tmp_path: Path) -> None:
    """As cells that were published before it was written."""
    run_study(study(strategies="fedavg"), tmp_path)
    (tmp_path / "study.json").unlink()
    file = tmp_path / "fedavg" / "provenance.json"
    file.write_text(json.dumps({k: v for k, v in read_sealed(file).items() if k != "schema"}))
    run_study(study(strategies="fedavg"), tmp_path, resume=True)
    assert simulation.ran == ["fedavg"]
