"""Rules by name: what is asked for is what one gets, or one line says why not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fedlora.core.factors import LoraFactors
from fedlora.core.init_drawn import DRAWN, INIT_A
from fedlora.core.state import ModuleSpec, Template
from fedlora.errors import ConfigError
from strategies import rules
from strategies.named import public_class
from strategies.registry import RULES, found, make_rule
from strategies.rules import fedavg


def test_a_file_among_the_rules_is_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else names it; a second rule of one name is refused, and one that lies elsewhere is none."""
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    text = Path(fedavg.__file__).read_text()
    (tmp_path / "mine.py").write_text(text.replace('name="fedavg"', 'name="mine"'))
    listed = found()
    assert list(listed) == sorted([*RULES, "mine"], key=lambda name: listed[name].__module__)
    assert {name: rule for name, rule in listed.items() if name != "mine"} == RULES
    assert public_class(listed["mine"])(scaling=2.0).rule == listed["mine"]()
    (tmp_path / "twin.py").write_text(text)
    with pytest.raises(AssertionError, match=r"rules\.fedavg and strategies\.rules\.twin are both 'fedavg'"):
        found()
    assert "mine" not in RULES


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_made_with_its_defaults(name: str) -> None:
    rule = make_rule(name)
    assert type(rule) is RULES[name]
    assert rule == RULES[name]() == make_rule(name, {})


@pytest.mark.parametrize("name", RULES)
def test_rules_are_frozen_values(name: str) -> None:
    rule = make_rule(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.init_a = "orthonormal"  # type: ignore[misc]
    assert hash(rule) == hash(make_rule(name))


@pytest.mark.parametrize(
    ("name", "options"),
    [("fedsvd", {"period": 5}), ("lora-fair", {"lam": 0.5}), ("ffa", {"init_a": "orthonormal"})],
)
def test_options_reach_the_rule(name: str, options: dict[str, Any]) -> None:
    rule = make_rule(name, options)
    assert {key: getattr(rule, key) for key in options} == options


def test_a_whole_number_is_a_number() -> None:
    assert make_rule("lora-fair", {"lam": 1}) == make_rule("lora-fair", {"lam": 1.0})


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("fedavgg", {}, ("strategy.name", "'fedavgg'", "did you mean fedavg?", "head-only")),
        ("zzz", {}, ("strategy.name", "'zzz'", "accepted are", *RULES)),
        ("", {}, ("strategy.name", "''", "accepted are")),
        ("fedsvd", {"periods": 2}, ("strategy.options periods", "2", "fedsvd accepts", "period")),
        ("fedavg", {"lam": 0.1}, ("strategy.options lam", "0.1", "fedavg accepts", "init_a")),
        ("fedsvd", {"period": 2.0}, ("strategy.options period", "2.0", "int")),
        ("fedsvd", {"period": True}, ("strategy.options period", "True", "int")),
        ("fedsvd", {"period": "2"}, ("strategy.options period", "'2'", "int")),
        ("fedsvd", {"period": None}, ("strategy.options period", "None", "int")),
        ("fedsvd", {"period": 0}, ("strategy.options period", "0", ">= 1")),
        ("lora-fair", {"lam": "0.1"}, ("strategy.options lam", "'0.1'", "float")),
        ("lora-fair", {"lam": True}, ("strategy.options lam", "True", "float")),
        ("lora-fair", {"lam": -1}, ("strategy.options lam", "-1", ">= 0")),
        ("lora-fair", {"lam": float("nan")}, ("strategy.options lam", "nan", "finite")),
        ("ffa", {"init_a": "zeros"}, ("strategy.init-a", "'zeros'", *INIT_A)),
        ("flora", {"init_a": "pissa"}, ("strategy.init-a", "'pissa'", "flora draws a new A", *DRAWN)),
        ("ffa", {"init_a": 3}, ("strategy.options init_a", "3", "str")),
    ],
)
def test_refusals_are_one_line_with_key_value_and_way_out(
    name: str, options: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as error:
        make_rule(name, options)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in named), text


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("init_a", DRAWN)
def test_a_run_starts_from_a_seeded_a_and_an_empty_product(name: str, init_a: str) -> None:
    template = Template(modules={"x": ModuleSpec(out_features=5, in_features=7)}, rank=2, scaling=1.0)
    rule = make_rule(name, {"init_a": init_a})
    states = [rule.init(template, seed) for seed in (1, 1, 2)]
    first, again, other = (state.adapters["x"] for state in states)
    assert isinstance(first, LoraFactors)
    assert (first.A.shape, first.B.shape, first.delta().any().item()) == ((2, 7), (5, 2), False)
    assert first.A.equal(again.A)
    assert not first.A.equal(other.A)
    assert states[0].base == ()
