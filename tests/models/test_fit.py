"""Examples that a model has no place for are refused in one line where it meets them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clients.runtime import parts_of
from fedlora.config import ModelConfig
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import build_model, check_fit
from fedlora.prepared.cache import Prepared
from tests.conftest import tiny_config
from tests.models import families
from tests.models.families import CLASSIFIERS, LABELS, POSITIONS, SEP, VOCABULARY

Save = Callable[..., Path]


def data(
    *rows: list[int], pad: int = families.PAD, types: list[int] | None = None, task: str = "classification"
) -> Prepared:
    examples = Examples(
        tokens=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        offsets=np.cumsum([0, *map(len, rows)]),
        labels=np.zeros(len(rows), dtype=np.int64),
        domains=np.zeros(len(rows), dtype=np.int32),
        types=None if types is None else np.array(types, dtype=np.uint8),
    )
    return Prepared(
        train=examples, test=examples.none(), label_names=("a", "b", "c"), domain_names=(), pad_token_id=pad,
        flat=np.arange(len(rows)), offsets=np.array([0, len(rows)]), task=task,
    )  # fmt: skip


def check(model: Path, prepared: Prepared, most: int = 16, pooling: str = "model") -> None:
    config = ModelConfig(name=str(model), pooling=pooling)
    network = "classifier" if prepared.task == "classification" else "language-model"
    check_fit(config, build_model(config, LABELS, 0, network), prepared, most)


def refused(model: Path, prepared: Prepared, most: int = 16, pooling: str = "model") -> str:
    with pytest.raises(ConfigError) as error:
        check(model, prepared, most, pooling)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_what_fits_is_taken_without_a_word(family: str, saved: Save) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(saved(family), data([7, 8, SEP], [9, 10, 11, 12, SEP]))


LIMITS = {"roberta": POSITIONS - 1, "xlnet": None, "t5": None}
"""Positions of a RoBERTa begin after its padding token, which is 0 here."""


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_the_longest_that_is_accepted_is_the_longest_that_can_be_computed(family: str, saved: Save) -> None:
    model, most = saved(family), LIMITS.get(family, POSITIONS)
    longest = [7] * (most or 100)
    check(model, data([*longest[1:], SEP]), len(longest))
    if most is not None:
        assert f"takes at most {most} tokens" in refused(model, data([7, SEP]), most + 1)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_padding_token_without_an_embedding(task: str, saved: Save) -> None:
    model = saved("gpt2", "CausalLM")
    message = refused(model, data([7, 8], pad=VOCABULARY, task=task), pooling="mean")
    assert f"pads with token {VOCABULARY}, the model has tokens 0 to {VOCABULARY - 1}" in message


def test_a_token_without_an_embedding(saved: Save) -> None:
    message = refused(saved("bert"), data([7, 8], [7, VOCABULARY]))
    assert f"makes token {VOCABULARY} of the data, the model has tokens 0 to {VOCABULARY - 1}" in message


def test_a_type_without_an_embedding(saved: Save) -> None:
    message = refused(saved("bert"), data([7, 8, 9], types=[0, 1, 2]))
    assert "makes token type 2 of the data, the model has types 0 to 1" in message


@pytest.mark.parametrize("family", families.END_TOKEN)
def test_end_tokens_that_differ_in_number(family: str, saved: Save) -> None:
    check(saved(family), data([7, SEP, 8, SEP], [9, 10, SEP, SEP]))
    message = refused(saved(family), data([7, 8, SEP], [9, SEP, 10, SEP]))
    assert f"classifies by its end token {SEP}" in message
    assert "some have 0" in refused(saved(family), data([7, 8, SEP], [9]))


def test_a_pass_that_fails_for_another_reason(saved: Save) -> None:
    config = ModelConfig(name=str(saved("bert")), pooling="model")
    network: Any = build_model(config, LABELS, 0)
    network.bert.encoder.layer[0].output.dense = nn.Linear(23, 16)
    with pytest.raises(ConfigError, match=r"fails on an example of 3 tokens \(RuntimeError: .*nothing was"):
        check_fit(config, network, data([7, 8], [7, 8, 9]), 16)


def test_padding_that_is_felt_is_told(saved: Save) -> None:
    config = ModelConfig(name=str(saved("bert")), pooling="model")
    network: Any = build_model(config, LABELS, 0)
    network.bert.pooler.register_forward_pre_hook(lambda _, given: (given[0].roll(1, dims=1),))  # its last
    with pytest.warns(UserWarning, match="padding moves its results"):
        check_fit(config, network, data([7, 8], [7, 8, 9]), 16)


def test_examples_of_a_test_set_count_too(saved: Save) -> None:
    prepared = data([7, 8])
    message = refused(saved("bert"), replace(prepared, test=data([7, 99]).train))
    assert "makes token 99" in message


@pytest.mark.usefixtures("cache")
def test_a_private_run_is_refused_before_anything_is_charged(saved: Save, tmp_path: Path) -> None:
    """RoBERTa has one position less than its config says; found by IndexError once epsilon was spent."""
    file = tmp_path / "d.jsonl"
    rows = [{"text": " ".join(families.words(n % 50 + 1)), "label": "abc"[n % 3]} for n in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        **{
            "model.name": str(saved("roberta")), "model.pooling": "model", "data.name": str(file),
            "data.partitioner": "iid", "data.num-partitions": 2, "data.max-length": POSITIONS,
        }
    )  # fmt: skip
    with pytest.raises(ConfigError, match=f"takes at most {POSITIONS - 1} tokens"):
        parts_of(config)
    assert torch.is_grad_enabled()
