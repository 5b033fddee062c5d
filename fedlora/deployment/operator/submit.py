"""``fedlora run --federation``: a configuration on a running federation, followed until its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.config import RunConfig, to_flat, unflatten
from fedlora.core.code import code_root, project_file, top_packages
from fedlora.data.columns import BUILT_IN
from fedlora.deployment.operator.layout import CONNECTION, FAILURE, LOG, OWN, Layout
from fedlora.deployment.operator.operate import flwr, flwr_command, operator_environment, run_status
from fedlora.errors import ConfigError, RunFailed
from fedlora.server.directory import RunDirectory
from fedlora.server.results import read_result
from fedlora.server.validate import check

APP = "fedlora"
COMPLETED = "finished:completed"
LOOK_SECONDS = 0.2
ANSWER_SECONDS = 60.0
"""How long a SuperLink may take to start again after it died."""

Progress = Callable[[dict[str, Any]], None]
"""Told about each round: its record, see `fedlora.server.records`."""


def submit(
    layout: Layout,
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """The result record of one run on a federation; its files are in ``path``, on the server's machine.

    Args:
        layout: the federation; its SuperLink runs on this machine.
        config: the run.
        path: the run directory.
        resume: go on after the last checkpoint in it.
        progress: told about each round as it is written down.

    Raises:
        ConfigError: the configuration cannot be carried out; nothing was started.
        RunFailed: the run failed, or Flower lost it; what was written before is kept.
    """
    check(config)
    if config.privacy.ledger:
        raise ConfigError(f"privacy.ledger = {config.privacy.ledger!r}: a node has its own ledger")
    if config.privacy.declared_examples:
        raise ConfigError(
            f"privacy.declared-examples = {config.privacy.declared_examples}: a node's owner declares "
            "its own in node.toml"
        )
    directory = RunDirectory(path.absolute(), resume=resume)
    # The directory is looked through here, so that the ServerApp may always go on with what is there.
    config = replace(whole_paths(config), output_dir=str(directory.path), resume=True)
    (directory.path / FAILURE).unlink(missing_ok=True)
    bring_own_strategy(config, directory.path / OWN)
    checkpoint = directory.load_checkpoint()
    told = checkpoint.state.round if checkpoint is not None else 0
    directory.keep_rounds(told)
    with _app(directory.path) as app:
        settings = app.parent / "run.toml"
        settings.write_text(tomli_w.dumps(unflatten(to_flat(config))))
        answer = flwr(layout, "run", str(app), CONNECTION, "--format", "json", "--run-config", str(settings))
    run_id = str(answer["run-id"])
    for _ in _while_streaming(layout, run_id, directory.path / LOG):
        told = _tell(directory, told, progress)
    _tell(directory, told, progress)
    return _outcome(layout, run_id, directory)


def bring_own_strategy(config: RunConfig, place: Path) -> None:
    """Copy the file or package of a ``module:Class`` strategy to where the ServerApp looks for it.

    It is the server's alone: the bundle that nodes get stays fedlora's own code. An installed one stays where
    it is, as the ServerApp runs in the same environment.

    Raises:
        ConfigError: a package without ``__init__.py``.
    """
    name, colon, _ = config.strategy.name.partition(":")
    if not colon:
        return
    top = name.partition(".")[0]
    if sys.modules[top].__file__ is None:
        raise ConfigError(f"strategy.name = {config.strategy.name!r}: {top}/ needs an __init__.py")
    source = Path(str(sys.modules[top].__file__)).resolve()
    if source.is_relative_to(Path(sys.prefix).resolve()):
        return
    place.mkdir(parents=True, exist_ok=True)
    if source.name == "__init__.py":
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source.parent, place / top, ignore=ignored, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, place / source.name)


def whole_paths(config: RunConfig) -> RunConfig:
    """The run with its files of examples by absolute paths: the ServerApp works in another directory.

    What a built-in dataset is called stays a name, whatever lies in this directory.
    """

    def whole(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if name and name not in BUILT_IN and path.exists() else name

    data = config.data
    return replace(
        config,
        data=replace(data, name=whole(data.name), test=whole(data.test), public=whole(data.public)),
    )


@contextmanager
def _app(near: Path) -> Iterator[Path]:
    """A Flower app directory with this very code and all keys of the configuration."""
    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder:
        app = Path(folder) / APP
        for package in top_packages():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(code_root() / package, app / package, ignore=ignored)
        declared = tomllib.loads(project_file().read_text())
        project = {key: declared["project"][key] for key in ("name", "version", "license", "dependencies")}
        flower = declared["tool"]["flwr"]
        flower["app"]["fab-include"] = [*(f"{package}/**/*.py" for package in top_packages()), "/LICENSE"]
        shutil.copyfile(project_file().with_name("LICENSE"), app / "LICENSE")
        (app / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": flower}}))
        yield app


def _while_streaming(layout: Layout, run_id: str, log: Path) -> Iterator[None]:
    """Yield now and then while Flower streams the ServerApp's log, which ends with the run."""
    with log.open("ab") as file:
        stream = subprocess.Popen(
            flwr_command("log", run_id, CONNECTION, "--stream"),
            env=operator_environment(layout),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        while stream.poll() is None:
            yield
            time.sleep(LOOK_SECONDS)
    finally:
        if stream.poll() is None:
            stream.terminate()
        stream.wait()


def _tell(directory: RunDirectory, told: int, progress: Progress) -> int:
    """Tell the rounds after ``told``; returns the last one that was told."""
    for record in directory.rounds():
        if record["round"] > told:
            progress(record)
            told = record["round"]
    return told


def _status(layout: Layout, run_id: str, directory: RunDirectory) -> tuple[str, str]:
    """`run_status`, of a SuperLink that may just be starting again."""
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return run_status(layout, run_id)
        except RunFailed as error:
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"run {run_id}: the SuperLink does not answer ({error}), see {directory.path / LOG}; "
                    "what was written is kept, go on with --resume"
                ) from None
            time.sleep(1)


def _outcome(layout: Layout, run_id: str, directory: RunDirectory) -> dict[str, Any]:
    """The result of a run that has ended.

    Raises:
        ConfigError, RunFailed: why the ServerApp gave up, or what Flower says about the run.
    """
    status, details = _status(layout, run_id, directory)
    failure = directory.path / FAILURE
    if failure.exists():
        why = json.loads(failure.read_text())
        raise (ConfigError if why["wrong-request"] else RunFailed)(why["reason"])
    if status != COMPLETED:
        raise RunFailed(
            f"run {run_id} is {status} ({details or 'no reason given'}), see {directory.path / LOG}; "
            "what was written is kept, go on with --resume"
        )
    return read_result(directory.path)
