"""Reaching Ray, on this machine or at ``engine.address``, with one-line errors and no long waits."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, RunFailed, first_line

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""No calls home; inherited by every actor."""
ANSWER_SECONDS = 5.0
"""How long a cluster has to accept a connection."""
TRIAL_SECONDS = 45.0
"""How long it may take to join it; Ray itself would try for minutes, then end the process."""
LAST_STARTED = Path("/tmp/ray/ray_current_cluster")
"""Where ``ray start`` notes its address, which stays there when the cluster is killed."""
TRIAL = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="CRITICAL")
except Exception as error:
    sys.exit(next(iter(str(error).strip().splitlines()), type(error).__name__))
"""


_ahead: set[str] = set()
"""The address of a Ray that `ahead` has reached and nobody has taken over; Ray is one for a process, too."""


@contextmanager
def ahead(address: str, module: str) -> Iterator[None]:
    """Reach Ray while a module is imported, each of which takes seconds; the first `connect` inside has it.

    Args:
        address: ``engine.address``.
        module: what is needed next.

    Raises:
        ConfigError: as `connect`.
    """
    with ThreadPoolExecutor(1) as aside:
        aside.submit(importlib.import_module, module)
        if connect(address):
            _ahead.add(address)
    try:
        yield
    finally:
        if address in _ahead:
            _ahead.remove(address)
            import ray

            ray.shutdown()


def connect(address: str) -> bool:
    """Join the cluster at an address, or start Ray on this machine; False where this process has one already.

    That one is used and not shut down by whoever was answered False: it is its caller's, for more than a run.
    One that is there `ahead` is taken over.

    Raises:
        ConfigError: the cluster does not answer, has another version of Ray or Python, or is another one than
            this process has joined.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        _check_joined(address, str(ray.get_runtime_context().gcs_address))
        taken_over = address in _ahead
        _ahead.discard(address)
        return taken_over
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    check_address(address)
    if address:
        _try(address)
    else:
        settings["include_dashboard"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with _sigterm_kept():
                ray.init(address=address or "local", **settings)
        except Exception as error:  # a node of Ray that starts too slowly is a bare one
            raise _unreachable(address, str(error)) from None
    return True


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Inside, Ray may answer SIGTERM by its own handler; afterwards whoever did before does again.

    Ray's kills the raylet under the driver, which then aborts with a trace. Where nobody handles the signal
    Ray's stays, for it leaves no process behind.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before):
            signal.signal(signal.SIGTERM, before)


def _check_joined(address: str, joined: str) -> None:
    """Refuse an address that is not that of the Ray which this process has."""
    if address in ("", "auto", joined):
        return
    check_address(address)
    (host, _, port), (other, _, its) = address.rpartition(":"), joined.rpartition(":")
    if port != its or socket.gethostbyname(host) != socket.gethostbyname(other):
        raise ConfigError(
            f"engine.address = {address!r}: this process uses Ray at {joined} already, leave it "
            "(ray.shutdown()) or name that address"
        )


def join(address: str) -> None:
    """Join the Ray that another process of this run has reached; nothing if this process did before."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    import ray

    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


def put(value: Any) -> Any:
    """A reference to a value in Ray's object store.

    Raises:
        RunFailed: neither the memory for it nor the disk behind it has room.
    """
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError

    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise RunFailed(
            f"Ray's object store is full, and so is the disk behind it: {first_line(error)}"
        ) from None


def check_address(address: str) -> None:
    """Whether somebody listens at an address; for ``auto``, at the one that ``ray start`` has left behind.

    Raises:
        ConfigError: no address, or nobody there.
    """
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        left = "the address"
        try:
            if LAST_STARTED.is_file():
                left = LAST_STARTED.read_text().strip()
                _knock(left)
        except (OSError, OverflowError, ValueError) as error:
            raise _unreachable(address, f"{left} in {LAST_STARTED}: {error}") from None
    if address in ("", "auto"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ConfigError(
            f"engine.address = {address!r}: accepted are auto and host:port of a cluster's head; fedlora "
            "runs on a node of the cluster, not through Ray Client"
        )
    try:
        _knock(address)
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from None


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), ANSWER_SECONDS).close()


def _try(address: str) -> None:
    """Join in another process first: where nothing fits, Ray blocks for minutes and then exits."""
    try:
        subprocess.run(
            [sys.executable, "-c", TRIAL, address],
            check=True, capture_output=True, text=True, timeout=TRIAL_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise _unreachable(address, f"no answer within {TRIAL_SECONDS:.0f} s") from None
    except subprocess.CalledProcessError as error:
        raise _unreachable(address, error.stderr.strip().rpartition("\n")[2]) from None


def _unreachable(address: str, reason: str) -> ConfigError:
    line = first_line(reason, "no answer")
    if not address:
        return ConfigError(f"engine.address = '': Ray cannot be started on this machine ({line})")
    return ConfigError(f"engine.address = {address!r}: no Ray cluster answers there ({line})")
