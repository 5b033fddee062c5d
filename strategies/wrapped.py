"""Flower's wrappers for differential privacy around a strategy: which fit, and how their noise gets in.

`DifferentialPrivacyServerSideFixedClipping` and its kin clip the clients' arrays and add noise to what
`aggregate_train` returns, for as long as these arrays are the clients' plain mean. The noise protects
somebody only if the next instructions are made from the noisy arrays, and if no other number of the clients
gets past it. So strategies whose aggregate is another function are refused where the wrapper is built, which
Flower has no hook for: `watch_flowers_wrappers` puts one before the constructors of its two base classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from logging import WARNING
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from fedlora import wire
from fedlora.core.factors import PLAIN
from fedlora.core.state import State
from fedlora.errors import ConfigError, FactorShapeError
from strategies.rule import Rule

if TYPE_CHECKING:
    from strategies.flower import FactorStrategy

BASES = (
    DifferentialPrivacyServerSideFixedClipping.__mro__[1],
    DifferentialPrivacyServerSideAdaptiveClipping.__mro__[1],
)
"""The classes whose constructors all wrappers share."""


def no_plain_mean(rule: Rule) -> str:
    """Reason that the arrays after a round are no plain mean of what clients ship; empty if they are."""
    facts = rule.facts
    if not facts.mean:
        return "its aggregate is no mean of what clients ship"
    if facts.updates_base:
        return "a part of the mean moves into the base"
    if facts.personal or not facts.trained <= PLAIN:
        return "not all that clients train is in the arrays"
    if facts.rotates_basis:
        return "it writes the mean in another basis, which one client may move by more than its share"
    if not rule.plain:
        return "a robust centre or a server optimiser is no plain mean"
    return ""


def check_wrapped(strategy: FactorStrategy, wrapper: str) -> None:
    """Refuse a strategy that a wrapper's noise does not cover.

    Raises:
        ConfigError: which property of the rule or setting it is, and what is there instead.
    """
    rule, why = strategy.rule, no_plain_mean(strategy.rule)
    if why:
        instead = (
            "client_dp = strategies.client_dp.ClientDP(...)" if rule.facts.client_dp else "another strategy"
        )
        raise ConfigError(f"{wrapper} around {rule.facts.title}: {why}, use {instead}")
    rounded = {strategy.transport.wire_dtype, strategy.transport.upload} != {"float32"}
    if rule.init_a != "kaiming" or rounded or strategy.own_specs:
        raise ConfigError(
            f"{wrapper} around {rule.facts.title}: updates are clipped against the global arrays, so that "
            "all clients must start from these: leave out init_a, wire_dtype, upload and client_spec"
        )
    if strategy.weighted_by_key is not None:
        log(
            WARNING,
            "%s: clients weigh by %r, one of them may count for more than the noise covers: "
            "weighted_by_key=None weighs them equally",
            wrapper,
            strategy.weighted_by_key,
        )
    strategy.diagnostics = False


def with_arrays(state: State, arrays: ArrayRecord) -> State:
    """The state with these factors and head in place of its own.

    Raises:
        ConfigError: other modules, tensors or shapes.
    """
    parts = wire.from_peft(wire.from_record(arrays))
    scaling = next(iter(state.adapters.values())).scaling
    try:
        adapters = parts.lora(scaling)
    except FactorShapeError as error:
        raise ConfigError(f"the arrays of the round: {error}") from None
    given = {wire.key_of(n, x): t.shape for n, f in adapters.items() for x, t in f.tensors().items()}
    own = {wire.key_of(n, x): t.shape for n, f in state.adapters.items() for x, t in f.tensors().items()}
    given |= {name: t.shape for name, t in parts.head.items()}
    own |= {name: t.shape for name, t in state.head.items()}
    if given != own:
        odd = sorted(name for name in {*given, *own} if given.get(name) != own.get(name))
        raise ConfigError(f"the arrays of the round: {odd[0]} has another shape, is missing or not known")
    return replace(state, adapters=adapters, head=parts.head)


def watch_flowers_wrappers(is_ours: Callable[[Strategy], bool]) -> None:
    """Check strategies of ours where one of Flower's wrappers is built around them; done once."""
    for base in BASES:
        original = vars(base)["__init__"]
        if hasattr(original, "__wrapped__"):
            continue

        @wraps(original)
        def checked(
            self: Any, strategy: Any, *args: Any, original: Callable[..., None] = original, **kwargs: Any
        ) -> None:
            if is_ours(strategy):
                check_wrapped(strategy, type(self).__name__)
            original(self, strategy, *args, **kwargs)

        setattr(base, "__init__", checked)  # noqa: B010
