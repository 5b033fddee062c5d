"""Example-level noise of other clients, for who sees the sum of all: a second, smaller epsilon.

Where each client takes one step of plain SGD a round, what it ships moves by

    dX_k = -lr ( sum of clipped gradients + N(0, z^2 C^2) ) / B,

and with lr, z, C and B alike a sum of T of these has noise of multiplier z sqrt(T) for an example of any one
of them: its accounting is that of DP-SGD with this noise, at the own rate. After more steps it is not.
A gradient then depends on the noise of the steps before, which the sum does not show, and nothing is claimed;
nor under optimisers that divide by the noisy gradient, for clients of unlike settings or noise, for rules
that add up products, whose two factors are both noisy, for steps of drawn directions, of which each client
leaves others without noise, where clients choose what of it they ship or keep a trained part, whose noise no
sum shows, for rules from elsewhere, or where a number could be cut to ``secure.largest-change``.

What a client ships is rounded, to float32 and to the integers of the sum, after its noise. A sum of rounded
Gaussians on a grid of step h is their rounded sum but for ``exp(-2 pi^2 s^2 / h^2)``, s being the deviation
of one: less than 1e-1000 at `GRIDS` steps, and nothing is claimed below. On a wide grid it may round away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from clients.training.schedule import Stage, rate_factors
from fedlora.config import RunConfig
from fedlora.privacy.calibration import epsilon_of
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.graph import colluders_held
from strategies.registry import rule_type

FAR = 10.0
"""Standard deviations of noise that no number is expected beyond (1e-23)."""
GRIDS = 16.0
"""Steps of every grid that a client's noise must have as its standard deviation."""
FLOAT_STEP = 2.0**-24
"""Step of float32 below 1; the weights of a model are smaller."""


def epsilon_of_sums(config: RunConfig, claim: Mapping[str, Any], clients: int) -> float | None:
    """Epsilon of a client's claim against who sees sums alone and knows the noise of the colluding clients.

    Args:
        config: of the run.
        claim: fields of `fedlora.privacy.types.PrivacySpent`.
        clients: that may be in a sum.

    Returns:
        None where it is not known, see the module, or where the claim does not tell its history.
    """
    secure, privacy = config.secure, config.privacy
    match claim.get("history"):
        case [[float(noise), float(rate), int(rounds)]] | ((float(noise), float(rate), int(rounds)),):
            pass
        case _:
            return None
    held = colluders_held(secure.min_clients, clients, secure.threshold)
    if not is_sum_of_gaussians(config) or noise != privacy.noise_multiplier or secure.colluding > held:
        return None
    if not (0 < rate <= 1 and 1 <= rounds <= config.num_server_rounds and _is_never_cut(config, noise, rate)):
        return None
    if not _is_fine(config, noise, clients):
        return None
    history = ((noise * math.sqrt(secure.honest), rate, rounds),)
    return epsilon_of(history, privacy.target_delta, privacy.accountant)


def is_sum_of_gaussians(config: RunConfig) -> bool:
    """Whether what all clients ship in a round are equal multiples of one noisy sum of gradients each."""
    train = config.train
    one_step = train.local_steps == 1 and not train.local_epochs and not config.groups
    plain = train.optimizer == "sgd" and not train.optimizer_options and not train.max_grad_norm
    return (
        config.secure.mode == "sums"
        and ships_all(config)
        and not train.nested_ranks
        and one_step
        and plain
        and config.privacy.clipping != "adaptive"
    )


def ships_all(config: RunConfig) -> bool:
    """Whether all that a client trains comes back as it is, under a rule of which that is known."""
    if ":" in config.strategy.name or config.model.head == "local":
        return False
    facts = rule_type(config.strategy.name).facts
    products = facts.sketched  # of two noisy factors: no sum of Gaussians
    return not (products or facts.own_models or facts.chooses_directions or facts.draws_ranks)


def _is_fine(config: RunConfig, noise: float, clients: int) -> bool:
    """Whether even the smallest noise of a round is wide beside the steps of what it is rounded to."""
    train, secure = config.train, config.secure
    rounds = range(1, config.num_server_rounds + 1)
    factors = [rate_factors(train, 1, Stage(n, config.num_server_rounds))[0] for n in rounds]
    rates = [train.learning_rate * min(1.0, train.loraplus_lr_ratio)]
    rates += [train.head_learning_rate] if train.head_learning_rate else []
    slowest = min(rates) * min((factor for factor in factors if factor), default=1.0)
    deviation = slowest * noise * config.privacy.max_grad_norm / train.batch_size
    step = secure.largest_change / FixedPoint(clients, secure.bits, secure.largest_change, 1).steps
    return deviation >= GRIDS * max(step, FLOAT_STEP)


def _is_never_cut(config: RunConfig, noise: float, rate: float) -> bool:
    """Whether even the gradient of all examples, all aligned, moves no number by the largest change."""
    train = config.train
    fastest = max(train.learning_rate * max(1.0, train.loraplus_lr_ratio), train.head_learning_rate)
    moved = fastest * config.privacy.max_grad_norm * (1 / rate + FAR * noise / train.batch_size)
    return not train.weight_decay and moved <= config.secure.largest_change
