"""How good the global model is: on a fixed subset between rounds, on all test examples at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clients.evaluation import Evaluation, evaluate
from clients.runtime import ClientRuntime
from clients.training.batches import Indices
from fedlora.config import RunConfig
from fedlora.core.state import State
from fedlora.data.examples import evaluation_subset
from fedlora.server.generation import samples
from fedlora.server.records import summary

Evaluator = Callable[[State, Indices], Evaluation]
"""Evaluates the global model of a state on some of the test examples."""


@dataclass(slots=True)
class GlobalEvaluator:
    """Evaluates global models; the last one that was measured whole is not measured again.

    Attributes:
        config: of the run.
        runtime: its model and data.
        evaluator: who evaluates; None: the model here. An engine may know better.
    """

    config: RunConfig
    runtime: ClientRuntime
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
            self._whole = (state, self._evaluate(state, np.arange(len(self.runtime.data.test))))
        return self._whole[1]

    def record(self, outcome: Evaluation) -> dict[str, Any]:
        """An evaluation as part of a record."""
        return summary(outcome, self.runtime.data.domain_names, self.runtime.model.task)

    def samples(self, state: State) -> list[dict[str, Any]]:
        """What the model continues test examples with."""
        self._load(state)
        return samples(self.runtime, self.config)

    def _subset(self) -> Indices:
        return evaluation_subset(self.runtime.data.test, self.config.data.evaluate_examples)

    def _evaluate(self, state: State, indices: Indices) -> Evaluation:
        if self.evaluator is not None:
            return self.evaluator(state, indices)
        self._load(state)
        data = self.runtime.data
        return evaluate(self.runtime.model, data.test, indices, data.pad_token_id)

    def _load(self, state: State) -> None:
        patches = {patch.digest(): patch for patch in state.base}
        self.runtime.move_to(tuple(patches), patches.__getitem__)
        self.runtime.model.load(state.adapters, state.head)
