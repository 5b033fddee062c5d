"""Session of a run on Ray actors: its Grid, its shared model, and test batches dealt to the actors.

Batches depend on the examples alone (see `clients.evaluation.cut`), so that neither the number of actors
nor who takes which batch changes a bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

from clients.evaluation import Evaluation, assemble
from clients.training.batches import Indices
from fedlora.config import RunConfig, to_flat
from fedlora.core.state import State
from fedlora.data.examples import cut
from fedlora.server.session import Session
from fedlora.simulation.dispatch import Dispatcher, Job
from fedlora.simulation.ray_cluster import put
from fedlora.simulation.ray_grid import RayGrid
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.scheduling import predicted_work, with_cohort_size
from fedlora.simulation.timed_grid import timed
from fedlora.tasks import task_named

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun

JOBS_PER_ACTOR = 4
"""Jobs that the batches are packed into: few enough to cost little, enough to even out the actors."""


class RaySession(Session):
    """Lends a run the actors of a pool.

    Args:
        pool: the actors.
        config: of the run.
        path: its directory.
    """

    def __init__(self, pool: RayPool, config: RunConfig, path: Path) -> None:
        self._pool, self._shared_model = pool, pool.shared_model(config)
        runtime = self._shared_model.runtime
        super().__init__(
            config=with_cohort_size(config, path, runtime), runtime=runtime, stores=path / "clients"
        )

    def grid(self, run: FederatedRun) -> Grid:
        """One node for each partition of the run."""
        assert self.stores is not None
        work = predicted_work(self.config, self.runtime.data)
        grid = RayGrid(
            self._pool,
            run.partitions,
            to_flat(self.config),
            self.stores,
            shared_model=self._shared_model,
            base=lambda: run.state.base,
            cohort_size=self.config.engine.cohort_size,
            work=work,
        )
        return timed(grid, run, work)

    def evaluate(self, state: State, indices: Indices) -> Evaluation:
        """Losses and hits of a state's global model.

        Raises:
            RunFailed: a process that died more often than ``engine.max-retries`` allows.
        """
        ref, test = self._shared_model.move_to(state.base), self.runtime.data.test
        model = put((dict(state.adapters), dict(state.head)))
        places = cut(test, indices, most_tokens=task_named(self.runtime.data.task).most_tokens)
        precision = self.config.evaluation_precision
        jobs = [
            Job(
                "evaluate",
                (ref, model, [indices[places[i]] for i in pack], precision),
                "the evaluation",
                pack,
            )
            for pack in self._packed(len(places))
        ]
        outcomes: dict[int, Any] = {}
        for job, found in Dispatcher(self._pool).run(jobs):
            outcomes |= zip(job.subject, found, strict=True)
        return assemble(test, indices, places, [outcomes[i] for i in range(len(places))])

    def verify(self) -> None:
        """Compare the base in every actor with what was lent; see `RayPool.verify`."""
        self._pool.verify(self._shared_model)

    def _packed(self, count: int) -> list[range]:
        """Numbers of neighbouring batches, the long ones (the last) first."""
        size = -(-count // (JOBS_PER_ACTOR * self._pool.size))
        return [range(max(0, end - size), end) for end in range(count, 0, -size)]
