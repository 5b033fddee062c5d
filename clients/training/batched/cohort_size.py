"""Number of clients that train together: by model, batch and run, never by free memory or workers.

Bits depend on it, so that it must be the same wherever the run is carried out. ``engine.cohort-size`` says
something else where that is better.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedlora.config import RunConfig
from fedlora.core.state import ModuleSpec

STEP_TOKENS = {"cpu": 1024, "cuda": 32768, "mps": 8192}
"""Tokens of a cohort's step, all sequences at their longest, beyond which a larger one gains little."""
COHORTS = {"cpu": 4, "cuda": 1, "mps": 1}
"""Cohorts of a round at least: a processor's cores take one each, an accelerator is shared out within."""
MOST_BYTES = 2**29
"""Stacked values, gradients and moments of a cohort at most."""
COPIES = 5
"""Of every trained number: start, value, gradient, two moments."""


def cohort_size(
    config: RunConfig, modules: Mapping[str, ModuleSpec], head_numbers: int, clients: int, device: str
) -> int:
    """Clients in a cohort: ``engine.cohort-size`` if it is set, else by what is known before the run.

    Args:
        config: the run.
        modules: the adapted layers.
        head_numbers: numbers in the trained head.
        clients: who train in a round.
        device: where, as a torch device type.

    >>> from fedlora.config import from_flat
    >>> layers = {"query": ModuleSpec(out_features=384, in_features=384)}
    >>> config = from_flat({"train.batch-size": 4, "data.max-length": 32})
    >>> [cohort_size(config, layers, 770, clients, "cpu") for clients in (4, 16, 100)]
    [1, 4, 8]
    """
    if config.engine.cohort_size:
        return config.engine.cohort_size
    if config.train.packing or config.train.pass_memory:
        return 1  # whose passes hold examples of one client alone
    by_tokens = STEP_TOKENS[device] // (config.train.batch_size * config.data.max_length)
    rank = max([*config.lora.rank_list, *(g.rank or 1 for g in config.groups)])
    numbers = head_numbers + sum(rank * (s.out_features + s.in_features) for s in modules.values())
    by_memory = MOST_BYTES // (4 * COPIES * numbers)
    return max(1, min(by_tokens, by_memory, clients // COHORTS[device]))
