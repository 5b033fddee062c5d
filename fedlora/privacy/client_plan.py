"""Noise for whole clients before a run: what the rounds that a client can take part in need.

Each of them is one Gaussian mechanism, nothing is amplified. Noise that is correlated over b rounds costs the
same and leaves less of itself in the model, see `fedlora.privacy.banded`; a client then takes part once in b
rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlora.config.checks import require
from fedlora.config.secure import SecureConfig
from fedlora.privacy.banded import most_participations, remaining, sensitivity, square_root
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent
from fedlora.privacy.plan import Budget
from fedlora.privacy.trade_off import trade_off
from fedlora.secure.graph import colluders_held
from fedlora.secure.noise import worth

FULL = 1.0
"""The rate of a round: clients know when they take part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest(Budget):
    """What the plan of whole clients is made for; ``max_participations`` 0 is as many as fit.

    Attributes:
        clients: N, that may take part.
        noise_bands: b, rounds over which noise is correlated.
        server_momentum: beta of FedAvgM; 0 without.
        min_clients: n, whose sums the server learns, where clients share the noise; 0: the server adds it.
        colluding: c of them, whose noise is not counted on against the server.
    """

    clients: int
    noise_bands: int
    server_momentum: float
    min_clients: int = 0
    colluding: int = 1

    def __post_init__(self) -> None:
        for name in ("clients", "rounds", "noise_bands"):
            require(getattr(self, name) >= 1, _option(name), getattr(self, name), "must be >= 1")
        for name, low in (("max_participations", 0), ("server_momentum", 0.0), ("colluding", 0)):
            require(getattr(self, name) >= low, _option(name), getattr(self, name), f"must be >= {low:g}")
        self.check_budget()
        require(self.server_momentum < 1, "--server-momentum", self.server_momentum, "must be < 1")
        require(
            self.noise_bands == 1 or self.asked * self.noise_bands <= self.clients,
            "--noise-bands", self.noise_bands,
            f"a client takes part once in so many rounds, so of {self.clients} at most "
            f"{self.clients // self.noise_bands} can be asked in each, --fraction-train asks {self.asked}",
        )  # fmt: skip

        if self.min_clients:
            require(self.noise_bands == 1, "--noise-bands", self.noise_bands, "1 where noise is shared")
            require(
                self.colluding < self.min_clients <= self.asked, "--min-clients", self.min_clients,
                f"must be above --colluding {self.colluding} and at most the {self.asked} that a round asks",
            )  # fmt: skip
            held = colluders_held(self.min_clients, self.asked, SecureConfig.threshold)
            require(
                self.colluding <= held, "--colluding", self.colluding,
                f"the masks of {self.min_clients} clients (--min-clients) hold against at most {held} who "
                f"collude, at secure.threshold {SecureConfig.threshold:g}",
            )  # fmt: skip

    @property
    def asked(self) -> int:
        """Clients of a round."""
        return max(1, int(self.fraction_train * self.clients + 1e-9))

    @property
    def participations(self) -> int:
        """Rounds of one client at most."""
        return most_participations(self.rounds, self.noise_bands, self.max_participations)


def make_client_plan(request: ClientRequest) -> dict[str, Any]:
    """The least noise that keeps the budget, and what of it stays in the model.

    Returns:
        ``noise_multiplier``, ``epsilon``, ``delta``, ``participations``, ``asked``, ``attacker`` as in
        `fedlora.privacy.plan`, ``sensitivity`` (most that a client moves the factor times the sums, in
        clipping norms), ``model_noise`` (root mean square over the rounds, as a share of independent noise of
        this z), and what it is: ``hides``, ``mechanism``; where clients share noise ``epsilon_of_model``,
        against who sees the model alone; ``epsilon`` is against the server with ``colluding`` clients.

    Raises:
        ConfigError: a budget that no noise reaches, or beyond what the accountant resolves.
    """
    r, coefficients = request, square_root(request.noise_bands, request.server_momentum)
    noise = calibrate_noise(r.target_epsilon, r.target_delta, FULL, r.participations, r.accountant)
    epsilon = epsilon_spent(noise, FULL, r.participations, r.target_delta, r.accountant)
    shared, more, honest = {}, 1.0, r.min_clients - r.colluding
    if r.min_clients:
        all_shares, more = worth(noise, honest, r.min_clients), worth(1.0, honest, r.asked)
        of_model = epsilon_spent(all_shares, FULL, r.participations, r.target_delta, r.accountant)
        shared = {"min_clients": r.min_clients, "colluding": r.colluding, "epsilon_of_model": of_model}
    return {
        "hides": "client",
        "mechanism": _mechanism(r),
        **shared,
        "noise_bands": r.noise_bands,
        "noise_multiplier": noise,
        "epsilon": epsilon,
        "delta": r.target_delta,
        "accountant": r.accountant,
        "neighboring_relation": "zero_out_one",
        "participations": r.participations,
        "attacker": trade_off(((noise, FULL, r.participations),), epsilon, r.target_delta).record(),
        "asked": r.asked,
        "sensitivity": sensitivity(coefficients, r.rounds, r.participations),
        "model_noise": more * remaining(coefficients, r.rounds, r.server_momentum),
    }


def _mechanism(request: ClientRequest) -> str:
    if request.min_clients:
        return "shares of discrete Gaussian noise"
    return "Gaussian" if request.noise_bands == 1 else "banded matrix factorisation"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
