"""What is said of a run whose SuperLink died."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedlora.deployment.operator import submit
from fedlora.deployment.operator.layout import OWN
from fedlora.deployment.operator.submit import _app, bring_own_strategy
from fedlora.errors import RunFailed
from fedlora.server.directory import RunDirectory
from fedlora.server.validate import check
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A SuperLink that does not answer until the list is empty."""
    left = ["down", "down"]

    def run_status(*_: Any) -> tuple[str, str]:
        if left:
            raise RunFailed(f"flwr ls: it is {left.pop()}")
        return "running", ""

    monkeypatch.setattr(submit, "run_status", run_status)
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    return left


def outcome(path: Path) -> dict[str, Any]:
    layout: Any = None
    return submit._outcome(layout, "7", RunDirectory(path))


def test_a_superlink_that_starts_again_is_waited_for(silent: list[str], tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"run 7 is running .*go on with --resume"):
        outcome(tmp_path / "run")
    assert silent == []


def test_one_that_stays_away_leaves_what_was_written(
    silent: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "ANSWER_SECONDS", -1)
    with pytest.raises(RunFailed, match=r"run 7: .* does not answer \(flwr ls: it is down\).* --resume"):
        outcome(tmp_path / "run")


def test_files_beside_the_operator_are_found_by_a_server_that_works_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    (tmp_path / "synthetic").mkdir()  # a built-in name all the same
    keys = {"data.name": "here.jsonl", "data.test": "elsewhere.jsonl", "data.public": "synthetic"}
    data = submit.whole_paths(tiny_config(**keys)).data
    assert (data.name, data.test, data.public) == (
        str(tmp_path / "here.jsonl"),
        "elsewhere.jsonl",
        "synthetic",
    )
    assert submit.whole_paths(tiny_config(**{"data.name": "here.jsonl"})).data.test == ""


def test_the_app_is_declared_as_the_project_is(tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    with submit._app(tmp_path) as app:
        declared = tomllib.loads((app / "pyproject.toml").read_text())
        included = declared["tool"]["flwr"]["app"].pop("fab-include")
        assert all(any(app.glob(pattern.lstrip("/"))) for pattern in included)
    wanted = project["tool"]["flwr"]
    assert set(included) == {p for p in wanted["app"].pop("fab-include") if p != "/README.md"}
    assert declared["tool"]["flwr"] == wanted
    assert declared["project"]["version"] == project["project"]["version"]


def test_the_server_is_told_whole_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    told: list[str] = []

    def flwr(*command: Any) -> Any:
        told.append(Path(command[-1]).read_text())
        raise RunFailed("seen")

    monkeypatch.setattr(submit, "flwr", flwr)
    layout: Any = None
    with pytest.raises(RunFailed, match="seen"):
        submit.submit(layout, tiny_config(**{"data.name": "here.jsonl"}), tmp_path / "run")
    assert f'name = "{tmp_path / "here.jsonl"}"' in told[0]


OWN_RULE = """
from dataclasses import dataclass
from strategies.rules.fedavg import FedAvgRule
from {helper} import TITLE


@dataclass(frozen=True, kw_only=True)
class Mine(FedAvgRule):
    pass
"""


ELSEWHERE = """
import sys; from fedlora.config import from_flat; from fedlora.server.validate import check
for name in ("own_package", "own_module"):
    sys.path.append(f"{sys.argv[1]}/{name}/{sys.argv[2]}")
    print(type(check(from_flat({"strategy.name": f"{name}:Mine"}))).__name__)
"""


def test_a_strategy_of_ones_own_is_found_on_the_server_wherever_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package and a module; and the bundle for the nodes holds none of it."""
    here, out, work = tmp_path / "here", tmp_path / "out", tmp_path / "else"
    for folder in (here / "own_package", work):
        folder.mkdir(parents=True)
    (here / "own_package" / "title.py").write_text("TITLE = 'mine'\n")
    (here / "own_package" / "__init__.py").write_text(OWN_RULE.format(helper="own_package.title"))
    (here / "own_module.py").write_text(OWN_RULE.format(helper="math").replace("TITLE", "pi"))
    monkeypatch.chdir(here)
    for name in ("own_package", "own_module"):
        config = tiny_config(**{"strategy.name": f"{name}:Mine"})
        check(config)
        bring_own_strategy(config, out / name / OWN)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(out), OWN],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["Mine", "Mine"], done.stderr
    bring_own_strategy(tiny_config(), out / "none")
    assert not (out / "none").exists()
    with _app(tmp_path) as app:
        assert not list(app.rglob("*own_*"))
