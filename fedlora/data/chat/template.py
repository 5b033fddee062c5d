"""Chat templates: how a conversation is written as text, by Jinja or plainly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, TypeAlias

from fedlora.config import RunConfig
from fedlora.data.chat.conversations import Turn
from fedlora.errors import ConfigError, first_line

Render: TypeAlias = Callable[[Sequence[Turn], bool], str]
"""Turns, and whether an answer is to follow -> text."""
TODAY = date(2024, 7, 26)
"""The day that templates are told, so that a conversation is the same text on every day and node."""
_FORMATS = (
    "-d",
    "-m",
    "a",
    "A",
    "b",
    "B",
    "c",
    "d",
    "H",
    "I",
    "j",
    "m",
    "M",
    "p",
    "S",
    "x",
    "X",
    "y",
    "Y",
    "Z",
)


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Settings by which conversations become examples; the defaults leave all to the tokenizer.

    Attributes:
        template: a Jinja template in place of the tokenizer's own; empty for its own.
        kwargs: variables for the template beside the messages.
        assistant_loss: ``all``: each answer is learned; ``last``: the last one of a conversation.
    """

    template: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    assistant_loss: str = "all"

    @property
    def identity(self) -> str:
        """Differs where conversations become other tokens; empty for the defaults."""
        return "" if self == ChatSettings() else json.dumps(asdict(self), sort_keys=True)


def chat_settings(config: RunConfig) -> ChatSettings:
    """Chat settings of a run."""
    model = config.model
    return ChatSettings(model.chat_template, model.template_variables, config.data.assistant_loss)


def writes_date(template: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a template may ask for today's date; many take a ``date_string`` instead."""
    return "strftime_now" in template and "date_string" not in kwargs


def by_template(
    template: str, variables: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], where: str
) -> Render:
    """Writes turns as transformers does by a template, but `TODAY` is its date.

    Args:
        template: Jinja.
        variables: the tokenizer's special tokens by name, and the user's.
        tools: schemas of the functions that an answer may call.
        where: the conversation, in an error.

    The function raises:
        ConfigError: the template refuses the turns.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    text = _dated(template)

    def render(turns: Sequence[Turn], ask: bool) -> str:
        try:
            found, _ = render_jinja_template(
                conversations=[[turn.message for turn in turns]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=text,
                add_generation_prompt=ask,
                **variables,
            )
        except Exception as error:  # whatever a template does with what it did not expect
            raise ConfigError(
                f"{where}: the chat template refuses it ({first_line(error)}); change the row, or set "
                "model.chat-template"
            ) from None
        return str(found[0])

    return render


def plainly(end: str, where: str) -> Render:
    """Writes turns line by line, ``User: ...`` and ``Assistant: ...``, the end text after each answer.

    The function raises:
        ConfigError: a turn with more than text.
    """

    def render(turns: Sequence[Turn], ask: bool) -> str:
        for turn in turns:
            if turn.content is None or "tool_calls" in turn.fields:
                raise ConfigError(f"{where}: calls tools, and the model has no chat template to write that")
        lines = [
            f"Assistant: {turn.content}{end}"
            if turn.role == "assistant"
            else f"{turn.role.capitalize()}: {turn.content}\n"
            for turn in turns
        ]
        return "".join(lines) + ("Assistant:" if ask else "")

    return render


def check_chat(config: RunConfig) -> None:
    """Refuse settings of conversations where there are none, and a template that is no Jinja.

    Raises:
        ConfigError: another task than instruction, or a syntax error, with its line.
    """
    settings = chat_settings(config)
    if config.task != "instruction" and settings.identity:
        raise ConfigError(
            f"task = {config.task!r}: model.chat-template, model.chat-template-kwargs and "
            "data.assistant-loss are for conversations, task = 'instruction'"
        )
    if settings.template:
        _check_syntax(settings.template)


def _check_syntax(template: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[[{"role": "user", "content": "a"}]], chat_template=template)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"model.chat-template: line {error.lineno} is no Jinja ({first_line(error)})"
        ) from None
    except Exception:  # a template may refuse this conversation, and take those of the data
        return


def _dated(template: str) -> str:
    """The template with a ``strftime_now`` of its own, which knows one day.

    Blocks swallow the line break after them, so that what follows is as if it stood alone.
    """
    if "strftime_now" not in template:
        return template
    replaced = "".join(f" | replace('%{code}', '{TODAY.strftime('%' + code)}')" for code in _FORMATS)
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
