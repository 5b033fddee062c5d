"""What a run that goes on has in common with the rounds that were done: keys, examples, weights."""

from __future__ import annotations

from pathlib import Path

from clients.privacy.client import ClientPrivacy
from fedlora.config import RunConfig, Scalar, to_flat
from fedlora.errors import ConfigError
from fedlora.server.identity import NO_EFFECT
from fedlora.server.provenance import PROVENANCE
from fedlora.server.results import BEFORE, CONFIG, ROUNDS, RUN_KEY, SAMPLES, read_rounds

FREE_TO_CHANGE = ("num-server-rounds", "max-rank", "license", "generate-every", "early-stopping-", *NO_EFFECT)
"""Keys that a resumed run may set anew: they do not change the rounds that were done. (The number of rounds
does where learning rates follow from it.)"""
COHORT_SIZE = "engine.cohort-size"
"""The one key of the engine that changes bits; 0 is written by engines that train one by one."""
INPUTS = (
    "data.name", "data.test", "data.evaluation-sets", "data.public", "model.name", "model.adapter",
    "devices.trace",
)  # fmt: skip
"""Keys that name what is not in the configuration, see `fedlora.server.inputs`."""
ATTEMPT = frozenset({CONFIG, PROVENANCE, RUN_KEY, BEFORE, SAMPLES, ROUNDS, "flower.log", "failure.json"})
"""What a run that stopped before its first round may leave."""


def check_keys(config: RunConfig, before: RunConfig, path: Path, *, continues: bool, done: int = 0) -> None:
    """Refuse keys that change what the finished rounds mean.

    Args:
        config: as the run is asked for now.
        before: as it was begun.
        path: its directory.
        continues: rounds that were done before are part of it.
        done: their number.

    Raises:
        ConfigError: there is one.
    """
    flat = to_flat(config)
    for key, value in to_flat(before).items():
        more = continues and key == "num-server-rounds" and value != flat[key]
        fixed = more and _follow_from_rounds(config, before)
        if fixed or not _may_become(key, value, flat[key]):
            raise ConfigError(f"{key} = {flat[key]!r}: the run in {path} has {value!r}; it cannot change")
    if config.num_server_rounds < done:
        raise ConfigError(
            f"num-server-rounds = {config.num_server_rounds}: the run in {path} has done {done}; "
            f"give {done} or more, or use another --out"
        )


def other_inputs(config: RunConfig, path: Path) -> ConfigError:
    """The error that what a configuration names is not what the run in a directory was given."""
    flat = to_flat(config)
    named = ", ".join(f"{key} = {flat[key]!r}" for key in INPUTS if flat[key])
    return ConfigError(
        f"{named}: the rounds in {path} were made with other data or weights than are there now; put them "
        "back, or use another --out"
    )


def _follow_from_rounds(config: RunConfig, before: RunConfig) -> bool:
    """Whether rounds that were done would have been others with another number of rounds."""
    if config.schedules_rounds or not config.devices.waits:
        return True
    client_level = config.privacy.client_level and before.privacy.client_level
    return client_level and ClientPrivacy(config).noise != ClientPrivacy(before).noise


def _may_become(key: str, before: Scalar, now: Scalar) -> bool:
    """Whether a resumed run may have this value of a key where it had that one."""
    if key == COHORT_SIZE:
        return (before or 1) == (now or 1)
    return before == now or key.startswith(FREE_TO_CHANGE)


def only_tried(path: Path) -> bool:
    """Whether a directory holds no more than a run that stopped before its first round."""
    found = {file.name for file in path.iterdir()}
    return found <= ATTEMPT and {CONFIG, PROVENANCE} <= found and not read_rounds(path)
