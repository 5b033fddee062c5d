"""Shared by all tests: no hub, one thread, a small run on random weights, a cache of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache as remembered
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own 15 starves its clients beside other tests

import pytest
import torch
from hypothesis import settings
from opacus.accountants.analysis import rdp
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from fedlora.config import RunConfig, from_flat
from fedlora.privacy import plausible

torch.set_num_threads(1)
os.fsync = lambda fd: None
"""No test cuts the power, and a run flushes some fifteen files; a test of flushing puts its witness here."""
rdp._compute_rdp = remembered(rdp._compute_rdp)
"""One step's loss at an order, of numbers alone: tens of milliseconds, and most tests ask for the same."""
ALL_DRAWS = plausible.NOISE_DRAWS
plausible.NOISE_DRAWS = plausible.NOISE_AGAIN = 10_000
"""Each new private model draws noise to test itself, a tiny one by hundreds of steps. So few show 10 % too
much; the tests of that test draw more."""

# The same examples every time: a red test is red for everybody. `make quick` takes its own profile.
settings.register_profile("fedlora", deadline=None, max_examples=12, derandomize=True)
settings.register_profile("quick", deadline=None, max_examples=5, derandomize=True)
settings.load_profile("fedlora")

ON_RAY = (
    "tests/simulation",
    "tests/study/test_beside.py::test_two_at_a_time",
    "tests/clients/test_own_optimizer.py::test_client_processes",
)
"""What one worker takes, so that one Ray and one pool of actors do for all of it."""
LONGEST = (
    *ON_RAY,
    "tests/audit/test_audit.py",
    "tests/clients/cohort/test_runs.py",
    "tests/test_docs_commands.py",
    "tests/test_cli.py",
    "tests/e2e",
    "tests/strategies/test_own_rule.py",
    "tests/study",
)
"""What begins first where workers share the files out, so that none is alone with a long file at the end."""


class Files(LoadFileScheduling):
    """Whole files to a worker, and all that is on Ray to one; ``loadgroup`` finds no group in pytest 9."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith(ON_RAY) else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Files:
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in this order; the sort is stable, so that within a file nothing moves."""
    items.sort(key=lambda item: next((n for n, f in enumerate(LONGEST) if item.nodeid.startswith(f)), 99))


def tiny_config(**overrides: Any) -> RunConfig:
    """Three rounds on a random two-layer model and generated sentences; keys as in TOML.

    Noise is calibrated by rdp, in a tenth of the time of prv.
    A test that is about Ray brings a `RayPool`, or names that engine.
    """
    keys: dict[str, Any] = {
        "num-server-rounds": 3,
        "seed": 1,
        "model.name": "tiny",
        "data.name": "synthetic",
        "data.evaluate-examples": 60,
        "train.local-steps": 3,
        "lora.rank": 4,
        "engine.name": "in-process",
        "privacy.accountant": "rdp",
    }
    return from_flat({**keys, **overrides})


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory of this test session alone."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("FEDLORA_CACHE")
    os.environ["FEDLORA_CACHE"] = str(path)
    yield path
    if before is None:
        del os.environ["FEDLORA_CACHE"]
    else:
        os.environ["FEDLORA_CACHE"] = before


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a tiny random model of a family, see `tests.models.families`; each made once."""
    home = tmp_path_factory.mktemp("families")

    def directory(family: str, kind: str = "SequenceClassification", **more: Any) -> Path:
        from tests.models.families import save

        path = home / "-".join([family, kind, *(f"{name}={value}" for name, value in more.items())])
        return path if path.exists() else save(path, family, kind, **more)

    return directory


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One `tests.models.elsewhere.Elsewhere` for all, whose imports take longer than what it opens."""
    from tests.models.elsewhere import opener

    with opener(tmp_path_factory.mktemp("elsewhere")) as process:
        yield process
