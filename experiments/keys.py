"""Reference of all keys in ``docs/keys.md``, made from the sections and the sentences under their fields.

python -m experiments.keys
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from clients.node_settings import NodeSettings
from experiments.marked import markdown, remade
from fedlora.config import ClientGroup, RunConfig
from fedlora.config.section import kebab
from fedlora.core.files import write_atomic

PAGE = Path(__file__).parents[1] / "docs" / "keys.md"
KINDS = {"integer": "whole number", "number": "number", "string": "string", "boolean": "true or false"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
EXAMPLE = re.compile(r"for instance ``(.+?)``")


def keys() -> str:
    """A heading and a Markdown table for each section of a run's configuration."""
    return "\n\n".join(f"## {_heading(name)}\n\n{table(kind)}" for name, kind in sections().items())


def groups() -> str:
    """The table of what an entry of ``client-groups`` may say."""
    return table(ClientGroup)


def node() -> str:
    """The table of a ``node.toml``."""
    return table(NodeSettings)


MADE = {"keys": keys, "groups": groups, "node": node}


def sections() -> dict[str, Any]:
    """The sections of a configuration by name; that of the keys outside of all tables is ``""``."""
    config = RunConfig()
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {"": RunConfig} | {n: type(part) for n, part in parts.items() if dataclasses.is_dataclass(part)}


def table(kind: Any) -> str:
    """Key, what it takes, default, meaning and an example of each field that is no section."""
    schema = TypeAdapter(kind).json_schema()["properties"]
    said = sentences(kind)
    rows = [
        [f"`{kebab(name)}`", accepted(about), _value(about), _in_markdown(said[name]), f"`{example}`"]
        for name, about in schema.items()
        if "$ref" not in about
        for example in [f"{kebab(name)} = {json.dumps(example_of(about, said[name]), ensure_ascii=False)}"]
    ]
    return markdown(["key", "takes", "default", "meaning", "example"], rows)


def accepted(about: dict[str, Any]) -> str:
    """The values of a field, from its JSON schema.

    >>> accepted({"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0})
    'number >= 0, < 1'
    """
    about = about.get("anyOf", [about])[0]
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    bounds = [f"{sign} {about[name]:g}" for name, sign in BOUNDS.items() if name in about]
    return " ".join([KINDS[about["type"]], *([", ".join(bounds)] if bounds else [])])


def example_of(about: dict[str, Any], sentence: str) -> Any:
    """A value for the table: the sentence's own, another choice than the default, or the default."""
    found = EXAMPLE.search(sentence)
    if found:
        return found[1] if about.get("anyOf", [about])[0]["type"] == "string" else json.loads(found[1])
    choices = [value for value in about.get("enum", ()) if value != about.get("default")]
    return {"boolean": True}.get(about.get("type", ""), choices[0] if choices else about.get("default"))


def sentences(kind: Any) -> dict[str, str]:
    """The string under each field of a class, on one line.

    >>> from fedlora.config import EngineConfig
    >>> sentences(EngineConfig)["num_actors"]
    'Client processes; 0 means as many as the CPUs and GPUs hold.'
    """
    (body,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def _heading(section: str) -> str:
    return f"`[{section}]`" if section else "The run"


def _value(about: dict[str, Any]) -> str:
    if about.get("default") is None:
        return ""
    return f"`{json.dumps(about['default'])}`"


def _in_markdown(sentence: str) -> str:
    return sentence.replace("``", "`").replace("|", "\\|")


def main() -> None:
    """Write the tables into the page."""
    write_atomic(PAGE, remade(PAGE.read_text(), MADE))


if __name__ == "__main__":
    main()
