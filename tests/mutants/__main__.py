"""Try every mutation of ``mutants.toml`` in a copy of the tree, and say which test finds it.

    python -m tests.mutants [NAME ...]     (rules; all of them by default)

Exit code 1 where a mutation survives, where a line to change is not there any more, or where the tests cannot
be collected, which would find anything. Each copy has a process of its own, forked from one that has imported
what is not ours, which would take most of the time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TREE = ("fedlora", "strategies", "clients", "tests", "docs", "experiments", "pyproject.toml", "README.md")
HEAVY = ("torch", "transformers", "peft", "opacus", "flwr.serverapp", "datasets", "scipy.stats", "hypothesis")
FIRST = ("tests/strategies/test_exactness.py", "tests/strategies/test_laws.py")
"""Where most turn red: nothing else is collected for those."""
TESTS = ("tests/strategies", "tests/core", "tests/federation/test_strategy.py")
"""Where a test has to turn red, unless a mutation names its own."""
FAILED = re.compile(r"^FAILED (\S+)")


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
        select: pytest's ``-k``; by default the rule's name, or everything where ``tests`` names its own.
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
    """The first test that turns red, or what is wrong with the mutation; call it once in a process."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for entry in TREE:
            source, skipped = ROOT / entry, shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, copy / entry, ignore=skipped)
            else:
                shutil.copy(source, copy)
        path = copy / mutant.file
        text = path.read_text()
        if text.count(mutant.find) != 1:
            return f"GONE: {mutant.find!r} is {text.count(mutant.find)} times in {mutant.file}"
        path.write_text(text.replace(mutant.find, mutant.replace))
        given = "" if mutant.tests != TESTS else mutant.rule
        select = ["-k", given if mutant.select is None else mutant.select]
        for tests in (FIRST, TESTS) if mutant.tests == TESTS else (mutant.tests,):
            code, printed = _pytest(copy, ["-q", "-x", "-p", "no:cacheprovider", *tests, *select])
            found = [match[1] for line in printed.splitlines() if (match := FAILED.match(line))]
            if found and code == pytest.ExitCode.TESTS_FAILED:
                return found[0]
        last = printed.strip().splitlines()[-1:] or [""]
        return f"SURVIVED (pytest exit code {code}: {last[0]})"


def _pytest(copy: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of pytest in a copy, in this process, which knows nothing of ours yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] in TREE]:
        del sys.modules[name]
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    printed = copy / "printed"
    with printed.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        code = int(pytest.main(arguments))
        sys.stdout.flush()
    os.chdir("/")
    return code, printed.read_text()


def main() -> int:
    """Print the list as it is tried."""
    wanted = set(sys.argv[1:])
    mutants = [m for m in load() if not wanted or m.rule in wanted]
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    with fork.Pool(int(os.environ.get("WORKERS", os.cpu_count() or 1)), maxtasksperchild=1) as pool:
        verdicts = []
        for mutant, outcome in zip(mutants, pool.imap(verdict, mutants, chunksize=1), strict=True):
            verdicts.append(outcome)
            print(f"{mutant.rule:14} {mutant.what}\n{'':14}   {mutant.find!r} -> {mutant.replace!r}")
            print(f"{'':14}   {outcome}", flush=True)
    bad = [v for v in verdicts if v.startswith(("SURVIVED", "GONE"))]
    print(f"{len(mutants)} mutations, {len(mutants) - len(bad)} found, {len(bad)} not")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
