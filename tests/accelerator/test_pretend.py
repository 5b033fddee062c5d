"""`tests.accelerator.cases` on the device ``pretend``, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_cases_in_a_process_of_their_own() -> None:
    cases = Path(__file__).with_name("cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), check=False)
    assert found.returncode == 0, found.stdout[-6000:]
    assert " passed" in found.stdout
