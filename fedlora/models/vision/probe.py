"""The linear probe: how far a frozen backbone gets with nothing but the best linear head.

The reference line for adapters and for federated training of the head alone: the features of all clients'
training images in one place, multinomial logistic regression on them, accuracy on the federation's test set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlora.core.parallel import one_thread
from fedlora.data.builtin.image_domains import dealt
from fedlora.data.images import ImageData, ImageFormat, Images, image_batch
from fedlora.errors import ConfigError

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weights of ``||W||^2 / 2`` to choose from, on a fifth of the training images."""
BATCH, ITERATIONS = 100, 300


@dataclass(frozen=True, slots=True)
class Probe:
    """Accuracy of a linear head.

    Attributes:
        accuracy: on all test images.
        by_domain: on those of each domain, empty where there are none.
        penalty: the chosen weight of ``||W||^2 / 2``.
    """

    accuracy: float
    by_domain: dict[str, float]
    penalty: float


def linear_probe(model: nn.Module, data: ImageData, form: ImageFormat) -> Probe:
    """The test accuracy of logistic regression on what enters the model's head.

    Convex, so it needs no seed: standardised features, full batches, L-BFGS in float64.

    Args:
        model: from `image_classifier`, its head a linear layer called ``classifier``.
        data: all training and test images.
        form: the model's own.

    Raises:
        ConfigError: the model has no such head.
    """
    train, test = (features(model, images, form).double() for images in (data.train, data.test))
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    labels, num_labels = torch.from_numpy(data.train.labels), len(data.label_names)
    chosen_on = torch.from_numpy(dealt(data.train.labels, 5, "probe") == 0)

    def held_out(penalty: float) -> float:
        head = _fit(train[~chosen_on], labels[~chosen_on], num_labels, penalty)
        return float((_chosen(head, train[chosen_on]) == labels[chosen_on]).double().mean())

    with one_thread():
        penalty = max(PENALTIES, key=held_out)
        found = _chosen(_fit(train, labels, num_labels, penalty), test)
    right = (found == torch.from_numpy(data.test.labels)).numpy()
    by_domain = {
        name: float(right[data.test.domains == code].mean()) for code, name in enumerate(data.domain_names)
    }
    return Probe(float(right.mean()), by_domain, penalty)


def features(model: nn.Module, images: Images, form: ImageFormat) -> Tensor:
    """Inputs of the head, float32 (images, features).

    Raises:
        ConfigError: the head is no linear layer called ``classifier``.
    """
    head: Any = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"linear probe: {type(model).__name__} has no linear head called classifier")
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        with torch.inference_mode(), one_thread():
            for start in range(0, len(images), BATCH):
                which = range(start, min(start + BATCH, len(images)))
                model(pixel_values=image_batch(images, which, form)["pixel_values"])
    finally:
        hook.remove()
    return torch.cat(caught).clone()


def _fit(x: Tensor, labels: Tensor, num_labels: int, penalty: float) -> nn.Linear:
    head = nn.Linear(x.shape[1], num_labels, dtype=x.dtype, device="meta").to_empty(device="cpu")
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=ITERATIONS, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(x), labels) + 0.5 * penalty * head.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return head


def _chosen(head: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        chosen: Tensor = head(x).argmax(dim=1)
    return chosen
