"""The rule of docs/strategy.md, used and tested as the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.errors import ConfigError
from strategies.registry import make_rule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "strategy.md").read_text()


def example() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def under_laws(folder: Path, code: str, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "damped.py").write_text(code)
    command = re.search(r"\$ (FEDLORA_RULE=\S+) python -m pytest (.*)", PAGE)
    assert command
    name, _, rule = command[1].partition("=")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *command[2].split(), *more],
        cwd=ROOT,
        env={**os.environ, name: rule, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_example_is_short_and_obeys_the_laws(tmp_path: Path) -> None:
    assert example().count("\n") < 60
    done = under_laws(tmp_path, example())
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20


def test_the_laws_hold_it_to_its_facts(tmp_path: Path) -> None:
    done = under_laws(tmp_path, example().replace("exact=False", "exact=True"), "-k", "exact")
    assert done.returncode == 1
    assert "damped:DampedRule" in done.stdout


def test_a_rule_is_found_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here_only.py").write_text(example())
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    rule = make_rule("here_only:DampedRule", {"rate": 0.25})
    assert (rule.facts.name, rule.rate) == ("damped", 0.25)  # type: ignore[attr-defined]
    assert sys.path == before
    with pytest.raises(ConfigError, match="rate = 2"):
        make_rule("here_only:DampedRule", {"rate": 2.0})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:Rule", "cannot be imported .*no_such_module"),
        ("strategies.rules.fedavg:Nobody", "cannot be imported .*Nobody"),
        ("strategies.facts:Facts", "is no subclass"),
        ("strategies.rule:Rule", "is no subclass"),
        (":", "cannot be imported"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_line(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        make_rule(name)
    assert "\n" not in str(refused.value)
