"""Weights of two adapters by the input: against each example alone, through one adapter with both of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clients.by_input import MOST, OWN_EXAMPLES, input_weights, weighed
from clients.evaluation import evaluate
from fedlora.config import ModelConfig
from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.core.seeding import stream
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from fedlora.models.build import build_model
from fedlora.models.layers import resolve_targets
from fedlora.tasks import task_named
from tests.clients.samples import PAD, examples
from tests.conftest import tiny_config
from tests.models.samples import adapted, random_adapters

DATA, TEST = examples(30, seed=1), examples(12, seed=2)
HELD = np.arange(4, 24)
ON = {"lora.personal-rank": 3, "lora.personal-weights": "input"}


def language_model() -> tuple[AdaptedModel, Examples]:
    """A decoder, and the test texts with prompts of 1, 2 or 3 tokens."""
    module = build_model(ModelConfig(name="tiny-lm"), 0, 0, "language-model")
    counted = np.ones(len(TEST.tokens), dtype=np.uint8)
    for i, start in enumerate(TEST.offsets[:-1]):
        counted[start : start + 1 + i % 3] = 0
    texts = replace(TEST, tokens=TEST.tokens % 250 + 1, counted=counted)
    return AdaptedModel(module, resolve_targets(module, ""), task_named("instruction")), texts


def client(model: AdaptedModel, data: Examples) -> Any:
    return SimpleNamespace(
        model=model, data=SimpleNamespace(train=data, pad_token_id=PAD, indices=lambda partition: HELD)
    )


def mixed(own: AdapterSet, held: AdapterSet, w: float) -> AdapterSet:
    """Both as one adapter, the second counted w times, the global one 1 - w times."""
    return {
        name: LoraFactors(
            torch.cat([one.A, held[name].A]),
            torch.cat(
                [w * one.scaling * one.B, (1 - w) * held[name].scaling * held[name].B], dim=1
            ),
            1.0,
        )
        for name, one in own.items()
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["classifier", "language-model"])
def test_each_example_has_its_own_weights(kind: str) -> None:
    model, data = language_model() if kind == "language-model" else (adapted(), TEST)
    own, held = (random_adapters(model.modules, rank, s, seed=rank) for rank, s in ((3, 4.0), (5, 9.0)))
    weights, everything = np.linspace(0, 1, len(data), dtype=np.float32), np.arange(len(data))
    model.load(own, {}, beside=held)
    found = evaluate(model, data, everything, PAD, 5, around=lambda at: weighed(model, weights[at]))
    again = evaluate(model, data, everything, PAD, 5)
    for i in everything:
        model.load(mixed(own, held, float(weights[i])), {})
        alone = evaluate(model, data, np.array([i]), PAD)
        assert found.losses[i] == pytest.approx(float(alone.losses[0]), rel=1e-4, abs=1e-5)
        assert found.right[i] == alone.right[0]
    assert not np.allclose(again.losses, found.losses, rtol=1e-3), "both count whole again afterwards"


@pytest.mark.parametrize("kind", ["classifier", "language-model"])
def test_a_weight_is_half_the_mean_cosine_to_own_examples(kind: str) -> None:
    """From the inputs alone: of a text with a prompt no token of the answer, here not even passed."""
    model, texts = language_model() if kind == "language-model" else (adapted(), TEST)
    data = texts if kind == "language-model" else DATA
    held = HELD if kind == "classifier" else np.arange(1, 11)
    runtime = client(model, data)
    runtime.data.indices = lambda partition: held
    model.load(random_adapters(model.modules, 3, 0.7), {})
    found = input_weights(runtime, tiny_config(**ON), 2, texts, np.array([7, 0, 5]))
    draw = stream(1, "own-examples", 2).choice(held, OWN_EXAMPLES, replace=False)

    def state(of: Examples, i: int) -> np.ndarray:
        ids = torch.from_numpy(of.input_ids(i).astype(np.int64))[None]
        network: Any = model.module if kind == "language-model" else model.module.backbone
        if kind == "language-model":
            ids = ids[:, : 1 + i % 3]
        with torch.no_grad():
            last = network(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].numpy()
        return last[-1] if kind == "language-model" else last.mean(axis=0)

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    wanted = [
        max(0.0, np.mean([cosine(state(texts, i), state(data, j)) for j in draw])) / 2 for i in (7, 0, 5)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert len(set(found.tolist())) == 3
    assert 0 <= found.min() <= found.max() <= MOST


def test_unlike_inputs_have_the_global_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.load(random_adapters(model.modules, 3), {})
    signs = iter([1.0, -1.0])
    monkeypatch.setattr("clients.by_input._states", lambda *given: next(signs) * torch.ones(2, 4))
    found = input_weights(client(model, DATA), tiny_config(**ON), 0, TEST, np.arange(2))
    assert found.tolist() == [0.0, 0.0]


def test_a_client_of_few_examples_compares_with_those() -> None:
    model = adapted()
    model.load(random_adapters(model.modules, 3), {})
    runtime = client(model, DATA)
    runtime.data.indices = lambda partition: np.array([3])
    found = input_weights(runtime, tiny_config(**ON), 0, DATA, np.array([3, 4]))
    assert found[0] == pytest.approx(MOST, rel=1e-5)
    assert found[1] < MOST


def test_a_layer_that_does_not_see_rows_is_refused() -> None:
    model = adapted()
    own, held = (random_adapters(model.modules, rank) for rank in (3, 5))
    model.load(own, {}, beside=held)
    with pytest.raises(ConfigError, match=r"lora\.personal-weights = 'input': .* by rows"):
        evaluate(model, TEST, np.arange(4), PAD, around=lambda at: weighed(model, np.ones(3, np.float32)))
