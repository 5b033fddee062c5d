"""Owner's policy of a node: what may leave it, whatever a run asks for.

A node is protected in every run in which it makes what it sends private itself (``privacy.mode = "example"``,
``secure.noise = "distributed"``), and in every run where its owner sets a limit (``max-epsilon``).
From a protected node leave

    the noisy update, and the claim that goes with it
    with ``release-metrics``    the training loss and the number of examples
    with ``max-evaluations``    accuracies and losses, so many times in all: exactly, or with
                                ``evaluation-epsilon`` noised and charged to the ledger

Metrics and exact evaluations are outside of the claim, which is why only the owner can allow them. Whatever
else is asked for has one answer: the same words after the same time, so that neither tells a server anything
of the data.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from clients.node_settings import EvaluationNoise, NodeSettings
from fedlora import wire
from fedlora.assets.models import BUILT_IN_MODELS
from fedlora.config import RunConfig
from fedlora.config.privacy import ADD_OR_REMOVE_ONE
from fedlora.core.files import write_atomic
from fedlora.core.sealed import read_sealed, sealed
from fedlora.data.columns import BUILT_IN
from fedlora.errors import ConfigError, FedLoraError, OwnDataRefused

REFUSAL = "the node declines; its own log says why"
REFUSAL_SECONDS = 5.0
"""A refusal leaves a protected node at a whole multiple of this after its message came in."""
EVALUATIONS = "evaluations.json"
LARGEST_VALUE = 1e4
"""In size, of a factor, a scaling, a value of the head or of a moved base that a protected node takes."""


def is_protected(config: RunConfig, settings: NodeSettings) -> bool:
    """Whether the owner's policy holds for this run."""
    return config.privacy.private or config.secure.noise != "none" or settings.max_epsilon > 0


def refuse_beyond_limit(config: RunConfig, settings: NodeSettings) -> None:
    """Hold a run to the owner's limit, as far as it shows before training; the ledger does the rest.

    Raises:
        ConfigError: a run that gives no guarantee for an example, or a looser one than is allowed.
    """
    if settings.secure_clients and config.secure.mode != "sums":
        raise ConfigError(
            f"secure.mode = {config.secure.mode!r}: the owner of this node takes part in secure sums alone, "
            f"of at least {settings.secure_clients} clients"
        )
    if not settings.max_epsilon:
        return
    limit = f"the owner of this node allows epsilon {settings.max_epsilon:g} at delta {settings.max_delta:g}"
    if not config.privacy.private:
        raise ConfigError(f"privacy.mode = {config.privacy.mode!r}: {limit}, which takes 'example'")
    if config.privacy.target_delta > settings.max_delta:
        raise ConfigError(f"privacy.target-delta = {config.privacy.target_delta:g}: {limit}")


def refuse_beyond_allowed(config: RunConfig, settings: NodeSettings) -> None:
    """Hold a run's configuration to what its owner lets it name on this machine (``allow``).

    Files and directories are read, and ``module:Class`` is imported; nobody but the owner says which. Names
    of built-in models and data, and hub ids of which nothing lies here, are no files. Models bring no code.

    Raises:
        OwnDataRefused: something that is not allowed; who sent it is told the one refusal.
    """
    data = () if settings.data else (("data.name", config.data.name), ("data.test", config.data.test))
    files = {"model.name": config.model.name, "privacy.ledger": config.privacy.ledger, **dict(data)}
    named = {key: value for key, value in files.items() if _is_file(key, value)}
    classes = {"train.optimizer": config.train.optimizer, "lora.method": config.lora.method}
    named |= {key: value for key, value in classes.items() if ":" in value}
    for key, value in named.items():
        if value not in settings.allowed:
            raise OwnDataRefused(f"{key} = {value!r}: allow in node.toml does not name it", REFUSAL)


def _is_file(key: str, value: str) -> bool:
    """Whether a value leads to a file: it is a path, or something of its name lies here."""
    if not value or value in {"model.name": BUILT_IN_MODELS, "data.name": BUILT_IN}.get(key, ()):
        return False
    if key == "privacy.ledger":
        return True
    path = Path(value)
    return path.is_absolute() or value.startswith(("~", ".")) or ".." in path.parts or path.exists()


def in_owners_name(config: RunConfig, settings: NodeSettings, *, simulation: bool) -> RunConfig:
    """The run with the owner's name for data, their count and units, and say on metrics, whatever it has.

    Raises:
        ConfigError: a run that takes the count for public although the owner declares another, or that
            needs a declared one where the owner declares none; units for the one and examples for the other.
    """
    privacy, declared = config.privacy, settings.declared_examples
    if privacy.private and (declared or not simulation):
        hidden = privacy.neighboring_relation == ADD_OR_REMOVE_ONE
        key = f"privacy.neighboring-relation = {privacy.neighboring_relation!r}"
        if declared and not hidden:
            raise ConfigError(
                f"{key}: the owner of this node declares how many examples count, which takes "
                f"{ADD_OR_REMOVE_ONE!r}"
            )
        if hidden and not declared:
            raise ConfigError(f"{key}: the owner of this node declares no declared-examples, which it takes")
        privacy = replace(privacy, declared_examples=declared)
    if privacy.private and not simulation:
        privacy = replace(privacy, release_metrics=privacy.release_metrics and settings.release_metrics)
    if privacy.private and settings.data:
        if bool(privacy.unit_column) != bool(settings.unit_column):
            raise ConfigError(
                f"privacy.unit-column = {privacy.unit_column!r}: the owner of this node has unit-column = "
                f"{settings.unit_column!r}, both must name a column or neither"
            )
        privacy = replace(privacy, unit_column=settings.unit_column)
    if settings.dataset_id:
        privacy = replace(privacy, dataset_id=settings.dataset_id)
    if not simulation and config.data.evaluation_sets:  # files of the server's, which alone reads them
        config = replace(config, data=replace(config.data, evaluation_sets=""))
    return config if privacy is config.privacy else replace(config, privacy=privacy)


def evaluations_of(settings: NodeSettings) -> dict[str, Any]:
    """How a protected node evaluates, as fields of `clients.node.Node`.

    With noise its ledger says how often; exact evaluations are counted. Second adapters have seen every
    training example without noise, and noise that hides a test example does not hide one of those: what they
    reach leaves where the owner releases metrics and no evaluation is charged, whatever the run says.
    """
    if not settings.evaluation_epsilon:
        count = partial(count_evaluation, settings)
        return {"before_evaluation": count, "tells_second": settings.release_metrics}
    noise = EvaluationNoise(
        epsilon=settings.evaluation_epsilon, count_hidden=bool(settings.declared_examples)
    )
    return {"evaluation_noise": noise, "tells_second": False}


def count_evaluation(settings: NodeSettings) -> None:
    """Count one evaluation of a protected node, on disk before it begins.

    Raises:
        ConfigError: the owner allows none, or no further one.
    """
    most, path = settings.max_evaluations, settings.home / EVALUATIONS
    if not most:
        raise ConfigError("max-evaluations = 0: the owner of this node lets no evaluation out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        done = _evaluations_done(path)
        if done >= most:
            raise ConfigError(f"max-evaluations = {most}: so many have left this node, see {path}")
        write_atomic(path, json.dumps(sealed({"done": done + 1})) + "\n")


def _evaluations_done(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        done = read_sealed(path).get("done")
    except ConfigError:
        done = None
    if type(done) is not int or done < 0:
        raise ConfigError(f"{path}: is damaged, no evaluation leaves the node until its owner has deleted it")
    return done


def one_refusal(answer: Callable[[], wire.Reply]) -> wire.Reply:
    """The reply of a protected node: whatever goes wrong, and every reply that declines, as the one refusal.

    The reason is for the node's own log.
    """
    began = time.monotonic()
    try:
        reply = answer()
    except Exception as error:
        foreseen = isinstance(error, FedLoraError)
        logging.getLogger("fedlora").warning("declined: %s", error, exc_info=None if foreseen else error)
        reply = wire.Reply(status=wire.DECLINED, own_reason=str(error))
    if reply.status != wire.DECLINED:
        return reply
    time.sleep(REFUSAL_SECONDS - (time.monotonic() - began) % REFUSAL_SECONDS)
    return wire.Reply(status=wire.DECLINED, reason=REFUSAL, own_reason=reply.own_reason or reply.reason)


def explained_refusal(answer: Callable[[], wire.Reply]) -> wire.Reply:
    """The reply of an unprotected node: a request that cannot be carried out is declined with its reason."""
    try:
        return answer()
    except ConfigError as error:
        logging.getLogger("fedlora").warning("declined: %s", error)
        told = error.told if isinstance(error, OwnDataRefused) else str(error)
        return wire.Reply(status=wire.DECLINED, reason=told, own_reason=str(error))
    except OSError as error:  # a full disk; where the node's files lie is for its own log
        logging.getLogger("fedlora").warning("declined: %s", error)
        told = f"the node's system refuses: {error.strerror or type(error).__name__}"
        return wire.Reply(status=wire.DECLINED, reason=told, own_reason=str(error))
