"""The rule of docs/strategy.md, used and tested as the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fedlora.errors import ConfigError
from strategies.registry import make_rule
from tests.nested import passed
from tests.strategies import test_exactness as laws

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "strategy.md").read_text()


def example() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def test_the_example_is_short_and_obeys_the_laws(tmp_path: Path) -> None:
    """By the command of the page."""
    assert example().count("\n") < 60
    (tmp_path / "damped.py").write_text(example())
    command = re.search(r"\$ (FEDLORA_RULE=\S+) python -m pytest (.*)", PAGE)
    assert command
    name, _, rule = command[1].partition("=")
    found = passed(command[2].split(), {name: rule}, tmp_path)
    assert 15 < len(found) < 100


def test_the_laws_hold_it_to_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module, text in (("as_it_is", example()), ("bold", example().replace("exact=False", "exact=True"))):
        (tmp_path / f"{module}.py").write_text(text)
    laws.test_the_fact_exact_is_true(make_rule("as_it_is:DampedRule"), 0)
    with pytest.raises(AssertionError):
        laws.test_the_fact_exact_is_true(make_rule("bold:DampedRule"), 0)


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
