"""Try every mutation of ``mutants.toml`` in a copy of the tree, and say which test finds it.

    python -m tests.mutants [NAME ...]     (rules; all of them by default)

Exit code 1 where a mutation survives, or where a line to change is not there any more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("fedlora", "strategies", "clients", "tests")
TESTS = ("tests/strategies", "tests/core", "tests/federation/test_strategy.py")
"""Where a test has to turn red, unless a mutation names its own."""
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One wrong formula.

    Attributes:
        rule: whose.
        file: in which module.
        find: the text that is there, once.
        replace: the wrong text.
        what: what would be wrong.
        tests: where to look for the test that finds it.
        select: pytest's ``-k``, the rule's name by default.
    """

    rule: str
    file: str
    find: str
    replace: str
    what: str
    tests: tuple[str, ...] = TESTS
    select: str | None = None


def load() -> list[Mutant]:
    """The list, in the order of the file."""
    table = tomllib.loads((Path(__file__).parent / "mutants.toml").read_text())
    return [Mutant(**{**entry, "tests": tuple(entry.get("tests", TESTS))}) for entry in table["mutant"]]


def verdict(mutant: Mutant) -> str:
    """The first test that turns red, or what is wrong with the mutation."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / mutant.file
        text = path.read_text()
        if text.count(mutant.find) != 1:
            return f"GONE: {mutant.find!r} is {text.count(mutant.find)} times in {mutant.file}"
        path.write_text(text.replace(mutant.find, mutant.replace))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests]
        command += ["-k", mutant.select if mutant.select is not None else mutant.rule]
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        found = [match[1] for line in done.stdout.splitlines() if (match := FAILED.match(line))]
        return found[0] if found else f"SURVIVED (pytest exit code {done.returncode})"


def main() -> int:
    """Print the list as it is tried."""
    wanted = set(sys.argv[1:])
    mutants = [m for m in load() if not wanted or m.rule in wanted]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = []
        for mutant, outcome in zip(mutants, pool.map(verdict, mutants), strict=True):
            verdicts.append(outcome)
            print(f"{mutant.rule:14} {mutant.what}\n{'':14}   {mutant.find!r} -> {mutant.replace!r}")
            print(f"{'':14}   {outcome}", flush=True)
    bad = [v for v in verdicts if v.startswith(("SURVIVED", "GONE"))]
    print(f"{len(mutants)} mutations, {len(mutants) - len(bad)} found, {len(bad)} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
