"""The reference of keys is today's, and what it shows is accepted."""

from __future__ import annotations

import tomllib

import pytest

from experiments.keys import MADE, PAGE, keys
from experiments.marked import remade
from fedlora.config import RunConfig, from_flat, to_flat


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert remade(text, MADE) == text, "run python -m experiments.keys"


def examples() -> dict[str, object]:
    """The example of each key, from the tables."""
    found: dict[str, object] = {}
    section = ""
    for line in keys().splitlines():
        if line.startswith("## "):
            section = line.strip("# `[]") + "." if "[" in line else ""
        elif line.startswith("| `"):
            [(key, value)] = tomllib.loads(line.rpartition(" | `")[2].removesuffix("` |")).items()
            found[section + key] = value
    return found


WITH: dict[str, dict[str, object]] = {
    "privacy.clip-shares": {"privacy.mode": "example", "privacy.clipping": "per-layer"},
    "devices.staleness": {"devices.buffer-size": 2},
    "secure.noise": {"secure.mode": "sums", "privacy.mode": "client"},
    "secure.sketch-size": {"secure.mode": "sums"},
}
"""What a key alone would contradict."""


@pytest.mark.parametrize(("key", "value"), examples().items())
def test_every_key_has_an_example_that_says_something_and_is_accepted(key: str, value: str) -> None:
    flat = {"data.num-partitions": 2, **WITH.get(key, {}), key: value}
    assert to_flat(from_flat(flat))[key] == value
    assert value != ""


def test_no_key_is_missing() -> None:
    assert list(examples()) == list(to_flat(RunConfig()))
