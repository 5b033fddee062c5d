"""A start is mostly imports: Ray is begun before them; whoever needs it takes it over, nobody leaves it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from fedlora.simulation.ray_cluster import QUIET

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "peft", "opacus", "flwr", "ray", "scipy", "pandas")
"""What takes seconds between them."""


def told_by(program: str) -> Any:
    """The JSON that a new process prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ray_is_there_ahead_and_is_its_takers() -> None:
    told = told_by("""
import json, os, ray, sys
from fedlora.simulation.ray_cluster import QUIET, ahead, connect
told = {}
with ahead("", "colorsys"):
    told["inherited"] = {key: os.environ.get(key) for key in QUIET}
    told["imported"] = "colorsys" in sys.modules
    told["there"] = ray.is_initialized()
told["left"] = ray.is_initialized()
with ahead("", "colorsys"):
    told["first"], told["second"] = connect(""), connect("")
told["taken"] = ray.is_initialized()
with ahead("", "colorsys"):
    told["of somebody"] = connect("")
told["stays"] = ray.is_initialized()
try:
    with ahead("127.0.0.1:9", "colorsys"):
        pass
except Exception as error:
    told["refused"] = type(error).__name__
ray.shutdown()
print(json.dumps(told))
""")
    assert told == {
        "inherited": QUIET,
        "imported": True,
        "there": True,
        "left": False,
        "first": True,
        "second": False,
        "taken": True,
        "of somebody": False,
        "stays": True,
        "refused": "ConfigError",
    }


def test_nothing_heavy_is_imported_before_ray_is_begun() -> None:
    """Neither by a run nor by a study: else Ray, and after it the clients, wait for seconds."""
    told = told_by(f"""
import contextlib, json, sys
from fedlora.simulation import simulate
found = []
@contextlib.contextmanager
def begun(engine):
    found.append([name for name in {HEAVY!r} if name in sys.modules])
    raise KeyError
    yield
simulate.begun = begun
import fedlora
for begin in (fedlora.run, fedlora.compare):
    with contextlib.suppress(KeyError):
        begin(out="never")
print(json.dumps(found))
""")
    assert told == [[], []]


def test_a_clients_process_imports_only_what_clients_need() -> None:
    """PEFT writes files, at the server; SciPy solves what single rules ask for."""
    told = told_by(f"""
import json, sys
import clients.handler
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
""")
    assert "torch" in told
    assert not {"peft", "opacus", "pandas", "ray"} & {*told}


def test_flower_is_quiet_whenever_it_is_imported() -> None:
    """Its import sets the level of its own log."""
    told = told_by("""
import json, logging
from fedlora.simulation.simulate import quiet
quiet()
import flwr.app, flwr.server
print(json.dumps(logging.getLogger("flwr").level))
""")
    assert told == logging.ERROR
