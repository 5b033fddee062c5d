"""The body of an actor: a ClientApp in a process of its own, on one thread."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import RunFailed, named_line

if TYPE_CHECKING:
    from fedlora.engines.lending import Hashes, Loan

FEDLORA_APP = "fedlora.client_app:app"
Answer = tuple[Any, Any]
"""A reply's content, or a one-line error; and the client's state."""


@dataclass(slots=True)
class Letter:
    """A message on its way to an actor.

    Attributes:
        metadata: the message's.
        records: its records by name, each itself or a reference into Ray's object store.
        context: the client's Flower context.
    """

    metadata: Any
    records: Mapping[str, Any]
    context: Any


class ClientWorker:
    """Carries out what a driver asks for.

    Args:
        client_app: ``module:attribute`` of the ClientApp.
    """

    def __init__(self, client_app: str) -> None:
        import torch

        torch.set_num_threads(1)
        module, _, name = client_app.partition(":")
        self._module = importlib.import_module(module)
        self._app = getattr(self._module, name)
        if client_app == FEDLORA_APP:  # which imports nothing heavy by itself
            importlib.import_module("fedlora.deployment.handle")
            importlib.import_module("fedlora.engines.lending")

    def ready(self) -> int:
        """The process id, once everything is imported."""
        return os.getpid()

    def node(self) -> str:
        """The id of the Ray node that this process is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def handle(self, letters: Sequence[Letter], loan: Loan | None) -> list[Answer]:
        """An answer to each letter, in their order; several letters are trained together.

        Args:
            letters: one message, or a cohort of orders to train for fedlora's ClientApp.
            loan: the model and the data, if the ClientApp is fedlora's.

        Raises:
            RunFailed: the run directory is not on this machine.
        """
        from fedlora.engines.lending import borrow

        contexts = [letter.context for letter in letters]
        if loan is not None:
            _check_shared(str(contexts[0].node_config["state-dir"]))
        try:
            if loan is not None:
                borrow(loan)
            messages = [_opened(letter) for letter in letters]
            if len(letters) > 1:
                replies = self._module.train_together(messages, contexts)
            else:
                replies = [self._app(messages[0], contexts[0])]
        except Exception as error:
            logging.getLogger("fedlora").exception("client failed")
            replies = [named_line(error)] * len(letters)
        contents = [reply if isinstance(reply, str) else reply.content for reply in replies]
        return list(zip(contents, [context.state for context in contexts], strict=True))

    def evaluate(self, loan: Loan, model: Any, batches: Sequence[Any]) -> list[Any]:
        """The outcome of each batch of test examples.

        Args:
            loan: the base and the data.
            model: adapters and head, or a reference to them.
            batches: indices of test examples.
        """
        from clients.evaluation import run_batch
        from clients.packed import packed_base
        from fedlora.engines.lending import borrow

        worker = borrow(loan)
        worker.model.load(*model)
        data = worker.data
        module, task = worker.model.module, worker.model.task
        with packed_base(worker.model):
            return [run_batch(module, task, data.test, batch, data.pad_token_id) for batch in batches]

    def base_hashes(self, loan: Loan) -> Hashes:
        """See `fedlora.engines.lending.base_hashes`."""
        from fedlora.engines import lending

        return lending.base_hashes(loan)


def _check_shared(state_dir: str) -> None:
    home = Path(state_dir).parent
    if not home.is_dir():
        raise RunFailed(
            f"{home}: is not there on {socket.gethostname()}; on a cluster --out must be a directory that "
            "all machines share"
        )


def _opened(letter: Letter) -> Any:
    import ray
    from flwr.app import Message, RecordDict

    records = {n: ray.get(r) if isinstance(r, ray.ObjectRef) else r for n, r in letter.records.items()}
    return Message(metadata=letter.metadata, content=RecordDict(records))  # type: ignore[call-overload]
