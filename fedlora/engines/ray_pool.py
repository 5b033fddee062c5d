"""Long-lived Ray actors that carry out clients' messages; they keep the base model between messages."""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from typing import Any

from fedlora.config import EngineConfig
from fedlora.errors import ConfigError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""No calls home; inherited by every actor."""


class ClientWorker:
    """The body of an actor: a ClientApp in a process of its own, on one thread."""

    def __init__(self, client_app: str) -> None:
        import torch

        torch.set_num_threads(1)
        module, _, name = client_app.partition(":")
        self._app = getattr(importlib.import_module(module), name)

    def ready(self) -> int:
        """The process id, once everything is imported."""
        return os.getpid()

    def handle(self, metadata: Any, records: dict[str, Any], context: Any) -> tuple[Any, Any]:
        """The reply's content (or a one-line error) and the client's state after one message.

        Args:
            metadata: the message's metadata.
            records: its records by name, each itself or a reference into Ray's object store.
            context: the client's Flower context.
        """
        import ray
        from flwr.app import Message, RecordDict

        content = RecordDict(
            {name: ray.get(r) if isinstance(r, ray.ObjectRef) else r for name, r in records.items()}
        )
        try:
            message = Message(metadata=metadata, content=content)  # type: ignore[call-overload]
            reply = self._app(message, context)
        except Exception as error:
            logging.getLogger("fedlora").exception("client failed")
            lines = str(error).strip().splitlines() or ["no message"]
            return f"{type(error).__name__}: {lines[0]}", context.state
        return reply.content, context.state


class RayPool:
    """Actors on a machine or a cluster; started once, used by any number of runs.

    Args:
        engine: resources of one actor and where Ray is.
        client_app: ``module:attribute`` of the ClientApp.

    Raises:
        ConfigError: the cluster does not answer, or no machine has the resources of one actor.
    """

    def __init__(self, engine: EngineConfig, client_app: str = "fedlora.client_app:app") -> None:
        self.engine = engine
        self._client_app = client_app
        _connect(engine.address)
        self.size = engine.num_actors or _capacity(engine)
        self.restarts = 0
        self.actors = [self._spawn() for _ in range(self.size)]

    def replace(self, actor: Any) -> Any:
        """A new actor in the place of a dead or stuck one."""
        import ray

        ray.kill(actor, no_restart=True)
        fresh = self._spawn()
        self.actors[self.actors.index(actor)] = fresh
        self.restarts += 1
        return fresh

    def close(self) -> None:
        """Stop the actors and leave Ray."""
        import ray

        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        ray.shutdown()

    def _spawn(self) -> Any:
        import ray

        options = {"num_cpus": self.engine.num_cpus, "num_gpus": self.engine.num_gpus}
        return ray.remote(ClientWorker).options(**options).remote(self._client_app)


def _connect(address: str) -> None:
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        settings["include_dashboard"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            ray.init(address=address or "local", **settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or ["no answer"])[0]
            raise ConfigError(
                f"engine.address = {address!r}: no Ray cluster answers there ({reason})"
            ) from None


def _capacity(engine: EngineConfig) -> int:
    """How many actors the machines hold, each on one machine.

    Raises:
        ConfigError: not even one.
    """
    import ray

    total = 0
    for node in ray.nodes():
        resources = node["Resources"] if node["Alive"] else {}
        fits = resources.get("CPU", 0.0) / engine.num_cpus
        if engine.num_gpus:
            fits = min(fits, resources.get("GPU", 0.0) / engine.num_gpus)
        total += math.floor(fits + 1e-9)
    if total < 1:
        have = ray.cluster_resources()
        raise ConfigError(
            f"engine.num-cpus = {engine.num_cpus}, engine.num-gpus = {engine.num_gpus}: no machine has them "
            f"(in all {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs)"
        )
    return total
