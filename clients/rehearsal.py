"""Rehearses a client's step on nobody's data before a run: what all clients would be refused for, once.

The clients' own processes ask the same again before they train, see `clients.training.self_check` and
`clients.training.batched.self_check`; there it would be a line for each client, after the run has been begun.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from clients.privacy import mechanism_of
from clients.runtime import ClientRuntime
from clients.training.batched.layers import why_alone
from clients.training.batched.self_check import check_cohort
from clients.training.optimizers.registry import make_optimizer
from clients.training.packing_check import check_packing
from clients.training.pass_memory import with_passes
from clients.training.self_check import check_steps
from fedlora.config import RunConfig
from fedlora.core.adapters import Adapters
from fedlora.errors import ConfigError, RunFailed


def rehearse(
    runtime: ClientRuntime,
    config: RunConfig,
    adapters: Adapters,
    head: Mapping[str, Tensor],
    trained: frozenset[str],
) -> None:
    """A step as the clients will take it: in a cohort, packed, or privately; plain steps need no asking.

    Args:
        runtime: the run's model and data; the model is left loaded with these values.
        config: the run, ``engine.cohort-size`` decided.
        adapters: what the first round begins with.
        head: likewise.
        trained: the names of the tensors that it trains.

    Raises:
        ConfigError: the step does not compute what it claims on this model.
    """
    model, mechanism = runtime.model, mechanism_of(config).step()
    together = config.engine.cohort_size > 1 and not why_alone(model)
    model.load(adapters, head, trained=trained, train_head=config.model.head != "freeze")
    if not model.adapter.batched and model.trainable().all:
        make_optimizer(model.trainable(), config.train)  # some take matrices alone
    if config.train.packing and model.trainable().all:
        check_packing(model, runtime.data.pad_token_id)
    if len(runtime.data.train) and model.trainable().all:
        everyone, pad = np.arange(len(runtime.data.train)), runtime.data.pad_token_id
        with_passes(model, runtime.data.train, everyone, pad, config.train)
    if not (together or mechanism) or not model.trainable().all:
        return
    try:
        if together:
            check_cohort(model, runtime.data.pad_token_id, mechanism)
        elif mechanism is not None:
            check_steps(model, runtime.data.pad_token_id, mechanism)
    except RunFailed as error:
        raise ConfigError(f"model.name = {config.model.name!r}: {error}") from None
