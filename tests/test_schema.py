"""``pyproject.toml`` is the complete schema: the same keys, values and types as the dataclasses."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedlora.config import RunConfig, StudyConfig, flatten, from_flat, read_config, to_flat

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_default_run_config_is_the_dataclasses() -> None:
    declared = flatten(PROJECT["tool"]["flwr"]["app"]["config"])
    defaults = to_flat(RunConfig())
    assert declared == defaults
    assert {k: type(v) for k, v in declared.items()} == {k: type(v) for k, v in defaults.items()}
    assert list(declared) == list(defaults)


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_config_is_accepted(path: Path) -> None:
    from fedlora.server.validate import check
    from fedlora.study.analyse.tuning import check_tuning, trials
    from fedlora.study.plan.absent import applicable
    from fedlora.study.plan.cells import expand

    config = read_config(path)
    check(config)
    if config.study != StudyConfig():
        cells, _ = applicable(expand(config, num_partitions=4), config.study)
        assert all(from_flat(to_flat(cell.config)) == cell.config for cell in cells)
        if config.study.tune_learning_rates:
            check_tuning(config, cells)
            assert trials(config.study, cells)


def test_only_declared_packages_are_built_and_bundled() -> None:
    packages = ("fedlora", "strategies", "clients")  # what a wheel holds: tests/e2e/test_wheel.py
    bundled = PROJECT["tool"]["flwr"]["app"]["fab-include"]
    assert {f"{package}/**/*.py" for package in packages} <= set(bundled)
    names = [p for package in packages for p in (ROOT / package).rglob("*.py")]
    hidden = [p for p in names if p.name.startswith("test_") or p.name.endswith("_test.py")]
    assert not hidden, "Flower drops test_*.py and *_test.py from its bundle"
