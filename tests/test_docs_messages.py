"""Each message that the page on troubleshooting quotes is one of the code's own."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE, re.M)
GAP = "…"
"""Stands for what differs."""


def texts(node: ast.AST) -> str | None:
    """A string of the code with `GAP` for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) or GAP for part in node.values)
    return None


@cache
def raised() -> set[str]:
    """All strings of the product; those that an error is made of are among them."""
    packages = ("fedlora", "strategies", "clients")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    found = (texts(node) for file in files for node in ast.walk(ast.parse(file.read_text())))
    return {text for text in found if text}


def quoted_from(message: str, text: str) -> bool:
    """Whether a message is a string of the code, in which other strings may have been put."""
    return re.fullmatch(".*".join(map(re.escape, message.split(GAP))), text, re.S) is not None


@pytest.mark.parametrize("message", QUOTED)
def test_the_message_is_in_the_code(message: str) -> None:
    assert len(re.sub(r"\W", "", message)) >= 10, "too little of it to tell it from others"
    assert any(quoted_from(message, text) for text in raised())


def test_the_page_has_many_and_a_message_of_nobody_turns_red() -> None:
    assert len(QUOTED) >= 40
    assert not any(quoted_from("…: the moon is full", text) for text in raised())
