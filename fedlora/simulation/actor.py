"""Body of an actor: the clients of a simulation in a process of its own, on one thread."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.core.code import prefer_own_code
from fedlora.errors import RunFailed, named_line

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict

    from fedlora.simulation.shared_model import AttachedModel, Hashes, SharedModelRef

FEDLORA_APP = "fedlora.client_app:app"
Answer = tuple[Any, Any]
"""A reply's content, or a one-line error; and the client's state."""


@dataclass(slots=True)
class RemoteMessage:
    """A message on its way to an actor.

    Attributes:
        metadata: the message's.
        records: its records by name, each itself or a reference into Ray's object store.
        context: the client's Flower context.
    """

    metadata: Any
    records: Mapping[str, Any]
    context: Any


class ClientActor:
    """Carries out what a driver asks for.

    Args:
        client_app: ``module:attribute`` of the ClientApp. Messages for fedlora's own, which come with a ref,
            go straight to its handler, with the model of this process.
        directory: the driver's, for relative paths; it may have changed since Ray was started.
        paths: of the driver's imports.
    """

    _model: AttachedModel

    def __init__(self, client_app: str, directory: str, paths: Sequence[str]) -> None:
        if os.path.isdir(directory):  # elsewhere in a cluster it need not be there
            os.chdir(directory)
        sys.path += [path for path in paths if path not in sys.path]
        import torch

        torch.set_num_threads(1)
        prefer_own_code()
        module, _, name = client_app.partition(":")
        self._app = getattr(importlib.import_module(module), name)
        if client_app == FEDLORA_APP:  # which imports nothing heavy by itself
            importlib.import_module("clients.handler")
            from fedlora.simulation.shared_model import AttachedModel

            self._model = AttachedModel()

    def ready(self) -> int:
        """The process id, once everything is imported."""
        return os.getpid()

    def node(self) -> str:
        """The id of the Ray node that this process is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def handle(self, messages: Sequence[RemoteMessage], ref: SharedModelRef | None) -> list[Answer]:
        """An answer to each message, in their order; several messages are trained together.

        Args:
            messages: one message, or a cohort of instructions to train for fedlora's ClientApp.
            ref: the model and the data, if the ClientApp is fedlora's.

        Raises:
            RunFailed: the run directory is not on this machine.
        """
        contexts = [message.context for message in messages]
        contents: list[RecordDict | str]
        if ref is not None:
            _check_shared(str(contexts[0].node_config["state-dir"]))
        try:
            opened = [_opened(message) for message in messages]
            if ref is None:
                contents = [self._app(opened[0], contexts[0]).content]
            else:
                contents = self._handled(opened, contexts, ref)
        except Exception as error:
            logging.getLogger("fedlora").exception("client failed")
            contents = [named_line(error)] * len(messages)
        return list(zip(contents, [context.state for context in contexts], strict=True))

    def _handled(
        self, messages: Sequence[Message], contexts: Sequence[Context], ref: SharedModelRef
    ) -> list[RecordDict | str]:
        from clients.handler import handle, handle_together

        self._model.attach(ref)
        runtimes = self._model.runtimes
        contents = [message.content for message in messages]
        runs, nodes = [c.run_config for c in contexts], [c.node_config for c in contexts]
        states = [c.state for c in contexts]
        if len(messages) > 1:
            return handle_together(contents, runs, nodes, runtimes, states)
        kind = messages[0].metadata.message_type
        return [handle(kind, contents[0], runs[0], nodes[0], runtimes, states[0])]

    def evaluate(self, ref: SharedModelRef, model: Any, batches: Sequence[Any], precision: str) -> list[Any]:
        """The outcome of each batch of test examples.

        Args:
            ref: the base and the data.
            model: adapters and head, or a reference to them.
            batches: indices of test examples.
            precision: as ``evaluation-precision``.
        """
        from clients.evaluation import run_batch
        from fedlora.models.packed_linear import evaluating

        runtime = self._model.attach(ref)
        runtime.model.load(*model)
        data = runtime.data
        model_here, task = runtime.model, runtime.model.task
        with evaluating(runtime.model, precision):
            return [run_batch(model_here, task, data.test, batch, data.pad_token_id) for batch in batches]

    def base_hashes(self, ref: SharedModelRef) -> Hashes:
        """See `fedlora.simulation.shared_model.AttachedModel.base_hashes`."""
        return self._model.base_hashes(ref)


def _check_shared(state_dir: str) -> None:
    home = Path(state_dir).parent
    if not home.is_dir():
        raise RunFailed(
            f"{home}: is not there on {socket.gethostname()}; on a cluster --out must be a directory that "
            "all machines share"
        )


def _opened(message: RemoteMessage) -> Any:
    import ray
    from flwr.app import Message, RecordDict

    records = {n: ray.get(r) if isinstance(r, ray.ObjectRef) else r for n, r in message.records.items()}
    return Message(metadata=message.metadata, content=RecordDict(records))  # type: ignore[call-overload]
