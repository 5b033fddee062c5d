"""How good the global model is: on a fixed subset between rounds, on all test examples at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.batches import Indices
from clients.evaluation import Evaluation, evaluate
from clients.resident import Resident
from fedlora.config import RunConfig
from fedlora.data.examples import evaluation_subset
from fedlora.samples import samples
from fedlora.summaries import summary
from fedlora.updates import State

Evaluator = Callable[[State, Indices], Evaluation]
"""Evaluates the global model of a state on some of the test examples."""


@dataclass(slots=True)
class Measuring:
    """Evaluates global models; the last one that was measured whole is not measured again.

    Attributes:
        config: of the run.
        worker: its model and data.
        evaluator: who evaluates; None: the model here. An engine may know better.
    """

    config: RunConfig
    worker: Resident
    evaluator: Evaluator | None = None
    _whole: tuple[State, Evaluation] | None = field(init=False, default=None)

    def part(self, state: State) -> dict[str, Any]:
        """On the fixed subset of ``data.evaluate-examples``, as a record."""
        if self._whole is not None and self._whole[0] is state:
            return self.record(self._whole[1].among(self._subset()))
        self._whole = None
        return self.record(self._evaluate(state, self._subset()))

    def whole(self, state: State) -> Evaluation:
        """On all test examples."""
        if self._whole is None or self._whole[0] is not state:
            self._whole = (state, self._evaluate(state, np.arange(len(self.worker.data.test))))
        return self._whole[1]

    def record(self, outcome: Evaluation) -> dict[str, Any]:
        """An evaluation as part of a record."""
        return summary(outcome, self.worker.data.domain_names, self.worker.model.task)

    def samples(self, state: State) -> list[dict[str, Any]]:
        """What the model continues test examples with."""
        self._load(state)
        return samples(self.worker, self.config)

    def _subset(self) -> Indices:
        return evaluation_subset(self.worker.data.test, self.config.data.evaluate_examples)

    def _evaluate(self, state: State, indices: Indices) -> Evaluation:
        if self.evaluator is not None:
            return self.evaluator(state, indices)
        self._load(state)
        data = self.worker.data
        return evaluate(self.worker.model, data.test, indices, data.pad_token_id)

    def _load(self, state: State) -> None:
        patches = {patch.digest(): patch for patch in state.base}
        self.worker.move_to(tuple(patches), patches.__getitem__)
        self.worker.model.load(state.adapters, state.head)
