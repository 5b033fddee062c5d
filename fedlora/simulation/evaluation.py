"""The global model on test examples, the batches dealt to the actors of a pool.

Batches depend on the examples alone (see `clients.evaluation.cut`), so that neither the number of actors
nor who takes which batch changes a bit.
"""

from __future__ import annotations

from typing import Any

from clients.evaluation import Evaluation, assemble, cut
from clients.training.batches import Indices
from fedlora.core.state import State
from fedlora.prepared.cache import Prepared
from fedlora.simulation.dispatch import Dispatcher, Job
from fedlora.simulation.ray_cluster import put
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.shared_model import SharedModel
from fedlora.tasks import task_named

JOBS_PER_ACTOR = 4
"""Jobs that the batches are packed into: few enough to cost little, enough to even out the actors."""


class SharedEvaluation:
    """Evaluates states; see `fedlora.server.evaluator.Evaluator`.

    Args:
        pool: the actors.
        shared_model: the model and the data.
        data: the same data.
    """

    def __init__(self, pool: RayPool, shared_model: SharedModel, data: Prepared) -> None:
        self._pool, self._shared_model, self._data = pool, shared_model, data

    def __call__(self, state: State, indices: Indices) -> Evaluation:
        """Losses and hits of a state's global model.

        Raises:
            RunFailed: a process that died more often than ``engine.max-retries`` allows.
        """
        ref = self._shared_model.move_to(state.base)
        model = put((dict(state.adapters), dict(state.head)))
        places = cut(self._data.test, indices, most_tokens=task_named(self._data.task).most_tokens)
        packs = self._packed(len(places))
        jobs = [
            Job("evaluate", (ref, model, [indices[places[i]] for i in pack]), "the evaluation", pack)
            for pack in packs
        ]
        outcomes: dict[int, Any] = {}
        for job, found in Dispatcher(self._pool).run(jobs):
            outcomes |= zip(job.subject, found, strict=True)
        return assemble(self._data.test, indices, places, [outcomes[i] for i in range(len(places))])

    def _packed(self, count: int) -> list[range]:
        """Numbers of neighbouring batches, the long ones (the last) first."""
        size = -(-count // (JOBS_PER_ACTOR * self._pool.size))
        return [range(max(0, end - size), end) for end in range(count, 0, -size)]
