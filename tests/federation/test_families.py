"""Families of models that people fine-tune, in whole runs: one by one, in cohorts, opened by PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from clients.training.batched.self_check import why_apart
from clients.training.dp_mechanism import Mechanism
from clients.training.self_check import check_steps
from fedlora.config import ModelConfig
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.tasks import task_named
from tests.federation.test_kinds import run, values
from tests.models.families import CHAT, LABELS, PAD, words
from tests.models.samples import random_adapters

pytestmark = pytest.mark.slow

Save = Callable[..., Path]
CLASSIFIERS = ("modernbert", "deberta-v3", "roberta")
LANGUAGE = ("llama", "qwen3", "gemma", "mixtral", *CHAT)
ALONE = {"modernbert": "head.norm is a LayerNorm", "deberta-v3": "of this model mixes examples"}
"""Families whose clients train one by one, wherever the size of a cohort is left to fedlora."""
BATCH = {"input_ids": torch.tensor([[5, 9, 12, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("families") / "words.jsonl"
    rows = [
        {"text": " ".join(words(3, 2, seed=n)), "label": "abc"[n % LABELS], "who": str(n % 4)}
        for n in range(32)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def keys(model: Path, data: str, task: str, **more: Any) -> dict[str, Any]:
    return {
        "task": task, "model.name": str(model), "model.pooling": "model", "data.name": data,
        "data.partition-by": "who", "num-server-rounds": 1, "data.max-length": 16, "train.local-steps": 2,
        "train.learning-rate": 0.02, **more,
    }  # fmt: skip


@pytest.mark.parametrize("family", [*CLASSIFIERS, *LANGUAGE])
def test_a_run_alone_in_cohorts_and_in_peft(
    family: str, saved: Save, data: str, tmp_path: Path, cache: Path
) -> None:
    task, kind = "classification", "SequenceClassification"
    if family in LANGUAGE:
        task, kind = "causal-lm", "CausalLM"
    given = keys(saved(family, kind), data, task)
    alone = run(tmp_path / "alone", **given)
    if family not in ALONE:
        together = run(tmp_path / "together", together=True, **given, **{"engine.cohort-size": 4})
        for name, tensor in values(alone).items():
            torch.testing.assert_close(values(together)[name], tensor, rtol=1e-3, atol=2e-5)
    base = getattr(tf, f"AutoModelFor{kind}").from_pretrained(saved(family, kind), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "alone" / "run" / "adapter").eval()
    alone.runtime.load_state(alone.state)
    with torch.no_grad():
        found, wanted = theirs(**BATCH).logits, alone.runtime.model.module(**BATCH).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert any(factors.B.abs().max() > 1e-3 for factors in alone.state.adapters.values())


@pytest.mark.parametrize("family", CHAT)
def test_private_steps_of_language_models(family: str, saved: Save) -> None:
    hooks = Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
    check_steps(adapted(saved(family, "CausalLM"), "causal-lm"), PAD, hooks)


@pytest.mark.parametrize("family", ALONE)
def test_what_opacus_cannot_take_is_taken_one_by_one(family: str, saved: Save) -> None:
    """And the refusal says so."""
    model = adapted(saved(family), "classification")
    hooks = Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
    with pytest.raises(RunFailed, match=r"privacy\.grad-sample-mode = 'loop', slower$"):
        check_steps(model, PAD, hooks)
    check_steps(
        model, PAD, Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1,
                              grad_sample_mode="loop"),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["roberta", *ALONE])
def test_a_cohort_is_for_models_that_leave_examples_alone(family: str, saved: Save) -> None:
    reason = why_apart(adapted(saved(family), "classification"), PAD)
    assert ALONE.get(family, "") in reason
    assert bool(reason) == (family in ALONE)


def adapted(path: Path, task: str) -> AdaptedModel:
    config = ModelConfig(name=str(path), pooling="model")
    module = build_model(config, LABELS, 0, task_named(task).network)
    model = AdaptedModel(module, resolve_targets(module, ""), task_named(task))
    model.load(random_adapters(model.modules, 2), {}, trained=frozenset("AB"), train_head=True)
    return model
