"""The commands that the documentation shows, and whether this version would accept them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from typer.main import get_command

from clients.node_settings import NodeSettings, node_settings
from fedlora.cli import cli
from fedlora.config import FlatConfig, RunConfig, flatten, from_flat, parse_overrides, read_config, to_flat

ROOT = Path(__file__).parent.parent
OF_NODES = {key.name.replace("_", "-") for key in fields(NodeSettings)}
"""Keys of a ``node.toml``."""
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments").rglob("*.md")),
)
FOREIGN = {
    "ray": "starts a cluster, which outlives a test",
    "chown": "of the machines of a deployment", "cp": "of the machines of a deployment",
    "systemctl": "of the machines of a deployment",
    "docker": "there is no daemon; tests/deployment/test_compose.py carries out what compose.yaml says",
    "sbatch": "needs a cluster with Slurm",
    "vllm": "is no dependency, and was never run",
}  # fmt: skip
"""Programs that are not ours, and why no test runs them."""


@dataclass(frozen=True, slots=True)
class Command:
    """One line of a ``console`` block, without prompt and comment; ``page`` is its file's name."""

    page: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of one kind in a page."""
    return [body for name, body in re.findall(r"^```([\w-]*)\n(.*?)^```", text, re.S | re.M) if name == kind]


def commands() -> list[Command]:
    """All of them, in the order of the pages."""
    found = []
    for page in PAGES:
        for body in blocks(page.read_text(), "console"):
            lines = re.findall(r"^[$#] (.*)$", body.replace("\\\n", " "), re.M)
            found += [Command(page.name, tuple(shlex.split(line, comments=True))) for line in lines]
    return found


def verify(command: Command) -> None:
    """Whether the command could run as it stands, without running it.

    Raises:
        AssertionError: an unknown program, target, command or option.
        ConfigError: an unknown key or an impossible value.
    """
    environment = re.compile(r"[A-Z_]+=")
    words = [word for word in command.words if not environment.match(word)]
    words = words[: words.index(">")] if ">" in words else words
    program, arguments = Path(words[0]).name, words[1:]
    if program not in FOREIGN:
        assert program in CHECKS, f"{command.page}: {command.text}: nobody checks {program}"
        CHECKS[program](arguments)


def _fedlora(arguments: Sequence[str]) -> None:
    given = _parsed(get_command(cli), arguments)
    overrides = parse_overrides(list(given.get("set_") or ()))
    file = given.get("config")
    if str(file).startswith("experiments/"):
        read_config(ROOT / str(file), overrides)
    else:  # the reader's own file
        from_flat(overrides)


def _parsed(command: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command line, split as the program itself would."""
    rest = list(arguments)
    while hasattr(command, "commands"):
        assert rest, "a command is missing"
        assert rest[0] in command.commands, f"{rest[0]}: no such command"
        command = command.commands[rest.pop(0)]
    try:
        given: dict[str, Any] = command.make_context(command.name, rest).params
    except Exception as error:
        raise AssertionError(f"{shlex.join(arguments)}: {error}") from None
    return given


def _make(arguments: Sequence[str]) -> None:
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)


def _flwr(arguments: Sequence[str]) -> None:
    from flwr.cli.app import app

    given = _parsed(get_command(app), arguments)
    for file in given.get("run_config_overrides") or ():
        read_config(ROOT / file)


def _pip(arguments: Sequence[str]) -> None:
    """Installs what is here, with extras that exist."""
    command, *rest = arguments
    assert command == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, word in zip(["", *rest], rest, strict=False):
        if option == "--constraint":
            assert (ROOT / word).is_file(), word
        elif not word.startswith("--"):
            asked = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
            assert asked is not None, word
            assert set((asked[1] or "").split(",")) - {""} <= set(extras), word


def _python(arguments: Sequence[str]) -> None:
    assert arguments[0] == "-m", "only modules are run"
    assert importlib.util.find_spec(arguments[1]) is not None, f"{arguments[1]}: no such module"
    for word in arguments[2:]:
        assert not word.startswith(("tests/", "experiments/")) or (ROOT / word).exists(), word


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "fedlora": _fedlora, "make": _make, "flwr": _flwr, "pip": _pip, "python": _python,
}  # fmt: skip


# --- keys ---------------------------------------------------------------------------------------------


def keys_in_prose(text: str) -> Iterator[str]:
    """Keys of the configuration that stand in backticks, alone or with a value: `lora.rank = 4`."""
    sections = {key.split(".")[0] for key in to_flat(RunConfig()) if "." in key}
    for quoted in re.findall(r"`([^`\n]+)`", text):
        for section, name in re.findall(r"(?<![\w./-])([a-z]+)\.([a-z][a-z0-9-]*)(?![\w/.])", quoted):
            if section in sections and name not in ("md", "py", "toml", "json", "jsonl"):
                yield f"{section}.{name}"


def values_in_prose(text: str) -> Iterator[tuple[str, str]]:
    """Keys with a value in quotes: `lora.method = "vera"`; not those of a user's own, `module:Class`."""
    known = to_flat(RunConfig())
    for key, value in re.findall(r'`([a-z][a-z.-]*) = "([^"`]+)"`', text):
        if key in known and ":" not in value:
            yield key, value


def tables(text: str) -> Iterator[FlatConfig]:
    """The ``toml`` blocks of a page as flat configurations; a node's own are read here."""
    for body in blocks(text, "toml"):
        found = tomllib.loads(body)
        if "project" in found:  # the pyproject.toml of an app of one's own
            continue
        flat = flatten(found)
        if flat.keys() <= OF_NODES:
            node_settings({"partition-id": 0, **flat})
        else:
            yield flat
