"""``fedlora predict`` and ``chat``: an adapter, used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import err, one_line_errors, percent, write_line

if TYPE_CHECKING:
    from fedlora.evaluation.loaded import Prediction

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Directory of an adapter that a run wrote.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens that are written at most.")]


@one_line_errors
def predict(
    adapter: Adapter,
    given: Annotated[
        str,
        typer.Argument(
            metavar="TEXT|FILE",
            help="A text; a jsonl, csv, tsv, parquet or txt file; a picture or their directory.",
        ),
    ],
    text_column: Annotated[str, typer.Option(help="Column with the text, two for pairs.")] = "text",
    max_new_tokens: Tokens = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each text.")] = False,
) -> None:
    """Labels of texts or pictures, or how a language model goes on.

    Example: fedlora predict runs/demo/flora/adapter "a wonderful film"
    """
    from fedlora.evaluation.items import items_of
    from fedlora.study import library

    loaded = library.load(adapter)
    items = items_of(given, text_column, pictures=loaded.of_pictures)
    if not loaded.card.label_names:
        for item in items:
            written = loaded.generate(item, max_new_tokens=max_new_tokens)
            _say(item, written, {"written": written}, as_json)
        return
    for item, found in zip(items, loaded.predict(items), strict=True):
        shown = " | ".join(item) if isinstance(item, tuple) else str(item)
        _say(item, f"{_words(found)}  {shown}", _keys(found), as_json)


@one_line_errors
def chat(
    adapter: Adapter,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told at first.")] = "",
    max_new_tokens: Tokens = 256,
) -> None:
    """Talk to a language model: a line is a message; an empty line or Ctrl-D ends, /new begins anew.

    Example: fedlora chat runs/chat/adapter
    """
    from fedlora.errors import ConfigError
    from fedlora.study import library

    loaded = library.load(adapter)
    if loaded.card.label_names:
        raise ConfigError(f"{adapter}: a classifier, ask it by fedlora predict")
    begin = [{"role": "system", "content": system}] if system else []
    messages: list[dict[str, Any]] = list(begin)
    for line in _lines():
        if line == "/new":
            messages = list(begin)
            continue
        messages.append({"role": "user", "content": line})
        answer = loaded.generate(messages, max_new_tokens=max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
        write_line(answer)


def _lines() -> Any:
    """The lines of a person or a pipe until an empty one."""
    while True:
        if sys.stdin.isatty():
            err.print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _words(found: Prediction) -> str:
    """A prediction for people."""
    if found.values:
        return ", ".join(f"{name} {value:.4g}" for name, value in found.values.items())
    labels = [f"{name} {percent(found.probabilities[name])}" for name in found.labels]
    return ", ".join(labels) or "none"


def _keys(found: Prediction) -> dict[str, Any]:
    """A prediction for programs."""
    if found.values:
        return {"values": found.values}
    first = {"label": found.label, "probability": found.probability}
    return {**first, "labels": found.labels, "probabilities": found.probabilities}


def _say(item: Any, words: str, keys: dict[str, Any], as_json: bool) -> None:
    """One line: what was found, and of what."""
    if as_json:
        given = list(item) if isinstance(item, tuple) else str(item)
        words = json.dumps({"given": given, **keys}, ensure_ascii=False)
    write_line(words)
