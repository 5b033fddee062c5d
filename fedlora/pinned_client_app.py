"""``flwr-clientapp`` of a node that runs its own fedlora: of what the server ships nothing is carried out.

Flower sends the app's code with a run, unpacks it and imports its ClientApp. A node's start script puts this
command before Flower's: it compares the shipped Python files with the installed ones, letter for letter, and
takes the installed ClientApp where they are the same. Else the node declines; its own log says what differs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fedlora.core.code import code_root, top_packages

LOADER, INSTALLS = "get_load_client_app_fn", "--allow-runtime-dependency-installation"
"""Flower's function that is replaced, and its option by which a bundle brings packages."""
SUPERNODE = "flwr.supernode.cli.flower_supernode"
REFUSED = "the node runs its own fedlora and declines this code; its own log says why"


def difference(shipped: Path) -> str:
    """The first Python file of a directory that is not the installed one; empty where all are the same.

    Args:
        shipped: an unpacked app.
    """
    ours = {
        name: source
        for package in top_packages()
        for name, source in _sources(code_root(), code_root() / package).items()
        if not name.endswith("_test.py")  # Flower leaves these out of its bundles
    }
    theirs = _sources(shipped, shipped)
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in theirs:
            return f"{name} is not shipped"
        if name not in ours:
            return f"{name} is shipped and not installed"
        if theirs[name] != ours[name]:
            return f"{name} is not the installed one"
    return ""


def _sources(root: Path, within: Path) -> dict[str, bytes]:
    """Python files in a directory by their names below another."""
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(within.rglob("*.py"))}


def loader(directory_of: Callable[[str, str, str], Path]) -> Callable[..., Callable[[str, str, str], Any]]:
    """Flower's ``get_load_client_app_fn``, which loads the installed ClientApp for the same code alone.

    Args:
        directory_of: where Flower unpacked an app, by id, version and hash.
    """

    def get(*_: Any, **__: Any) -> Callable[[str, str, str], Any]:
        def load(fab_id: str, fab_version: str, fab_hash: str) -> Any:
            why = difference(directory_of(fab_id, fab_version, fab_hash))
            if why:
                logging.getLogger("fedlora").warning("declined the code of app %s: %s", fab_hash[:16], why)
                raise RuntimeError(REFUSED)
            from fedlora.client_app import app

            return app

        return load

    return get


def main() -> None:
    """Flower's command with this loader in place of its own.

    Raises:
        SystemExit: a Flower that would load the code another way, or is to install what the app asks for.
    """
    # Flower's package of commands would import the SuperNode's server too: a third of the start of a message.
    unused = ModuleType(SUPERNODE)
    vars(unused)["flower_supernode"] = None
    sys.modules.setdefault(SUPERNODE, unused)

    from flwr.common.config import get_project_dir
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    if LOADER not in run_clientapp.run_clientapp.__code__.co_names:
        raise SystemExit(f"flwr-clientapp: this Flower loads apps by another function than {LOADER}")
    if INSTALLS in sys.argv:
        raise SystemExit(f"flwr-clientapp {INSTALLS}: this node installs nothing that a server asks for")
    vars(run_clientapp)[LOADER] = loader(get_project_dir)
    flwr_clientapp()


if __name__ == "__main__":
    main()
