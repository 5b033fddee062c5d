"""What ``docs/coming-from.md`` says of other libraries is in the versions of them that are installed."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import flwr.serverapp.strategy
import flwr_datasets.partitioner
import opacus
import opacus.utils.batch_memory_manager
import peft
import pytest
import transformers

from fedlora.config import RunConfig, from_flat, to_flat
from fedlora.server.validate import check
from strategies.server_optimizer import SERVER_OPTIMIZERS
from tests.docs_commands import ROOT

PAGE = (ROOT / "docs" / "coming-from.md").read_text()
NAMESPACES: dict[str, tuple[Any, ...]] = {
    "Flower": (flwr.serverapp.strategy, flwr_datasets.partitioner, flwr.serverapp.strategy.FedAvg),
    "PEFT": (peft, peft.PeftModel, peft.LoraModel, transformers.BitsAndBytesConfig),
    "Opacus": (opacus, opacus.utils.batch_memory_manager, opacus.PrivacyEngine),
}
CALLS: dict[str, tuple[Callable[..., Any], ...]] = {
    "Flower": (),
    "PEFT": (peft.LoraConfig, transformers.BitsAndBytesConfig),
    "Opacus": tuple(
        getattr(opacus.PrivacyEngine, name)
        for name in ("__init__", "make_private", "make_private_with_epsilon")
    ),
}
"""Whose arguments stand on the page without them."""
PARTS = ("AutoPeftModelFor", "SecAgg")
"""Beginnings of names that the page leaves open."""
ELSEWHERE = {"client_resources_num_cpus": "of a federation's configuration, no Python"}


def rows(section: str) -> Iterator[tuple[str, str]]:
    """The two columns of a section."""
    body = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    yield from re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.M)


def words(section: str) -> Iterator[str]:
    """What stands in backticks in the first column of a section."""
    for cell, _ in rows(section):
        yield from re.findall(r"`([^`]+)`", cell)


def parameters(of: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(of).parameters)


def told(section: str) -> list[tuple[str, list[str]]]:
    """Names with the keyword arguments that they are shown with."""
    found = []
    for word in words(section):
        name = re.match(r"[A-Za-z_]\w*", word)
        if name and not word.startswith(("flwr ", "num-", "..")):
            found.append((name[0], re.findall(r"(\w+)=", word[name.end() :])))
    return found


@pytest.mark.parametrize("section", NAMESPACES)
def test_names_and_arguments_are_there(section: str) -> None:
    bare = {name for call in CALLS[section] for name in parameters(call)}
    shown = told(section)
    assert len(shown) > 8
    for name, keywords in shown:
        if name in bare or name in ELSEWHERE or name.startswith(PARTS):
            continue
        homes = [home for home in NAMESPACES[section] if hasattr(home, name)]
        assert homes, f"{section} has no {name}"
        missing = set(keywords) - parameters(getattr(homes[0], name))
        assert not missing, f"{name} of {section} takes no {missing}"


@pytest.mark.parametrize("section", [*NAMESPACES, "pfl-research"])
def test_keys_and_their_values_are_taken_here(section: str) -> None:
    cells = [cell for _, there in rows(section) for cell in re.findall(r"`([^`]+)`", there)]
    known, given = (
        to_flat(RunConfig()),
        [re.fullmatch(r"([a-z-]+\.(?!jsonl)[a-z-]+)(?: = (.+))?", c) for c in cells],
    )
    assert sum(match is not None for match in given) > 4
    for key, value in (match.groups() for match in given if match):
        assert key in known
        if value is not None:
            check(from_flat({key: json.loads(value)}))


def test_flowers_server_optimisers_are_here_or_said_not_to_be() -> None:
    for theirs, here in rows("Flower"):
        if "server-optimizer" not in here:
            continue
        called = [name.lower() for name in re.findall(r"`(\w+)`", theirs)]
        if here.startswith("no such"):
            assert not set(called) & set(SERVER_OPTIMIZERS)
        else:
            assert called == re.findall(r"\"(\w+)\"", here)
