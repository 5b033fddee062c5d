"""Evaluation: the order of the work does not show in the results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clients.evaluation import evaluate
from clients.training.batches import load_batch
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from tests.clients.samples import PAD, examples, loaded

DATA = examples(40)


def one_by_one(model: nn.Module, indices: np.ndarray) -> torch.Tensor:
    rows = []
    with torch.no_grad():
        for i in indices:
            batch = load_batch(DATA, np.array([i]), PAD, torch.device("cpu"))
            rows.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    return torch.cat(rows)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_results_are_those_of_single_examples_in_the_order_asked(batch_size: int) -> None:
    model = loaded()
    indices = np.random.default_rng(0).permutation(40)[:25]
    outcome = evaluate(model, DATA, indices, PAD, batch_size)
    logits = one_by_one(model.module, indices)
    labels = torch.from_numpy(DATA.labels[indices])
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(torch.from_numpy(outcome.losses), losses, rtol=1e-5, atol=1e-6)
    assert outcome.right.tolist() == (logits.argmax(dim=1) == labels).long().tolist()
    assert outcome.units.tolist() == [1] * 25
    assert outcome.num_examples == 25
    assert outcome.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert outcome.accuracy == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))


def test_accuracy_by_domain_adds_up() -> None:
    outcome = evaluate(loaded(), DATA, np.arange(40), PAD)
    by_domain = outcome.accuracy_by_domain()
    assert set(by_domain) == set(DATA.domains.tolist())
    total = sum(by_domain[d] * int((DATA.domains == d).sum()) for d in by_domain)
    assert total / 40 == pytest.approx(outcome.accuracy)
    nowhere = Examples(DATA.tokens, DATA.offsets, DATA.labels, np.full(40, -1, dtype=np.int32))
    assert evaluate(loaded(), nowhere, np.arange(40), PAD).accuracy_by_domain() == {}


def test_dropout_is_off_and_no_graph_is_kept() -> None:
    model = loaded(dropout=0.9)
    model.module.train()
    first = evaluate(model, DATA, np.arange(40), PAD)
    assert np.array_equal(first.losses, evaluate(model.module, DATA, np.arange(40), PAD).losses)
    assert not any(module.training for module in model.module.modules())


def test_short_examples_go_together() -> None:
    widths = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            widths.append(input_ids.shape[1])
            return type("Output", (), {"logits": torch.zeros(len(input_ids), 2)})

    evaluate(Spy(), DATA, np.arange(40), PAD, batch_size=4)
    assert widths == sorted(widths)
    assert len(set(widths)) > 1


def test_nothing_to_evaluate_is_refused() -> None:
    with pytest.raises(ConfigError, match="no example to evaluate on"):
        evaluate(loaded(), DATA, np.arange(0), PAD)
