"""What only a part of the users needs is an extra, and nothing else touches it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedlora.core import code
from fedlora.core.code import EXTRAS, need_extra
from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BARE = """
import builtins

from fedlora.core.code import EXTRAS

extra = {package for packages in EXTRAS.values() for package in packages}
honest = builtins.__import__

def guarded(name, globals=None, *rest, **named):
    ours = str((globals or {}).get("__name__")).partition(".")[0] in ("fedlora", "strategies", "clients")
    assert not (ours and name.partition(".")[0] in extra), f"{globals['__name__']} imports {name}"
    return honest(name, globals, *rest, **named)

builtins.__import__ = guarded
import clients.execute_cohort, clients.handler, clients.mod
import fedlora.study.library, fedlora.cli
import fedlora.client_app, fedlora.evaluation.adapter, fedlora.merge.aggregate
import fedlora.server_app, fedlora.simulation.actor, fedlora.simulation.ray_grid, fedlora.simulation.simulate
import fedlora.deployment.operator.submit, fedlora.study.execute.runner
"""


def test_extras_are_those_of_the_project() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, packages in EXTRAS.items():
        assert tuple(re.split("[>=<]", wanted)[0] for wanted in declared[name]) == packages
    assert f"fedlora[{','.join(EXTRAS)},docs]" in declared["dev"]


def test_runs_nodes_and_servers_import_nothing_of_an_extra() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_missing_extra_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    need_extra("report", "fedlora compare")
    monkeypatch.setattr(code, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        need_extra("report", "fedlora compare")
    assert str(error.value) == "fedlora compare needs matplotlib: pip install 'fedlora[report]'"
