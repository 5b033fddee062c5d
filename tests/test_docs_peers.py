"""What ``docs/coming-from.md`` says of other libraries is in the versions of them that are installed."""

from __future__ import annotations

import inspect
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


def words(section: str) -> Iterator[str]:
    """What stands in backticks in the first column of a section."""
    body = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    for cell in re.findall(r"^\| ([^|]+) \|", body, re.M):
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
