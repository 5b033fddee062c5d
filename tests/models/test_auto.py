"""Adapters that a run writes, opened by PEFT's Auto classes in another process and another directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import fedlora
from fedlora.config import ModelConfig, from_flat
from fedlora.core.state import State
from fedlora.models import AdaptedModel, AdapterCard, build_model, resolve_targets
from fedlora.models.export import save_adapter
from fedlora.server.model_card import write_beside
from fedlora.tasks import task_named
from tests.models.elsewhere import Elsewhere
from tests.models.families import DECODERS, END_TOKEN, LABELS, SEP, save
from tests.models.samples import logits, random_adapters, token_batch

FAMILIES = ("bert", "distilbert", "roberta", "xlnet", "bart", "gpt2", "gemma")
TARGETS = {"xlnet": "layer_1,layer_2"}


def exported(
    directory: Path, name: str, task: str, labels: tuple[str, ...], fields: dict[str, Any]
) -> tuple[Path, AdaptedModel]:
    """An adapter with random values and its files, written as a run writes it; the model holds them."""
    config = from_flat({"task": task, "model.name": name, "data.name": "synthetic", **fields})
    network = build_model(config.model, len(labels), 0, task_named(task).network)
    model = AdaptedModel(
        network, resolve_targets(network, TARGETS.get(network.config.model_type, "")), task_named(task)
    )
    adapters = random_adapters(model.modules, 4)
    head = {
        name: torch.randn(t.shape, generator=torch.Generator().manual_seed(3))
        for name, t in model.initial_head.items()
    }
    model.load(adapters, head)
    card = AdapterCard(model=config.model, label_names=labels, max_length=32, seed=0, task=task)
    state = State(round=1, adapters=adapters, head=head)
    save_adapter(
        directory, state, {}, card, model=model, beside=lambda fresh: write_beside(fresh, config, card)
    )
    return directory, model


def settings(adapter: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_with_its_own_head_opens_anywhere(
    family: str, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    base = save(tmp_path / "base", family)
    labels = tuple("abc"[:LABELS])
    adapter, model = exported(
        tmp_path / "adapter", str(base), "classification", labels, {"model.pooling": "model"}
    )
    batch = ended(token_batch(60), family)
    if family in (*DECODERS, "xlnet"):  # which look for the last token: no padding
        batch = {name: t[:1, : int(batch["attention_mask"][0].sum())] for name, t in batch.items()}
    found = elsewhere.opened("AutoPeftModelForSequenceClassification", adapter, batch, num_labels=LABELS)
    torch.testing.assert_close(found, logits(model.module, batch), rtol=1e-4, atol=1e-4)
    said = settings(adapter)
    assert said["task_type"] == "SEQ_CLS"
    assert said["base_model_name_or_path"] == str(base)
    assert all("." not in name for name in said["target_modules"])
    assert (adapter / "tokenizer.json").is_file()
    assert "AutoPeftModelForSequenceClassification" in (adapter / "README.md").read_text()


def test_a_pooler_that_its_checkpoint_lacks_is_in_the_adapter(elsewhere: Elsewhere, tmp_path: Path) -> None:
    base = save(tmp_path / "base", "bert", "MaskedLM")  # BERT's masked language model has no pooler
    adapter, model = exported(
        tmp_path / "adapter", str(base), "classification", ("a", "b"), {"model.pooling": "model"}
    )
    found = elsewhere.opened("AutoPeftModelForSequenceClassification", adapter, token_batch(60), num_labels=2)
    torch.testing.assert_close(found, logits(model.module, token_batch(60)), rtol=1e-4, atol=1e-4)
    assert settings(adapter)["modules_to_save"] == ["bert.pooler", "classifier"]


def test_a_language_model_opens_anywhere(elsewhere: Elsewhere, tmp_path: Path) -> None:
    base = save(tmp_path / "base", "llama", "CausalLM")
    adapter, model = exported(tmp_path / "adapter", str(base), "causal-lm", (), {})
    batch = {name: t[:1, :2] for name, t in token_batch(60).items()}
    found = elsewhere.opened("AutoPeftModelForCausalLM", adapter, batch)
    torch.testing.assert_close(found, logits(model.module, batch), rtol=1e-4, atol=1e-4)
    assert settings(adapter)["target_modules"] == ["q_proj", "v_proj"]


def test_an_image_model_opens_anywhere(elsewhere: Elsewhere, tmp_path: Path) -> None:
    base = tmp_path / "base"
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(base)
    (base / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5], "image_std": [0.5], "size": {"height": 28, "width": 28}}'
    )
    adapter, model = exported(
        tmp_path / "adapter", str(base), "image-classification", ("a", "b", "c"), {"data.name": "digits"}
    )
    batch = {"pixel_values": torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))}
    found = elsewhere.opened("AutoPeftModel", adapter, batch, num_labels=3, ignore_mismatched_sizes=True)
    torch.testing.assert_close(found, logits(model.module, batch), rtol=1e-4, atol=1e-4)
    assert (adapter / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("model", "task", "name"),
    [
        ("minilm", "classification", "sentence-transformers/all-MiniLM-L6-v2"),
        ("smollm2", "causal-lm", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("tiny", "classification", None),
        ("vit", "image-classification", None),
        ("someone/model", "causal-lm", "someone/model"),
    ],
)
def test_a_base_is_never_named_by_a_place_in_a_cache(model: str, task: str, name: str | None) -> None:
    card = AdapterCard(model=ModelConfig(name=model), label_names=(), max_length=8, seed=0, task=task)
    assert card.base_name == name
    assert card.auto_fields(None)["base_model_name_or_path"] == name


def test_a_mean_pooled_classifier_says_no_class_and_keeps_whole_names(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "bert")
    adapter, _ = exported(tmp_path / "adapter", str(base), "classification", ("a", "b"), {})
    said = settings(adapter)
    assert said["task_type"] is None
    assert said["auto_mapping"] is None
    assert all(name.startswith("backbone.") for name in said["target_modules"])  # no other base matches
    assert "fedlora.load" in (adapter / "README.md").read_text()


def ended(batch: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """The batch with one end token at the end of each row, where the family classifies by it."""
    if family not in END_TOKEN:
        return batch
    ids = batch["input_ids"].clone()
    ids[ids == SEP] = SEP + 1
    ids[torch.arange(len(ids)), batch["attention_mask"].sum(dim=1) - 1] = SEP
    return {**batch, "input_ids": ids}


@pytest.mark.parametrize(
    ("kind", "task", "labels", "fields"),
    [
        ("CausalLM", "causal-lm", (), {}),
        ("MaskedLM", "classification", ("a", "b", "c", "d"), {"model.pooling": "model"}),
    ],
)
def test_what_a_run_wrote_is_merged_into_its_base(
    kind: str, task: str, labels: tuple[str, ...], fields: dict[str, Any], tmp_path: Path
) -> None:
    base = save(tmp_path / "base", "llama" if kind == "CausalLM" else "bert", kind)
    adapter, model = exported(tmp_path / "adapter", str(base), task, labels, fields)
    outcome = fedlora.aggregate([adapter], tmp_path / "merged", merge=True)
    assert outcome.ranks_out == ()
    auto = AutoModelForCausalLM if kind == "CausalLM" else AutoModelForSequenceClassification
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    batch = {name: t[:1, :2] for name, t in token_batch(60).items()}
    torch.testing.assert_close(logits(merged, batch), logits(model.module, batch), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    if labels:
        assert list(merged.config.id2label.values()) == list(labels)
