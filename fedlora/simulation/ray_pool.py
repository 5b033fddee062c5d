"""Long-lived Ray actors that carry out clients' messages; one model and data set for all of a machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import EngineConfig, RunConfig
from fedlora.errors import ConfigError, RunFailed
from fedlora.simulation.actor import FEDLORA_APP, ClientActor
from fedlora.simulation.places import actors_of, places, resources_of
from fedlora.simulation.ray_cluster import QUIET, connect

if TYPE_CHECKING:
    from clients.runtime import ClientRuntime, SharedArrays
    from fedlora.simulation.ray_session import RaySession
    from fedlora.simulation.shared_model import SharedModel


class RayPool:
    """Engine of actors on a machine or a cluster; started once, used by any number of runs.

    Where this process has a Ray already, the actors are started in it, and it stays when they end.

    Args:
        engine: resources of one actor and where Ray is.
        client_app: ``module:attribute`` of the ClientApp.

    Attributes:
        actors: all of them.
        starting: those that are not known to be ready, with the reference that will tell.
        restarts: actors that took the place of another.
        failed_starts: how many died in a row before they were ready.

    Raises:
        ConfigError: the cluster does not answer or is another one than this process has joined, no machine
            has the resources of one actor, or fewer actors fit than ``engine.num-actors``; none was started.
    """

    def __init__(self, engine: EngineConfig, client_app: str = FEDLORA_APP) -> None:
        import ray

        self.engine = engine
        self.client_app = client_app
        self.starting: dict[Any, Any] = {}
        self.restarts = self.failed_starts = 0
        self.actors: list[Any] = []
        self._shared_model: SharedModel | None = None
        self._began_ray = connect(engine.address)
        try:
            self.size = actors_of(engine, resources_of(ray.nodes()))
            for _ in range(self.size):
                self.actors.append(self._spawn())
        except BaseException:
            self.close()
            raise

    def shared_model(self, config: RunConfig, parts: SharedArrays | None = None) -> SharedModel:
        """The model and the data of a run in the object store; that of the run before if it is the same."""
        from clients.runtime import key_of
        from fedlora.simulation.shared_model import SharedModel

        if self._shared_model is None or self._shared_model.ref.key != key_of(config):
            self._shared_model = None
            self._shared_model = SharedModel(config, parts)
        return self._shared_model

    def runtime(self, config: RunConfig) -> ClientRuntime:
        """The driver's model and data on the shared arrays."""
        return self.shared_model(config).runtime

    def session(self, config: RunConfig, path: Path) -> RaySession:
        """The session of a run; see `fedlora.server.session.Engine`."""
        from fedlora.simulation.ray_session import RaySession

        return RaySession(self, config, path)

    def verify(self, shared_model: SharedModel) -> None:
        """Compare the base weights in every actor with what was lent.

        Raises:
            RunFailed: somebody wrote into weights that all share.
        """
        import ray

        for reference in [
            a.base_hashes.remote(shared_model.ref) for a in self.actors if a not in self.starting
        ]:
            try:
                shared_model.compare(ray.get(reference))
            except RunFailed:
                self._shared_model = None  # the next run shall have its own
                raise
            except ray.exceptions.RayActorError:
                continue  # whatever it held is gone

    def replace(self, actor: Any) -> Any:
        """A new actor in the place of a dead or stuck one."""
        import ray

        ray.kill(actor, no_restart=True)
        self.starting.pop(actor, None)
        fresh = self._spawn()
        self.actors[self.actors.index(actor)] = fresh
        self.restarts += 1
        return fresh

    def is_ready(self, actor: Any) -> None:
        """An actor has started."""
        self.starting.pop(actor, None)
        self.failed_starts = 0

    def waits_for(self) -> str:
        """Reason that actors do not start, in one line.

        Raises:
            RunFailed: the cluster lost every machine that one actor fits on.
        """
        import ray

        try:
            places(self.engine, resources_of(ray.nodes()))
        except ConfigError as error:
            raise RunFailed(f"the cluster has shrunk: {error}") from None
        have, free = ray.cluster_resources(), ray.available_resources()
        there = ", ".join(
            f"{free.get(kind, 0.0):g} of {have.get(kind, 0.0):g} {kind}s free" for kind in ("CPU", "GPU")
        )
        return (
            f"waiting for one of {len(self.actors)} client processes to start: each takes engine.num-cpus = "
            f"{self.engine.num_cpus:g} and engine.num-gpus = {self.engine.num_gpus:g}; {there}"
        )

    def close(self) -> None:
        """Stop the actors, let the model go, and leave the Ray that was started or joined for them."""
        import ray

        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self._shared_model = None
        if self._began_ray:
            ray.shutdown()

    def _spawn(self) -> Any:
        import ray

        options: dict[str, Any] = {"num_cpus": self.engine.num_cpus, "num_gpus": self.engine.num_gpus}
        if self.engine.address or not self._began_ray:  # from a Ray of our own it inherits them
            options["runtime_env"] = {"env_vars": QUIET}
        made = ray.remote(ClientActor).options(**options)
        actor = made.remote(self.client_app, os.getcwd(), list(sys.path))
        self.starting[actor] = actor.ready.remote()
        return actor
