"""Instruction runs: keys of conversations, rows in errors, and what a run says of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import from_flat, read_config
from fedlora.data.built_in_tokenizers import ByteTokenizer
from fedlora.data.chat.template import ChatSettings, chat_settings
from fedlora.errors import ConfigError, OwnDataRefused
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.prepared.node_data import OwnData, own_data
from fedlora.server.validate import check
from fedlora.tasks import task_named
from fedlora.tasks.instruction import Instruction
from tests.data.chat_models import QWEN_THINKING
from tests.tasks.test_language import counted_text, jsonl, lm_config

MARKED = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{{ 'a:' if add_generation_prompt }}"
)
REFUSING = "{% if messages[0].content == 'Say 3' %}{{ raise_exception('not that one') }}{% endif %}" + MARKED


def talk(number: int, more: bool = False) -> list[dict[str, str]]:
    found = [
        {"role": "user", "content": f"Say {number}"},
        {"role": "assistant", "content": f"It is {number}."},
    ]
    return (
        [*found, {"role": "user", "content": "More"}, {"role": "assistant", "content": "No."}]
        if more
        else found
    )


def config(path: Path, rows: list[Any], **keys: Any) -> Any:
    name = jsonl(path / "a.jsonl", [{"messages": row, "domain": "ab"[i % 2]} for i, row in enumerate(rows)])
    return lm_config("instruction", **{"data.name": name, "data.max-length": 200, **keys})


def prepared(path: Path, rows: list[Any], **keys: Any) -> Prepared:
    return open_prepared(prepare(config(path, rows, **keys)))


def test_a_template_in_a_file_is_part_of_the_run(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "own.jinja").write_text(MARKED)
    file = tmp_path / "run.toml"
    file.write_text(
        f'task = "instruction"\n[model]\nname = "tiny-lm"\nchat-template = "{tmp_path}/own.jinja"\n'
    )
    assert read_config(file).model.chat_template == MARKED
    with pytest.raises(
        ConfigError, match=r"model\.chat-template = 'gone\.jinja': neither a template nor a file"
    ):
        read_config(file, {"model.chat-template": "gone.jinja"})
    with pytest.raises(ConfigError, match="no file that can be read here, and no Jinja template"):
        from_flat({"model.chat-template": "own.jinja"})
    data = prepared(tmp_path, [talk(n) for n in range(9)], **{"model.chat-template": MARKED})
    text = ByteTokenizer().decode(data.train.input_ids(0).tolist())
    assert text.startswith("u:Say ")
    assert "a:It is" in text
    assert counted_text(data, 0).startswith("It is")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model.chat-template": "{% if %}"}, r"model\.chat-template: line 1 is no Jinja"),
        ({"model.chat-template-kwargs": "[1]"}, r"model\.chat-template-kwargs = .*must be a JSON object"),
        ({"data.assistant-loss": "first"}, r"data\.assistant-loss = 'first': accepted are all, last"),
        ({"task": "causal-lm", "data.assistant-loss": "last"}, "are for conversations, task = 'instruction'"),
    ],
)
def test_keys_of_conversations_are_checked_before_anything(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(lm_config(**{"task": "instruction", **keys}))


def test_a_row_that_the_template_refuses_is_named_by_its_place_in_the_file(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data: row 4: the chat template refuses it \(not that one\)"):
        prepared(tmp_path, [talk(n) for n in range(9)], **{"model.chat-template": REFUSING})
    own = OwnData(
        path=str(tmp_path / "a.jsonl"),
        label_column="",
        dataset_id="x",
        partition_id=0,
        home=tmp_path / "home",
    )
    with pytest.raises(OwnDataRefused, match=r"row 4: the chat template refuses it"):
        own_data(own, "tiny-lm", 64, task_named("instruction"), ChatSettings(template=REFUSING))


def test_an_own_template_is_the_nodes_too(tmp_path: Path, cache: Path) -> None:
    rows = [talk(n) for n in range(9)]
    run = config(tmp_path, rows, **{"model.chat-template": MARKED})
    own = OwnData(path=run.data.name, label_column="", dataset_id="x", partition_id=0, home=tmp_path / "home")
    found = own_data(own, "tiny-lm", 200, task_named("instruction"), chat_settings(run))
    assert counted_text(found, 0) == "It is 0."


@pytest.mark.parametrize(("loss", "examples"), [("all", 3), ("last", 2)])
def test_thoughts_that_a_template_drops_make_several_examples_with_one_warning(
    loss: str, examples: int
) -> None:
    thinking = talk(0, more=True)
    for turn in thinking[1::2]:
        turn["content"] = f"<think>\nhm\n</think>\n\n{turn['content']}"
    tokenizer = ByteTokenizer(ChatSettings(template=QWEN_THINKING, assistant_loss=loss))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Instruction().encode([{"text": [json.dumps(thinking), json.dumps(talk(1))]}], tokenizer, 400)
    assert len(found.values) == examples
    assert found.rows.tolist() == [0, 0, 1][-examples:]
    assert [str(w.message)[:34] for w in caught] == ["data.assistant-loss = 'all': 2 con"][: examples - 2]


def test_a_cut_answer_keeps_what_stands_before_the_cut() -> None:
    tokenizer = ByteTokenizer(ChatSettings(template=MARKED))
    found = Instruction().encode([{"text": [json.dumps(talk(1))]}], tokenizer, 14)
    ids, counted = found.values[0], (found.counted or [])[0].astype(bool)
    assert tokenizer.decode(ids.tolist()) == "u:Say 1a:It i"
    assert tokenizer.decode(ids[counted].tolist()) == "It i"
