"""Evaluates the global model: on a fixed subset between rounds, on all test examples at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from clients.evaluation import Evaluation, evaluate
from clients.training.batches import Indices
from fedlora.config import RunConfig
from fedlora.core.state import State
from fedlora.data.examples import evaluation_subset
from fedlora.server.generation import samples
from fedlora.server.records import SETS, summary
from fedlora.server.session import Session
from fedlora.tasks.targets import Regression


def is_measured(config: RunConfig, server_round: int) -> bool:
    """Whether the model is evaluated after a round."""
    return server_round % config.evaluate_every == 0 or server_round == config.num_server_rounds


class GlobalEvaluator:
    """Evaluates global models; the last one that was measured whole is not measured again.

    Args:
        session: of the run.
    """

    def __init__(self, session: Session) -> None:
        self._session, self._data = session, session.runtime.data
        self._whole: tuple[State, Evaluation] | None = None

    def part(self, state: State) -> dict[str, Any]:
        """On the fixed subset of ``data.evaluate-examples``, as a record."""
        if self._whole is not None and self._whole[0] is state:
            return self.record(self._whole[1].among(self._subset())) | self.sets(state)
        self._whole = None
        return self.record(self._session.evaluate(state, self._subset())) | self.sets(state)

    def whole(self, state: State) -> Evaluation:
        """On all test examples."""
        if self._whole is None or self._whole[0] is not state:
            self._whole = (state, self._session.evaluate(state, np.arange(len(self._data.test))))
        return self._whole[1]

    def sets(self, state: State, *, whole: bool = False) -> dict[str, Any]:
        """On the sets of ``data.evaluation-sets``, or a fixed subset of each; nothing without any."""
        runtime, config = self._session.runtime, self._session.config
        size, precision = config.data.evaluate_examples, config.evaluation_precision
        if not self._data.sets:
            return {}
        runtime.load_state(state)
        found = {}
        for name, examples in self._data.sets.items():
            chosen = evaluation_subset(examples, 0 if whole else size)
            outcome = evaluate(runtime.model, examples, chosen, self._data.pad_token_id, precision=precision)
            found[name] = self.record(outcome)
        return {SETS: found}

    def record(self, outcome: Evaluation) -> dict[str, Any]:
        """An evaluation as part of a record."""
        return summary(outcome, self._data.domain_names, self._session.runtime.model.task)

    def errors(self, outcome: Evaluation) -> dict[str, Any]:
        """Standard errors over the examples, where these have targets."""
        task = self._session.runtime.model.task
        if not isinstance(task, Regression) or outcome.outputs is None or outcome.targets is None:
            return {}
        return {"standard_errors": task.standard_errors(outcome.outputs, outcome.targets)}

    def samples(self, state: State) -> list[dict[str, Any]]:
        """Continuations of test examples by the model."""
        self._session.runtime.load_state(state)
        return samples(self._session.runtime, self._session.config)

    def _subset(self) -> Indices:
        return evaluation_subset(self._data.test, self._session.config.data.evaluate_examples)
