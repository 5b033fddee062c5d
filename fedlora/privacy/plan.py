"""Noise before a run: what the worst case needs, and what more hopeful ways of counting would have spent.

A client with N examples, or N declared ones, trains T steps in each round that it takes part in, with sample
rate q = B / N.
Whoever sees the rounds knows who took part, so its steps are those of the rounds it is really picked for:

    worst case        P T steps at rate q         P rounds at most, the server refuses more
    expected case     F R T steps at rate q       what a client is picked for on average
    client sampling   R T steps at rate q F       every step draws its clients anew and secretly

The last two are met in released code, and claim less than is spent: the second by the clients that are
picked more often than the average, the third by most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

from scipy.stats import binom

from fedlora.config.checks import one_of, require
from fedlora.config.privacy import ADD_OR_REMOVE_ONE, MAX_DELTA, ZERO_OUT_ONE
from fedlora.errors import ConfigError
from fedlora.privacy.accountants import ACCOUNTANTS
from fedlora.privacy.calibration import MAX_EPSILON, calibrate_noise, epsilon_spent
from fedlora.privacy.trade_off import trade_off

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What every plan is made for; the fields are options of ``fedlora privacy plan``.

    Attributes:
        rounds: R.
        fraction_train: F, share of the clients that is asked in a round.
        max_participations: P, rounds that the server lets one client take part in.
        target_epsilon: the budget of a client over the whole run.
        target_delta: its delta.
        accountant: ``prv``, ``pld`` or ``rdp``.
    """

    rounds: int
    fraction_train: float
    max_participations: int
    target_epsilon: float
    target_delta: float
    accountant: str

    def check_budget(self) -> None:
        """Refuse what no plan can keep.

        Raises:
            ConfigError: a value out of its range, or no such accountant.
        """
        require(
            self.max_participations <= self.rounds, "--max-participations", self.max_participations,
            f"must be at most --rounds, which is {self.rounds}",
        )  # fmt: skip
        require(0 < self.fraction_train <= 1, "--fraction-train", self.fraction_train, "must be in (0, 1]")
        require(
            0 < self.target_epsilon <= MAX_EPSILON, "--target-epsilon", self.target_epsilon,
            f"must be > 0 and at most {MAX_EPSILON:g}",
        )  # fmt: skip
        require(
            0 < self.target_delta <= MAX_DELTA, "--target-delta", self.target_delta,
            f"must be in (0, {MAX_DELTA:g}]",
        )  # fmt: skip
        one_of("--accountant", self.accountant, tuple(ACCOUNTANTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Budget):
    """What the plan of one client's examples is made for.

    Attributes:
        dataset_size: N, the public number of examples of the client: the real one under ``zero_out_one``, the
            declared one under ``add_or_remove_one``.
        batch_size: B, the expected batch.
        local_steps: T, steps of a round.
        neighboring_relation: which of `fedlora.privacy.types.NeighboringRelation` the plan is for; it decides
            what N is, and nothing else.
    """

    dataset_size: int
    batch_size: int
    local_steps: int
    neighboring_relation: str = ZERO_OUT_ONE

    def __post_init__(self) -> None:
        for name in ("dataset_size", "batch_size", "local_steps", "rounds", "max_participations"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')}", value, "must be >= 1")
        require(
            self.batch_size <= self.dataset_size, "--batch-size", self.batch_size,
            f"must be at most --dataset-size, which is {self.dataset_size}",
        )  # fmt: skip
        self.check_budget()
        one_of("--neighboring-relation", self.neighboring_relation, (ZERO_OUT_ONE, ADD_OR_REMOVE_ONE))

    @property
    def sample_rate(self) -> float:
        """Probability q = B / N with which an example is in a batch."""
        return self.batch_size / self.dataset_size

    @property
    def steps(self) -> int:
        """Steps of the worst case, P T."""
        return self.max_participations * self.local_steps

    @property
    def expected_participations(self) -> float:
        """Rounds of a client on average, F R, at most P."""
        return min(self.fraction_train * self.rounds, float(self.max_participations))

    @property
    def expected_steps(self) -> int:
        """Steps of the expected case, F R T, to a whole step."""
        return max(1, round(self.expected_participations * self.local_steps))


def make_plan(request: Request) -> dict[str, Any]:
    """The least noise that keeps the budget in the worst case, and what the other ways would have meant.

    Returns:
        ``noise_multiplier``, ``epsilon``, ``delta``, ``steps``, ``sample_rate`` and ``participations``
        of the worst case; under ``attacker`` what it lets an attacker find at most, see
        `fedlora.privacy.trade_off`; under ``expected_case`` and ``client_sampling`` the
        ``noise_multiplier`` that each would have chosen, and the ``epsilon_spent`` under it in the
        worst case; under
        ``by_accountant`` the epsilon of the worst case as each accountant has it; under ``tight``, for
        rdp, what pld says. A number is None where the accountant cannot resolve it.

    Raises:
        ConfigError: a budget that no noise reaches, or beyond what the accountant resolves.
    """
    r = request
    noise = calibrate_noise(r.target_epsilon, r.target_delta, r.sample_rate, r.steps, r.accountant)

    def spent(noise: float | None, steps: int, accountant: str) -> float | None:
        if noise is None:
            return None
        return _resolved(epsilon_spent, noise, r.sample_rate, steps, r.target_delta, accountant)

    def noise_for(rate: float, steps: int, accountant: str) -> float | None:
        return _resolved(calibrate_noise, r.target_epsilon, r.target_delta, rate, steps, accountant)

    expected = noise_for(r.sample_rate, r.expected_steps, r.accountant)
    hidden_rate, hidden_steps = r.sample_rate * r.fraction_train, r.rounds * r.local_steps
    hidden = noise_for(hidden_rate, hidden_steps, r.accountant)
    by_accountant = {name: spent(noise, r.steps, name) for name in ACCOUNTANTS}
    epsilon = epsilon_spent(noise, r.sample_rate, r.steps, r.target_delta, r.accountant)
    return {
        "noise_multiplier": noise,
        "epsilon": epsilon,
        "delta": r.target_delta,
        "steps": r.steps,
        "sample_rate": r.sample_rate,
        "participations": r.max_participations,
        "attacker": trade_off(((noise, r.sample_rate, r.steps),), epsilon, r.target_delta).record(),
        "accountant": r.accountant,
        "neighboring_relation": r.neighboring_relation,
        "expected_case": {
            "participations": r.expected_participations,
            "steps": r.expected_steps,
            "epsilon_claimed": spent(noise, r.expected_steps, r.accountant),
            "noise_multiplier": expected,
            "epsilon_spent": spent(expected, r.steps, r.accountant),
            "picked_more_often": _picked_more_often(r),
        },
        "client_sampling": {
            "sample_rate": hidden_rate,
            "steps": hidden_steps,
            "noise_multiplier": hidden,
            "epsilon_spent": spent(hidden, r.steps, r.accountant),
        },
        "by_accountant": by_accountant,
        "tight": {
            "accountant": "pld",
            "epsilon": by_accountant["pld"],
            "noise_multiplier": noise_for(r.sample_rate, r.steps, "pld"),
        }
        if r.accountant == "rdp"
        else None,
    }


def _picked_more_often(request: Request) -> float:
    """Share of the clients that take part more often than expected, of a client picked with F each round."""
    if request.expected_participations >= request.max_participations:
        return 0.0
    at_most = math.floor(request.expected_participations + 1e-9)
    return float(binom.sf(at_most, request.rounds, request.fraction_train))


def _resolved(
    account: Callable[Arguments, float], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> float | None:
    """What the accountant says, None where it refuses."""
    try:
        return account(*args, **kwargs)
    except ConfigError:
        return None
