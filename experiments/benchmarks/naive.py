"""The same server steps as papers' codes do them, with (out, in) matrices, on one module."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FAIR_STEPS = 1000
"""Steps of SGD in public codes of LoRA-FAIR; a few of them are measured."""
MEASURED_STEPS = 10


def flexlora(shape: dict[str, Any]) -> dict[str, Any]:
    """Dense sum, full SVD, cut."""
    clients = _clients(shape)
    return _timed(shape, lambda: torch.linalg.svd(_dense(clients), full_matrices=False))


def fedsvd(shape: dict[str, Any]) -> dict[str, Any]:
    """Mean B, dense B A, full SVD."""
    clients = _clients(shape)
    A = clients[0][1]
    return _timed(
        shape, lambda: torch.linalg.svd(sum(B for B, _ in clients) @ A / len(clients), full_matrices=False)
    )


def lora_fair(shape: dict[str, Any]) -> dict[str, Any]:
    """Gradient descent on dB against the dense sum."""
    clients = _clients(shape)
    target = _dense(clients)
    A = sum(a for _, a in clients) / len(clients)
    B = sum(b for b, _ in clients) / len(clients)
    dB = torch.zeros_like(B, requires_grad=True)
    optimizer = torch.optim.SGD([dB], lr=0.01)

    def steps() -> None:
        for _ in range(MEASURED_STEPS):
            optimizer.zero_grad()
            guess = (B + dB) @ A
            loss = 1 - torch.nn.functional.cosine_similarity(guess.flatten(), target.flatten(), dim=0)
            (loss + 0.01 * dB.square().sum()).backward()
            optimizer.step()

    return _timed(shape, steps, times=FAIR_STEPS / MEASURED_STEPS)


def fedex(shape: dict[str, Any]) -> dict[str, Any]:
    """Dense residual."""
    clients = _clients(shape)
    A, B = (sum(c[side] for c in clients) / len(clients) for side in (1, 0))
    return _timed(shape, lambda: _dense(clients) - B @ A)


def flora(shape: dict[str, Any]) -> dict[str, Any]:
    """Dense sum."""
    clients = _clients(shape)
    return _timed(shape, lambda: _dense(clients))


NAIVE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "flora": flora,
    "flexlora": flexlora,
    "florist": flexlora,
    "fedex": fedex,
    "lora-fair": lora_fair,
    "fedsvd": fedsvd,
    "fedmomentum": flexlora,
}
"""By the rule's name: where the papers' codes form (out, in) matrices."""


def _clients(shape: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    g, n, r = torch.Generator().manual_seed(0), shape["size"], shape["ranks"][0]
    return [
        (0.01 * torch.randn(n, r, generator=g), torch.randn(r, n, generator=g) / n**0.5)
        for _ in range(shape["clients"])
    ]


def _dense(clients: list[tuple[Tensor, Tensor]]) -> Tensor:
    B, A = clients[0]
    total = torch.zeros(B.shape[0], A.shape[1])
    for B, A in clients:
        total += B @ A / len(clients)
    return total


def _timed(shape: dict[str, Any], run: Callable[[], object], times: float = 1.0) -> dict[str, Any]:
    began = time.perf_counter()
    run()
    one = (time.perf_counter() - began) * times
    return {"seconds": one * shape["modules"], "seconds_per_module": one, "modules_measured": 1}
