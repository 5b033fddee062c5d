"""Tests that are run in a test, in this process: nothing is imported again but their package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


class Passed:
    """A plugin that keeps the names of what passed, and what failed as it would be printed."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append(f"{report.nodeid}\n{report.longreprtext}")
        elif report.passed and report.when == "call":
            self.names.append(report.nodeid)


def passed(files: list[str], environment: dict[str, str], here: Path) -> list[str]:
    """What passes as ``python -m pytest FILES`` would find it with this environment and ``here`` on its path.

    Raises:
        AssertionError: one fails, or none is there.
    """
    seen = Passed()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        packages = {str(Path(file).parent).replace("/", ".") for file in files}
        for module in list(sys.modules):  # read anew, since some of them look at the environment
            if any(module == package or module.startswith(f"{package}.") for package in packages):
                patched.delitem(sys.modules, module)
        patched.syspath_prepend(here)
        patched.chdir(ROOT)
        status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[seen])
    assert status == pytest.ExitCode.OK, "\n".join(seen.failures)[-6000:]
    return seen.names
