"""The one place that touches Flower's private task identity.

Outside a Flower process a `Message` cannot be built until the process says which run and node it
speaks for. Flower has no public way to say so (checked on flwr 1.41 and 1.42); a test holds this module
against the installed version.
"""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE_ID = 1


def speak_as_server(run_id: int) -> None:
    """Let this process build messages as the ServerApp of a run."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
