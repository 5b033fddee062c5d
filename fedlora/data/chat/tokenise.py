"""From a conversation to tokens, of which those that the model is to generate are marked.

An answer is trained as it would be generated: the tokens before it are those of its generation prompt, the
tokens of a sequence are the tokenizer's own for the whole text, and what counts is the answer and its end
mark. Answers share a sequence as long as the chat template leaves earlier turns as they were; where it
rewrites them (it drops earlier thoughts), the next answer begins a sequence of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

from fedlora.data.chat.conversations import Conversation, Turn
from fedlora.data.chat.template import ChatSettings, Render, by_template, plainly
from fedlora.errors import ConfigError

SENTINEL = "answer-7a1c"
"""Stands for an answer where only the text around it is looked at."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold what was thought before the answer."""


class ChatTokenizer(Protocol):
    """Writer of conversations as tokens."""

    settings: ChatSettings

    @property
    def end_text(self) -> str:
        """Stand-in for the token that ends a text, as `pieces` reads it."""

    @property
    def opening(self) -> Sequence[int]:
        """The ids that the tokenizer itself puts before a text."""

    @property
    def marks(self) -> frozenset[int]:
        """The ids of tokens that no text is made of: end of turn, end of text, ..."""

    @property
    def variables(self) -> Mapping[str, Any]:
        """The special tokens by the names under which chat templates know them."""

    def template(self, tools: bool) -> str | None:
        """The chat template, that for conversations with tools if there is another one."""

    def pieces(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text, whole and without specials."""

    def spans(self, text: str) -> Sequence[tuple[int, int]] | None:
        """First and one past the last character of each token; None where the tokenizer cannot say."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; specials are left out."""


@dataclass(slots=True)
class ChatTokens:
    """Tokens of one sequence.

    Attributes:
        ids: the tokens.
        counted: for each whether it is the assistant's and learned.
        merged: an answer's first token holds the end of its prompt too, so that it cannot be generated so.
    """

    ids: list[int]
    counted: list[bool]
    merged: bool = False


@dataclass(slots=True)
class _Text:
    """A text, and for each answer the tokens up to it and the text with it."""

    whole: str
    answers: list[tuple[str, list[int], str]] = field(default_factory=list)


def sequences(
    conversation: Conversation, tokenizer: ChatTokenizer, where: str, max_length: int | None = None
) -> list[ChatTokens]:
    """The sequences of a conversation, in its order, not cut; those without a counted token are left out.

    An answer with which a conversation begins has no prompt and is not learned.

    Args:
        conversation: at least one turn is the assistant's.
        tokenizer: with settings.
        where: the conversation, in an error.
        max_length: answers that begin behind so many tokens are not looked at.

    Raises:
        ConfigError: the chat template refuses the conversation, leaves a part of it out, or asks for
            something that the answer does not begin with.
    """
    render, opening = _writer(conversation, tokenizer, where)
    turns = conversation.turns
    answers = [k for k, turn in enumerate(turns) if k and turn.role == "assistant" and turn.learned]
    texts: list[_Text] = []
    for k in answers if tokenizer.settings.assistant_loss == "all" else answers[-1:]:
        asked, answered = _answer(turns, k, render, f"{where}, message {k + 1}")
        before = tokenizer.pieces([asked])[0]
        if max_length is not None and len(opening) + len(before) >= max_length:
            break
        if not texts or not asked.startswith(texts[-1].whole):
            texts.append(_Text(""))
        texts[-1].answers.append((asked, before, answered))
        texts[-1].whole = answered
    if texts and (whole := render(turns, False)).startswith(texts[-1].whole):
        texts[-1].whole = whole
    found = [_tokens(text, tokenizer, opening) for text in texts]
    return [tokens for tokens in found if any(tokens.counted)]


def asked(turns: Sequence[Turn], tokenizer: ChatTokenizer, where: str) -> list[int]:
    """Tokens of turns and of the prompt for the answer to them, as they are trained on.

    Raises:
        ConfigError: the chat template refuses the turns, or leaves one out.
    """
    render, opening = _writer(Conversation(tuple(turns)), tokenizer, where)
    return [*opening, *tokenizer.pieces([render(turns, True)])[0]]


def _writer(conversation: Conversation, tokenizer: ChatTokenizer, where: str) -> tuple[Render, Sequence[int]]:
    """Renderer of the conversation's turns, and the ids before the text; refuses what it would leave out.

    A template writes the first token itself where the model wants one.
    """
    settings, turns, tools = tokenizer.settings, conversation.turns, conversation.tools
    template = settings.template or tokenizer.template(bool(tools))
    if not template:
        if tools:
            raise ConfigError(f"{where}: has tools, and the model has no chat template to write them")
        render = plainly(tokenizer.end_text, where)
    else:
        variables = {**tokenizer.variables, **settings.kwargs}
        render = by_template(template, variables, tools, where)
        without = by_template(template, variables, (), where)
        if tools and render(turns, False) == without(turns, False):
            raise ConfigError(f"{where}: the chat template leaves out its tools, set model.chat-template")
    context = [
        (n, turn) for n, turn in enumerate(turns, start=1) if turn.role in ("system", "developer", "tool")
    ]
    text = render(turns, False) if context else ""
    for number, turn in context:
        if not _written(turn.content or "", text):
            raise ConfigError(
                f"{where}, message {number}: the chat template leaves it out, a message of role "
                f"{turn.role!r}; set model.chat-template"
            )
    return render, [] if template else tokenizer.opening


def _answer(turns: Sequence[Turn], k: int, render: Render, where: str) -> tuple[str, str]:
    """The generation prompt of an answer, and the text up to the answer's end, which begins with the prompt.

    Where the template drops a thought that the answer has, or its prompt opens one, the answer follows the
    prompt as it is and gets the end that the template gives to answers.
    """
    turn = turns[k]
    asked, answered = render(turns[:k], True), render(turns[: k + 1], False)
    if answered.startswith(asked):
        missing = _missing(turn, answered[len(asked) :])
        if not missing:
            return asked, answered
    else:
        missing = (
            f"begins without {asked[_common(asked, answered) :]!r}, with which its generation prompt ends"
        )
    continued = _continued(turns, k, asked, render)
    if continued is None or _missing(turn, continued[len(asked) :]):
        raise ConfigError(
            f"{where}: as the chat template writes it the answer {missing}; change the row (a thought is "
            "written <think> .. </think> before the answer), or set model.chat-template or "
            "model.chat-template-kwargs"
        )
    return asked, continued


def _continued(turns: Sequence[Turn], k: int, asked: str, render: Render) -> str | None:
    """The prompt, the answer as it is and an answer's end; None where the one does not continue the other."""
    content = turns[k].content
    if content is None:
        return None
    probe = render([*turns[:k], Turn("assistant", SENTINEL)], False)
    head, found, end = probe.partition(SENTINEL)
    if not found or not asked.startswith(head):
        return None
    opened = asked[len(head) :].strip()
    said = content.lstrip()
    closing = opened.replace("<", "</", 1).replace("[", "[/", 1)
    if said.startswith(opened):
        said = said[len(opened) :]
    elif closing not in said:
        return None
    return asked + (said.lstrip() if asked[-1:].isspace() else said) + end


def _missing(turn: Turn, text: str) -> str:
    """Parts of an answer that a text lacks, in words; empty where nothing is missing."""
    for key in THOUGHTS:
        if not _written(str(turn.fields.get(key, "")), text):
            return f"lacks its {key}"
    for call in turn.fields.get("tool_calls", ()):
        if call["function"]["name"] not in text:
            return f"lacks the call of {call['function']['name']!r}"
    thought, closed, _ = (turn.content or "").partition("</think>")
    if closed and not _written(thought.rpartition("<think>")[2], text):
        return "lacks its thought"
    return ""


def _written(part: str, text: str) -> bool:
    """Whether a text holds a part, blanks around it aside, as it is or as JSON."""
    bare = part.strip()
    return bare in text or json.dumps(bare, ensure_ascii=False)[1:-1] in text


def _tokens(text: _Text, tokenizer: ChatTokenizer, opening: Sequence[int]) -> ChatTokens:
    ids = tokenizer.pieces([text.whole])[0]
    found = ChatTokens(ids=[*opening, *ids], counted=[False] * (len(opening) + len(ids)))
    for asked, before, answered in text.answers:
        start = _common(before, ids)
        if start < len(before):  # the prompt's last characters share a token with what follows
            found.merged = True
            ends = [end for _, end in tokenizer.spans(text.whole) or ()]
            start = max(start, next((n for n, end in enumerate(ends) if end > len(asked)), len(ends)))
        last = len(ids) if answered == text.whole else _common(tokenizer.pieces([answered])[0], ids)
        end = _end(ids, start, last, tokenizer)
        for position in range(len(opening) + start, len(opening) + end):
            found.counted[position] = True
    return found


def _end(ids: Sequence[int], start: int, end: int, tokenizer: ChatTokenizer) -> int:
    """Without the blanks that a template writes behind an answer's end mark: nobody generates them."""
    marks = [i for i in range(start, end) if ids[i] in tokenizer.marks]
    if marks and not tokenizer.decode(ids[marks[-1] + 1 : end]).strip():
        return marks[-1] + 1
    return end


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of what two sequences begin with together."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class Chats:
    """Common interface of tokenizers that write conversations."""

    settings: ChatSettings

    def chat(self: ChatTokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation that is one sequence, and which of them count.

        Raises:
            ConfigError: it is several, or the chat template refuses it.
        """
        found = sequences(Conversation(tuple(turns)), self, "the conversation")
        if len(found) != 1:
            raise ConfigError(
                f"the conversation: is {len(found)} sequences, use fedlora.data.chat.tokenise.sequences"
            )
        return found[0].ids, found[0].counted
