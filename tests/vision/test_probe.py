"""The linear probe is logistic regression on what enters the head."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.data.builtin.image_sets import NATIVE
from fedlora.data.images import ImageData, image_batch
from fedlora.errors import ConfigError
from fedlora.models.vision.backbones import image_classifier
from fedlora.models.vision.probe import PENALTIES, _fit, features, linear_probe
from tests.vision.samples import shaded


class Flat(nn.Module):
    """A head on the pixels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(784, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(pixel_values.flatten(1))
        return logits


def task(num_train: int = 120) -> ImageData:
    train, test = shaded(num_train), shaded(60, seed=1)
    halves = (np.arange(60) // 30).astype(np.int32)
    return ImageData(train, dataclasses.replace(test, domains=halves), tuple("abcd"), ("one", "two"))


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-mixer"])
def test_features_times_head_are_the_logits(name: str) -> None:
    model, images = image_classifier(name, 4, 0), shaded(7)
    found = features(model, images, NATIVE)
    logits = model(pixel_values=image_batch(images, range(7), NATIVE)["pixel_values"]).logits
    torch.testing.assert_close(model.classifier(found), logits)  # type: ignore[operator]
    assert not model.classifier._forward_pre_hooks  # type: ignore[union-attr]


def test_it_separates_what_features_show_and_counts_by_domain() -> None:
    data = task()
    probe = linear_probe(Flat(), data, NATIVE)
    assert probe.accuracy > 0.9
    assert probe.accuracy == pytest.approx((probe.by_domain["one"] + probe.by_domain["two"]) / 2)
    assert probe.penalty in PENALTIES
    assert linear_probe(Flat(), data, NATIVE) == probe  # the head it came with plays no part


def test_labels_without_meaning_are_not_learnt() -> None:
    data = task()
    scrambled = np.random.default_rng(0).permutation(data.train.labels)
    train = dataclasses.replace(data.train, labels=scrambled)
    assert linear_probe(Flat(), dataclasses.replace(data, train=train), NATIVE).accuracy < 0.5


def test_domains_are_counted_apart() -> None:
    data = task()
    wrong = np.where(data.test.domains == 1, (data.test.labels + 1) % 4, data.test.labels)
    probe = linear_probe(
        Flat(), dataclasses.replace(data, test=dataclasses.replace(data.test, labels=wrong)), NATIVE
    )
    assert probe.by_domain["one"] > 0.9
    assert probe.by_domain["two"] < 0.1


def test_the_fit_is_the_minimum() -> None:
    """The gradient of the penalised loss, written out, is zero there."""
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    head = _fit(x, labels, 4, 0.01)
    weight, bias = head.weight.detach(), head.bias.detach()
    residual = torch.softmax(x @ weight.T + bias, dim=1) - nn.functional.one_hot(labels, 4)
    assert (residual.T @ x / 50 + 0.01 * weight).abs().max() < 1e-5
    assert residual.mean(dim=0).abs().max() < 1e-5


def test_another_kind_of_head_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no linear head"):
        features(model, shaded(4), NATIVE)
