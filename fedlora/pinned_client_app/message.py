"""A message's process: Flower's, with the installed ClientApp in the place of the shipped one."""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fedlora.pinned_client_app.bundle import difference

UNPACKS, LOADER = "install_from_fab", "get_load_client_app_fn"
"""Flower's functions that are replaced."""
INSTALLS = "--allow-runtime-dependency-installation"
"""Its option by which a bundle brings packages."""
SUPERNODE = "flwr.supernode.cli.flower_supernode"
REFUSED = "the node runs its own fedlora and declines this code; its own log says why"


def in_place_of_unpacking(bundle: bytes, *_: Any, **__: Any) -> None:
    """Flower's ``install_from_fab``: refuses other code, and unpacks nothing.

    Raises:
        RuntimeError: what is shipped is not what is installed.
    """
    why = difference(bundle)
    if why:
        app = hashlib.sha256(bundle).hexdigest()[:16]
        logging.getLogger("fedlora").warning("declined the code of app %s: %s", app, why)
        raise RuntimeError(REFUSED)


def in_place_of_loading(*_: Any, **__: Any) -> Callable[..., Any]:
    """Flower's ``get_load_client_app_fn``: the installed ClientApp, whatever the app is called."""

    def load(*_: str) -> Any:
        from fedlora.client_app import app

        return app

    return load


def preload() -> None:
    """Import all that a message's process needs of Flower and of this package."""
    # Flower's package of commands would import the SuperNode's server too: a third of the start of a message.
    unused = ModuleType(SUPERNODE)
    vars(unused)["flower_supernode"] = None
    sys.modules.setdefault(SUPERNODE, unused)
    flowers = "flwr.supernode.cli", "flwr.supernode.runtime.run_clientapp", "httpcore"
    for name in (*flowers, "fedlora.client_app"):
        importlib.import_module(name)


def carry_out() -> None:
    """Flower's command with these functions in place of its own.

    Raises:
        SystemExit: a Flower that would load the code another way, or is to install what the app asks for.
    """
    preload()

    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    for name in (UNPACKS, LOADER):
        if name not in run_clientapp.run_clientapp.__code__.co_names:
            raise SystemExit(f"flwr-clientapp: this Flower loads apps by another function than {name}")
    if INSTALLS in sys.argv:
        raise SystemExit(f"flwr-clientapp {INSTALLS}: this node installs nothing that a server asks for")
    vars(run_clientapp)[UNPACKS], vars(run_clientapp)[LOADER] = in_place_of_unpacking, in_place_of_loading
    flwr_clientapp()
