"""Token types: a pair, or a text, is computed as transformers computes it from its own tokenizer's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch import Tensor

from fedlora.config import ModelConfig
from fedlora.data.examples import Examples, collate, open_examples
from fedlora.data.tokenizers import load_tokenizer
from fedlora.models import build_model
from fedlora.prepared.cache import tokenised
from fedlora.tasks.task import inputs
from tests.models import families
from tests.models.families import CLASSIFIERS, LABELS, POSITIONS, words

TEXTS, PAIRS = words(3, 9, 14, 6), words(4, 2, 11, 6, seed=1)
TYPED = ("bert", "albert", "deberta", "electra", "xlnet")
Save = Callable[..., Path]


def encoded(model: Path, texts: list[str], pairs: list[str] | None, most: int = POSITIONS - 2) -> Examples:
    """As a run has them: through the tokenizer, an Arrow file and its memory map."""
    columns: dict[str, Any] = {"text": texts, "label": [n % 2 for n in range(len(texts))]}
    if pairs is not None:
        columns["text_pair"] = pairs
    batch = tokenised(Dataset.from_dict(columns), load_tokenizer(str(model)), most, {}, "encoding")
    path = model.parent / f"{model.name}-{bool(pairs)}-{most}.arrow"
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)
    return open_examples(path)


def ours(model: Path, examples: Examples, pooling: str = "model") -> Tensor:
    module = build_model(ModelConfig(name=str(model), pooling=pooling), LABELS, 0)
    batch = collate(examples, range(len(examples)), families.PAD)
    with torch.no_grad():
        logits: Tensor = module(**inputs(module, batch)).logits
    return logits


def theirs(model: Path, texts: list[str], pairs: list[str] | None, most: int = POSITIONS - 2) -> Tensor:
    """Transformers' own: text by text, as its pipeline does, without any padding."""
    network = tf.AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    rows = []
    for number, text in enumerate(texts):
        pair = None if pairs is None else pairs[number]
        given = tokenizer(text, pair, truncation=True, max_length=most, return_tensors="pt")
        with torch.no_grad():
            rows.append(network(**given).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("pairs", [PAIRS, None], ids=["pairs", "texts"])
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_logits_are_those_of_transformers(family: str, pairs: list[str] | None, saved: Save) -> None:
    model = saved(family)
    found = ours(model, encoded(model, TEXTS, pairs))
    torch.testing.assert_close(found, theirs(model, TEXTS, pairs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", TYPED)
def test_types_are_felt(family: str, saved: Save) -> None:
    """Else the test above would hold without them."""
    model = saved(family)
    examples = encoded(model, TEXTS, PAIRS)
    module = build_model(ModelConfig(name=str(model), pooling="model"), LABELS, 0)
    batch = inputs(module, collate(examples, range(4), families.PAD))
    types = batch.pop("token_type_ids")
    assert set(types.unique().tolist()) == ({0, 1, 2} if family == "xlnet" else {0, 1})
    with torch.no_grad():
        with_types, without = module(**batch, token_type_ids=types).logits, module(**batch).logits
    assert float((with_types - without).abs().max()) > 1e-3


def test_the_mean_is_over_states_that_know_the_types(saved: Save) -> None:
    model = saved("bert")
    network = tf.AutoModel.from_pretrained(model).eval()
    given = tf.AutoTokenizer.from_pretrained(model)(TEXTS[1], PAIRS[1], return_tensors="pt")
    module = build_model(ModelConfig(name=str(model)), LABELS, 0)
    with torch.no_grad():
        wanted = module.classifier(network(**given).last_hidden_state.mean(dim=1))
    torch.testing.assert_close(ours(model, encoded(model, TEXTS, PAIRS), "mean")[1:2], wanted)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_is_cut_where_the_tokenizer_cuts_it(side: str, saved: Save, tmp_path: Path) -> None:
    model = saved("bert")
    mine = tmp_path / side
    tf.AutoModelForSequenceClassification.from_pretrained(model).save_pretrained(mine)
    families.tokenizer("bert", truncation_side=side).save_pretrained(mine)
    found = ours(mine, encoded(mine, TEXTS, PAIRS, 12))
    torch.testing.assert_close(found, theirs(mine, TEXTS, PAIRS, 12), atol=2e-5, rtol=1e-4)


def test_a_tokenizer_that_leaves_types_out_is_believed(saved: Save, tmp_path: Path) -> None:
    model = saved("bert")
    tf.AutoModelForSequenceClassification.from_pretrained(model).save_pretrained(tmp_path / "m")
    names = ["input_ids", "attention_mask"]
    families.tokenizer("bert", model_input_names=names).save_pretrained(tmp_path / "m")
    examples = encoded(tmp_path / "m", TEXTS, PAIRS)
    assert examples.types is None
    torch.testing.assert_close(
        ours(tmp_path / "m", examples), theirs(tmp_path / "m", TEXTS, PAIRS), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert", "deberta-v3"])
def test_a_model_without_types_is_given_none(family: str, saved: Save, tmp_path: Path) -> None:
    """Whatever its tokenizer says: a RoBERTa has no embedding of type 1."""
    model = saved(family)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    network = tf.AutoModelForSequenceClassification.from_pretrained(model)
    network.save_pretrained(tmp_path / "m")
    families.tokenizer(family, model_input_names=names).save_pretrained(tmp_path / "m")
    examples = encoded(tmp_path / "m", TEXTS, PAIRS)
    assert examples.types is not None
    found = ours(tmp_path / "m", examples)
    torch.testing.assert_close(found, theirs(model, TEXTS, PAIRS), atol=2e-5, rtol=1e-4)
