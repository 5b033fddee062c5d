"""Language tasks: what an example is, what counts of it, and that no example knows the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.evaluation import evaluate
from fedlora.config import RunConfig
from fedlora.data.built_in_tokenizers import ByteTokenizer
from fedlora.data.examples import collate
from fedlora.errors import ConfigError
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.server.records import perplexity, summary
from fedlora.server.validate import check
from fedlora.tasks import TASKS
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.instruction import Instruction
from tests.conftest import tiny_config
from tests.models.language import adapted_lm
from tests.models.samples import random_adapters

TOKENIZER = ByteTokenizer()


def lm_config(task: str = "causal-lm", **overrides: Any) -> RunConfig:
    keys = {"task": task, "model.name": "tiny-lm", "data.max-length": 32}
    return tiny_config(**{**keys, **overrides})


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(**overrides: Any) -> Prepared:
    return open_prepared(prepare(lm_config(**overrides)))


def counted_text(data: Prepared, index: int) -> str:
    examples = data.train
    assert examples.counted is not None
    marks = examples.counted[examples.offsets[index] : examples.offsets[index + 1]]
    return TOKENIZER.decode(examples.input_ids(index)[marks.astype(bool)].tolist())


# --- blocks ------------------------------------------------------------------------------------------


def test_texts_of_one_domain_follow_each_other_and_never_meet_another() -> None:
    batches = [
        {"text": ["aaaa", "bbb"], "domain": ["x", "y"]},
        {"text": ["cc", "ddd"], "domain": ["x", "x"]},
    ]
    found = CausalLM().encode(batches, TOKENIZER, 5)
    texts = [TOKENIZER.decode(values.tolist()) for values in found.values]
    assert texts == ["aaaa", "ccdd", "d", "bbb"]  # the end token after each text takes a place
    assert [len(values) for values in found.values] == [5, 5, 2, 4]
    assert found.rows.tolist() == [0, 2, 3, 1]


def test_a_single_token_that_is_left_over_is_no_example() -> None:
    found = CausalLM().encode([{"text": ["abcde"]}], TOKENIZER, 5)
    assert [len(values) for values in found.values] == [5]
    with pytest.raises(ConfigError, match="no text of two tokens"):
        CausalLM().encode([{"text": [""]}], TOKENIZER, 5)


def test_clients_hold_blocks_of_their_own_texts(cache: Path, tmp_path: Path) -> None:
    rows = [{"text": who * (9 + n), "who": who} for who in "ab" for n in range(10)]
    data = prepared(**{"data.name": jsonl(tmp_path / "a.jsonl", rows), "data.partition-by": "who"})
    assert data.num_partitions == 2
    assert data.label_names == ()
    for partition, who in enumerate("ab"):
        texts = [TOKENIZER.decode(data.train.input_ids(i).tolist()) for i in data.indices(partition)]
        assert set("".join(texts)) == {who}


# --- loss --------------------------------------------------------------------------------------------


def examples_and_model() -> Any:
    model = adapted_lm()
    model.load(random_adapters(model.modules, 2), {})
    return model, model.task.synthetic_examples(4, model.module.config, 0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_mean_over_an_examples_own_tokens(masked: bool) -> None:
    model, data = examples_and_model()
    if masked:
        rng = np.random.default_rng(0)
        counted = rng.integers(0, 2, len(data.tokens)).astype(np.uint8)
        counted[data.offsets[1:] - 1] = 1
        data = replace(data, counted=counted)
    together = model.task.loss(model.module, collate(data, range(4), 0), "none")
    for i in range(4):
        ids = torch.from_numpy(data.input_ids(i).astype(np.int64))
        logp = model.module(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        nll = -logp[:-1].gather(1, ids[1:, None])[:, 0]
        if masked:
            nll = nll[torch.from_numpy(data.counted[data.offsets[i] + 1 : data.offsets[i + 1]]).bool()]
        torch.testing.assert_close(together[i], nll.mean())
    batch = collate(data, range(4), 0)
    torch.testing.assert_close(model.task.loss(model.module, batch, "mean"), together.mean())
    torch.testing.assert_close(model.task.loss(model.module, batch, "sum"), together.sum())


def test_figures_are_over_tokens() -> None:
    model, data = examples_and_model()
    outcome = evaluate(model, data, np.arange(4), 0)
    assert outcome.units.tolist() == (data.lengths - 1).tolist()
    total = (outcome.losses * outcome.units).sum() / (data.lengths - 1).sum()
    assert outcome.loss == pytest.approx(float(total))
    record = summary(outcome, ["all"], model.task)
    assert record["perplexity"] == pytest.approx(np.exp(total))
    assert record["tokens"] == int((data.lengths - 1).sum())
    assert record["accuracy"] == outcome.right.sum() / outcome.units.sum()
    assert perplexity(1e6) is None


def test_evaluation_passes_are_bounded_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = examples_and_model()
    whole = evaluate(model, data, np.arange(4), 0)
    seen: list[tuple[int, ...]] = []
    evaluate_batch = type(model.task).evaluate_batch

    def watched(self: Any, module: Any, batch: Any) -> Any:
        seen.append(tuple(batch["input_ids"].shape))
        return evaluate_batch(self, module, batch)

    monkeypatch.setattr(type(model.task), "evaluate_batch", watched)
    monkeypatch.setattr(type(model.task), "most_tokens", 20)
    again = evaluate(model, data, np.arange(4), 0)
    assert all(rows * tokens <= 20 or rows == 1 for rows, tokens in seen)
    np.testing.assert_allclose(again.losses, whole.losses, rtol=1e-5)


# --- conversations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_conversations_from_a_file(form: str, cache: Path, tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        who = "ann" if number % 2 else "bob"
        if form == "prompt":
            return {"prompt": f"Question {number}?", "response": f"answer{number}", "domain": who}
        talk = [
            {"role": "user", "content": f"Question {number}?"},
            {"role": "assistant", "content": f"answer{number}"},
        ]
        return {"messages": talk, "domain": who}

    path = jsonl(tmp_path / f"{form}.jsonl", [row(n) for n in range(20)])
    data = prepared(task="instruction", **{"data.name": path, "data.max-length": 64})
    assert (data.num_partitions, data.task) == (2, "instruction")
    assert all(counted_text(data, i).startswith(" answer") for i in range(len(data.train)))
    batch = collate(data.train, range(3), data.pad_token_id)
    assert batch["counted"].shape == batch["input_ids"].shape
    assert not (batch["counted"] > batch["attention_mask"]).any()


def test_a_conversation_without_a_counted_token_is_left_out_with_one_warning() -> None:
    rows = {"text": ["x" * 90, "short", "y" * 95], "text_pair": ["a", "b", "c"]}
    with pytest.warns(UserWarning, match="2 of 3 conversations") as warned:
        found = Instruction().encode([rows], TOKENIZER, 40)
    assert len(warned) == 1
    assert found.rows.tolist() == [1]
    with pytest.raises(ConfigError, match=r"data\.max-length = 8: no conversation"):
        Instruction().encode([rows], TOKENIZER, 8)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "robot", "content": "hi"}], "role 'robot'"),
        ([{"role": "user", "content": None}], "message 1 has content of type NoneType"),
        ([{"role": "user", "content": "hi"}], "no turn of the assistant"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Instruction().encode([{"text": [json.dumps(messages)]}], TOKENIZER, 40)


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"task": "poetry"},
            "task = 'poetry': accepted are classification, regression, multi-label-classifi",
        ),
        ({"model.head": "local"}, "model.head = 'local': task causal-lm trains no head"),
        ({"strategy.name": "head-only"}, "task causal-lm has no head"),
        ({"data.partitioner": "dirichlet", "data.num-partitions": 3}, "goes by labels"),
        ({"data.text-column": "a,b"}, "takes one column"),
    ],
)
def test_what_a_task_excludes(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(lm_config(**keys))


def test_messages_must_be_messages(cache: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": "hello", "domain": "x"}] * 4)
    with pytest.raises(ConfigError, match=r"data\.text-column = 'messages': row 1 of .* the text 'hello'"):
        prepared(task="instruction", **{"data.name": path})


def test_every_task_has_the_name_it_is_listed_under() -> None:
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
