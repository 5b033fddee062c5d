"""The picture of the code is today's, and the code keeps to its floors."""

from __future__ import annotations

import tomllib

import pytest

from experiments.house import PAGE, ROOT, floors, needed, picture, room_of, rooms
from experiments.marked import remade


def test_the_picture_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert remade(text, {"house": picture}) == text, "run python -m experiments.house"


def test_rooms_import_in_one_direction_over_at_most_twelve_floors() -> None:
    assert len(floors(rooms())) <= 12


def test_few_files_lie_outside_of_rooms() -> None:
    assert len(list((ROOT / "fedlora").glob("*.py"))) <= 10


def test_every_room_is_explained_on_the_page() -> None:
    text = PAGE.read_text()
    assert [room for room in rooms() if f"| `{room}" not in text] == []


def test_the_contract_of_imports_knows_every_room() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    held = {room_of(name.strip()) for layer in contracts[0]["layers"] for name in layer.split("|")}
    assert held == set(rooms())


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match=r"circle of imports among \['a', 'b'\]"):
        floors({"a": {"b"}, "b": {"a"}, "c": set()})


def test_an_arrow_that_a_longer_way_replaces_is_left_out() -> None:
    assert needed({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
