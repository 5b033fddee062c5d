"""A node's ``flwr-clientapp``: the node's fork server carries the message out, or this process does.

Only the standard library is imported before it is known which of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedlora.deployment.node.fork_client import OWNER, handed_over


def main() -> None:
    """Hand the message over, or carry it out."""
    state = os.environ.get("FEDLORA_STATE_DIR", "")
    os.environ.setdefault(OWNER, str(os.getppid()))
    if state and handed_over(Path(state), sys.argv[1:]):
        return
    from fedlora.pinned_client_app.message import carry_out

    carry_out()


if __name__ == "__main__":
    main()
