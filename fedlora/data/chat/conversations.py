"""Conversations: the forms in which people keep them, read into turns and checked row by row.

| columns | form |
|---|---|
| ``messages`` or ``conversations`` | lists of ``{role, content}`` (OpenAI) or ``{from, value}`` (ShareGPT) |
| ``prompt`` and ``response`` or ``completion`` | texts, or such lists |
| ``instruction``, ``input`` (may be empty) and ``output`` | texts (Alpaca) |

A column ``tools`` beside them holds the functions that an answer may call. Contents in parts of type ``text``
are joined; other parts cannot be trained on here and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.data.values import described, unicode_text
from fedlora.errors import ConfigError

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool",
}  # fmt: skip
"""The names under which a side speaks, ShareGPT's included -> the role that a chat template knows."""
OWN_KEYS = ("role", "content", "from", "value", "weight", "tool_calls", "function_call")


@dataclass(frozen=True, slots=True)
class Turn:
    """Message of one side.

    Attributes:
        role: a value of `ROLES`.
        content: None where the assistant calls tools and says nothing.
        fields: what else the chat template is given of the message (``tool_calls``, ``name``, ..).
        learned: False of an answer with ``weight`` 0, which is not trained on.
    """

    role: str
    content: str | None
    fields: Mapping[str, Any] = field(default_factory=dict)
    learned: bool = True

    @property
    def message(self) -> dict[str, Any]:
        """The turn as chat templates take it; a content of None is left out."""
        said = {} if self.content is None else {"content": self.content}
        return {"role": self.role, **said, **self.fields}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the JSON schemas of the tools that answers may call; empty where there are none."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def dump(self) -> str:
        """As JSON: the messages, with tools an object of both."""
        messages = [turn.message | ({} if turn.learned else {"weight": 0}) for turn in self.turns]
        return json.dumps({"messages": messages, "tools": self.tools} if self.tools else messages)

    @classmethod
    def load(cls, text: str, where: str) -> Conversation:
        """Parses what `dump` wrote, or a JSON list of messages.

        Raises:
            ConfigError: it is no conversation; the message begins with ``where``.
        """
        found = json.loads(text)
        whole = found if isinstance(found, dict) else {"messages": found}
        return conversation(whole["messages"], whole.get("tools"), where)


def conversation(messages: Any, tools: Any, where: str) -> Conversation:
    """A conversation from the cells of a row, each a list or its JSON.

    Raises:
        ConfigError: it is no conversation, or has what a chat template cannot be given; the message begins
            with ``where``.
    """
    listed = _parsed(messages)
    if not isinstance(listed, list) or not all(isinstance(message, Mapping) for message in listed):
        raise ConfigError(
            f"{where}: holds {described(listed)}, must be a list of messages with role and content, "
            "or from and value"
        )
    turns = tuple(_turn(message, f"{where}: message {n}") for n, message in enumerate(listed, start=1))
    if not any(turn.role == "assistant" and turn.learned for turn in turns):
        raise ConfigError(f"{where}: has no turn of the assistant, nothing can be learned")
    found = Conversation(turns, _tools(tools, where))
    refuse_halves(found.turns, where)
    refuse_halves(found.tools, where)
    return found


def refuse_halves(value: Any, where: str) -> None:
    """Refuse half of a surrogate pair, which only JSON can hold, in a text or in any within a value.

    Raises:
        ConfigError: there is one; the message begins with ``where``.
    """
    if isinstance(value, str):
        try:
            unicode_text(value)
        except ValueError as error:
            raise ConfigError(f"{where}: holds {error}") from None
    elif isinstance(value, Turn):
        refuse_halves([value.content, value.fields], where)
    elif isinstance(value, Mapping):
        refuse_halves([*value, *value.values()], where)
    elif isinstance(value, (list, tuple)):
        for each in value:
            refuse_halves(each, where)


def prompted(prompt: Any, response: Any, tools: Any, where: str) -> Conversation:
    """A conversation from a prompt and a response, texts or lists of messages; the response alone is learned.

    Raises:
        ConfigError: as `conversation`.
    """
    before = messages_in(prompt) or [{"role": "user", "content": prompt}]
    after = messages_in(response) or [{"role": "assistant", "content": response}]
    return conversation([*map(_unlearned, before), *after], tools, where)


def _unlearned(message: Any) -> Any:
    answers = isinstance(message, Mapping) and _role(message) == "assistant"
    return {**message, "weight": 0} if answers else message


def messages_in(cell: Any) -> list[Any] | None:
    """The messages in a cell or its JSON; None where it is a text of its own, which may look like a list."""
    found = _parsed(cell)
    listed = found if isinstance(found, list) else []
    talks = listed and all(isinstance(part, Mapping) and {"role", "from"} & set(part) for part in listed)
    return listed if talks or isinstance(cell, list) else None


def _parsed(cell: Any) -> Any:
    """The list or object that a text of JSON stands for; other cells as they are."""
    if isinstance(cell, str) and cell.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


def _role(message: Mapping[str, Any]) -> str | None:
    name = message.get("from") if message.get("role") is None else message["role"]
    return ROLES.get(name) if isinstance(name, str) else None


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    role, weight = _role(message), message.get("weight")
    if role is None:
        name = message.get("from") if message.get("role") is None else message["role"]
        raise ConfigError(f"{where} has role {name!r}, accepted are {', '.join(ROLES)}")
    if message.get("function_call") is not None:
        raise ConfigError(f"{where} has a function_call, write it as tool_calls")
    if weight not in (None, 0, 1):
        raise ConfigError(f"{where} has weight {weight!r}, accepted are 0 (an answer not trained on) and 1")
    calls = [_call(call, where) for call in _parsed(message.get("tool_calls")) or []]
    said = message.get("value") if message.get("content") is None else message["content"]
    content = None if said is None and calls else _content(said, where)
    others = {key: value for key, value in message.items() if key not in OWN_KEYS and value is not None}
    fields = {**({"tool_calls": calls} if calls else {}), **others}
    return Turn(role, content, fields, learned=weight != 0)


def _content(content: Any, where: str) -> str:
    """The text, or the texts of all parts one after another."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"{where} has content of type {type(content).__name__}, must be text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise ConfigError(f"{where} has a content part of type {kind!r}, accepted is 'text'")
        texts.append(text)
    return "".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which chat templates expect; OpenAI has them as JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(f"{where} has a tool call without the name of a function")
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        raise ConfigError(f"{where} calls {function['name']!r} with arguments that are no JSON") from None
    if not isinstance(arguments, Mapping | None):
        raise ConfigError(f"{where} calls {function['name']!r} with arguments that are no object")
    outer = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments or {}}}


def _tools(cell: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    tools = _parsed(cell)
    if not tools:
        return ()
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConfigError(
            f"{where}: tools holds {described(tools)}, must be a list of JSON schemas of functions"
        )
    return tuple(tools)
