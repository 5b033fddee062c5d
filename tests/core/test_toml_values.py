"""Lists and tables of TOML are the comma strings and the JSON that they stand for."""

from __future__ import annotations

import tomllib

import pytest

from fedlora.config import flatten, from_flat, parse_overrides
from fedlora.errors import ConfigError

SAME = {
    "a list of numbers": ("[lora]\nranks = [2, 4, 8]", '[lora]\nranks = "2,4,8"'),
    "a list of names": (
        '[lora]\ntarget-modules = ["query", "value"]', '[lora]\ntarget-modules = "query,value"',
    ),
    "no names": ("[lora]\nranks = []", '[lora]\nranks = ""'),
    "an inline table": (
        '[strategy]\nname = "lora-fair"\noptions = {lam = 0.5, norm = "plain"}',
        '[strategy]\nname = "lora-fair"\noptions = \'{"lam": 0.5, "norm": "plain"}\'',
    ),
    "a table": (
        "[lora.method-options]\nn_frequency = 500", '[lora]\nmethod-options = \'{"n_frequency": 500}\'',
    ),
    "tables in a list": (
        '[[client-groups]]\npartitions = "0"\nrank = 2\n[[client-groups]]\npartitions = "1"\nrank = 4',
        'client-groups = \'[{"partitions": "0", "rank": 2}, {"partitions": "1", "rank": 4}]\'',
    ),
    "runs of a study": (
        '[study.variants.private]\nstrategy.name = "ffa"\nlora.ranks = [2, 4]',
        '[study]\nvariants = \'{"private": {"strategy.name": "ffa", "lora.ranks": "2,4"}}\'',
    ),
    "rates": ("[study]\ntune-learning-rates = [0.003, 1e-2]", '[study]\ntune-learning-rates = "0.003,0.01"'),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_both_spellings_are_one_configuration(what: str) -> None:
    native, text = (flatten(tomllib.loads(spelling)) for spelling in SAME[what])
    assert native == text
    if what not in ("a table", "rates", "runs of a study"):  # which need more keys beside them
        assert from_flat(native) == from_flat(text)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[lora]\nrank = [4]", r"lora\.rank = \[4\]: must be a boolean, number or string"),
        ('[lora]\nranks = ["2,4"]', "cannot stand in a list"),
        ("[lora]\nranks = [true]", "True cannot stand in a list"),
        ("seed = 1979-05-27", "must be a boolean, number or string"),
        ("[strategy]\noptions = {since = 1979-05-27}", "which no key takes"),
        ("[lora.rnak]\nx = 1", r"lora\.rnak\.x = 1: unknown key"),
        ("[train.learning-rate]\nx = 1", r"train\.learning-rate\.x = 1: unknown key"),
    ],
)
def test_what_no_key_takes_is_refused_by_name(toml: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_flat(flatten(tomllib.loads(toml)))


def test_the_command_line_takes_both_too() -> None:
    for given in ("strategy.options={lam = 0.5}", 'strategy.options={"lam": 0.5}'):
        assert parse_overrides([given]) == {"strategy.options": '{"lam": 0.5}'}
    assert parse_overrides(["lora.ranks=[2, 4]"]) == parse_overrides(["lora.ranks=2,4"])
