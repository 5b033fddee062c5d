"""Conversations in the forms in which people keep them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedlora.config import DataConfig
from fedlora.data.chat.columns import conversation_texts, usual_columns
from fedlora.data.chat.conversations import Conversation
from fedlora.data.sources import load_examples
from fedlora.errors import ConfigError
from fedlora.tasks import task_named

ASKED, ANSWERED = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Two?"},
    {"from": "gpt", "value": "Four."},
]


def read(rows: list[dict[str, Any]], *texts: str) -> Any:
    table = Dataset.from_list(rows)
    found = conversation_texts(table, texts or usual_columns(table.column_names) or (), "'a.jsonl'")
    return {name: column.to_pylist() for name, column in found.items()}


def messages(text: str) -> list[dict[str, Any]]:
    return [turn.message for turn in Conversation.load(text, "row").turns]


def test_openai_and_sharegpt_are_the_same() -> None:
    openai = read([{"messages": [{"role": "system", "content": "Be kind."}, ASKED, ANSWERED]}])["messages"]
    assert openai == read([{"conversations": SHAREGPT}])["conversations"]
    assert messages(openai[0])[1:] == [ASKED, ANSWERED]


def test_alpaca_with_and_without_input() -> None:
    rows = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"instruction": "Say hi.", "input": "", "output": "Hi."},
        {"instruction": "Wave.", "input": None, "output": "o/"},
    ]
    assert read(rows) == {"instruction": ["Add.\n2 2", "Say hi.", "Wave."], "output": ["4", "Hi.", "o/"]}


def test_prompts_are_texts_even_where_they_look_like_lists() -> None:
    assert read([{"prompt": "[1, 2]", "completion": "{}"}]) == {"prompt": ["[1, 2]"], "completion": ["{}"]}


def test_of_a_prompt_of_messages_the_completion_alone_is_learned() -> None:
    (text,) = read([{"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]}])["prompt"]
    turns = Conversation.load(text, "row").turns
    assert [turn.learned for turn in turns if turn.role == "assistant"] == [False, True]


def test_parts_of_text_are_joined_and_tools_come_along() -> None:
    parts = [{"type": "text", "text": "Two"}, {"type": "text", "text": "?"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"default": None}}}]
    rows = [
        {"messages": json.dumps([{"role": "user", "content": parts}, ANSWERED]), "tools": json.dumps(tools)}
    ]
    found = Conversation.load(read(rows)["messages"][0], "row")
    assert [turn.message for turn in found.turns] == [ASKED, ANSWERED]
    assert list(found.tools) == tools


def test_arguments_are_those_of_the_row_and_an_object() -> None:
    def calling(**arguments: Any) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        return {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]}

    texts = read([calling(a=1), calling(b="x")])["messages"]
    found = [messages(text)[1]["tool_calls"][0]["function"]["arguments"] for text in texts]
    assert found == [{"a": 1}, {"b": "x"}]
    spelled = json.dumps(
        [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"c": null}'}]}]
    )
    (text,) = read([{"messages": spelled}])["messages"]
    assert messages(text)[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"c": None}}}
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has role 'robot'"),
        ({"messages": [ASKED]}, "no turn of the assistant"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, "no turn of the assistant"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "message 2 has weight 0.5"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": None}]},
            "message 2 has content of type NoneType",
        ),
        ({"messages": "[1]"}, "must be a list of messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]},
            "part of type 'image_url'",
        ),
        (
            {"messages": [ASKED, {"role": "assistant", "function_call": {"name": "f"}}]},
            "write it as tool_calls",
        ),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "without the name"),
        ({"messages": [ASKED, ANSWERED], "tools": "7"}, "tools holds"),
        ({"prompt": "", "completion": "x"}, "a prompt or response is empty"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_row(row: dict[str, Any], says: str) -> None:
    fine = {"messages": json.dumps([ASKED, ANSWERED]), "prompt": "x", "completion": "y", "tools": None}
    fine = {key: fine[key] for key in row}
    spelled = {key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in row.items()}
    with pytest.raises(ConfigError, match=rf"data\.text-column = .*: row 2 of 'a\.jsonl'.*{says}"):
        read([fine, spelled])


HALF = "so \ud83d"
TALK = [ASKED, {"role": "assistant", "content": HALF}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"messages": json.dumps(TALK)},
        {"messages": [{**ASKED, "name": HALF}, ANSWERED]},
        {"messages": [ASKED, ANSWERED], "tools": [{"name": HALF}]},
        {"prompt": HALF, "response": "b"},
        {"prompt": "a", "response": HALF},
        {"instruction": "a", "input": HALF, "output": "b"},
        {"prompt": "a", "chosen": HALF, "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": HALF},
        {"chosen": TALK, "rejected": [ASKED, ANSWERED]},
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_row(
    row: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    odd = json.dumps(row)
    (tmp_path / "a.jsonl").write_text(re.sub(r"so \\+ud83d", "so", odd) + "\n" + odd + "\n")
    task = task_named("dpo" if "chosen" in row else "instruction")
    config = DataConfig(name=str(tmp_path / "a.jsonl"), partitioner="iid", num_partitions=1)
    with pytest.raises(ConfigError, match=r"row 2 of .*holds half of a surrogate pair in .*which is no char"):
        load_examples(config, task.columns(config))
