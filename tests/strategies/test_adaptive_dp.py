"""Adaptive clipping of whole clients: the law of both noises, their joint price, where the norm settles."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from clients.privacy import mechanism_of
from fedlora.config import RunConfig
from fedlora.core.factors import LoraFactors
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import ConfigError
from fedlora.privacy.calibration import epsilon_spent
from fedlora.privacy.plausible import flaw_of_noise
from fedlora.privacy.quantile import Quantile
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import check
from fedlora.simulation.simulate import simulate_on, start
from strategies.adaptive_dp import AdaptiveClientDP
from strategies.client_dp import ClientDP
from tests.conftest import tiny_config
from tests.simulation.test_ray_engine import adapter

Z, COUNT = 1.3, 9.0
START = LoraFactors(torch.zeros(4, 500), torch.zeros(500, 4), 1.0)
SENT = Broadcast(
    adapters={"x": START}, trained=frozenset("AB"), uploaded=frozenset("AB"), modules=frozenset("x"), head={}
)


def updates(norms: np.ndarray) -> list[ClientUpdate]:
    """Clients whose changes are so long."""
    found = []
    for number, norm in enumerate(norms):
        A, B, length = direction(number)
        scale = float(norm) / length
        factors = LoraFactors(scale * A, scale * B, 1.0)
        found.append(ClientUpdate(partition_id=number, adapters={"x": factors}, head={}, weight=1.0))
    return found


@lru_cache
def direction(number: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A client's change, of A and of B, and how long it is."""
    g = torch.Generator().manual_seed(number)
    A, B = torch.randn(START.A.shape, generator=g), torch.randn(START.B.shape, generator=g)
    return A, B, math.sqrt(float(A.square().sum() + B.square().sum()))


def adaptive(norm: float = 1.0, *, seed: int | None = 0, z: float = Z, **rule: float) -> AdaptiveClientDP:
    fixed = ClientDP(clipping_norm=norm, noise_multiplier=z, seed=seed)
    return AdaptiveClientDP(fixed, Quantile(**{"count_noise": COUNT, **rule}))


def played(mechanism: AdaptiveClientDP, norms: np.ndarray, server_round: int) -> torch.Tensor:
    """What is published less where it started, times the cohort."""
    clients = updates(norms)
    sent = dict.fromkeys(range(len(clients)), SENT)
    (private,) = mechanism.privatise(clients, sent, len(clients), server_round)
    moved = private.adapters["x"]
    return len(clients) * torch.cat([(moved.A - START.A).flatten(), (moved.B - START.B).flatten()]).double()


@pytest.mark.parametrize(("z", "count"), [(1.3, 9.0), (0.6, 0.5), (4.0, 2.1)])
def test_sum_and_count_together_cost_what_is_claimed(z: float, count: float) -> None:
    """The composition of two Gaussian mechanisms, by another accountant, is one of noise multiplier z."""
    of_sum = Quantile(count_noise=count).noise_of_sum(z, 10)
    both = from_gaussian_mechanism(of_sum).compose(from_gaussian_mechanism(2 * count))
    epsilon = both.self_compose(3).get_epsilon_for_delta(1e-5)
    assert epsilon == pytest.approx(epsilon_spent(z, 1.0, 3, 1e-5, "pld"), rel=2e-3)
    assert of_sum > z


def test_by_default_the_count_takes_at_most_one_percent() -> None:
    for z, cohort in ((1.0, 4), (1.0, 1000), (0.05, 20)):
        of_sum = Quantile().noise_of_sum(z, cohort)
        assert z < of_sum <= z / math.sqrt(0.99) * (1 + 1e-12)
    assert Quantile().noise_of_count(0.1, 1000) == 50


@pytest.mark.parametrize("seed", [3, None], ids=["seeded", "system"])
def test_both_noises_have_their_laws(seed: int | None) -> None:
    """Of clients that change nothing; the count's noise is read off the next norm."""
    mechanism, norm = adaptive(0.7, seed=seed, learning_rate=1e-3), 0.7
    sums, counts = [], []
    for server_round in range(1, 121):
        sums.append(played(mechanism, np.zeros(3), server_round) / norm)
        share = 0.5 - math.log(mechanism.clipping_norm / norm) / 1e-3
        counts.append(torch.tensor([3 * (share - 0.5) - 1.5], dtype=torch.float64))
        norm = mechanism.clipping_norm
    assert flaw_of_noise(sums, Quantile(count_noise=COUNT).noise_of_sum(Z, 3), 1e-6) == ""
    assert flaw_of_noise(counts, COUNT, 1e-6) == ""
    assert "standard deviation" in flaw_of_noise(sums, 1.02 * Z * 1.02, 1e-6)


def test_noise_repeats_with_the_seed_only() -> None:
    norms = np.ones(3)
    once, again, system = adaptive(), adaptive(), adaptive(seed=None)
    assert torch.equal(played(once, norms, 1), played(again, norms, 1))
    played(system, norms, 1)
    assert once.clipping_norm == again.clipping_norm != system.clipping_norm
    assert not torch.equal(played(once, norms, 2), played(again, norms, 1))


@pytest.mark.parametrize(("target", "first"), [(0.5, 0.01), (0.8, 100.0)])
def test_the_norm_settles_at_the_quantile(target: float, first: float) -> None:
    norms = np.random.default_rng(1).lognormal(0.3, 0.5, 200)
    mechanism, seen = adaptive(first, target=target, z=0.1), []
    for server_round in range(1, 161):
        played(mechanism, norms, server_round)
        seen.append(mechanism.clipping_norm)
    assert np.mean(np.mean(norms[:, None] <= seen[-40:], axis=0)) == pytest.approx(target, abs=0.04)


def test_no_client_moves_sum_and_count_further_than_what_is_paid_for() -> None:
    """Replaced by nothing: at most S in the sum, half a client in the count."""
    for norm in (0.01, 0.9999, 1.0, 50.0):
        silent = adaptive(z=1e-12)
        with_it = played(silent, np.array([0.5, norm]), 1) - played(adaptive(z=1e-12), np.array([0.5]), 1)
        assert with_it.norm() <= 1 + 1e-6


def test_a_count_that_takes_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.count-noise = 0\.6: must be above half of the noise"):
        adaptive(count_noise=0.6)
    wrong = config(**{"privacy.count-noise": 0.2})
    with pytest.raises(ConfigError, match=r"privacy\.count-noise = 0\.2: must be above half"):
        check(wrong)
    with pytest.raises(ConfigError, match=r"privacy\.clipping = 'adaptive': must be"):
        config(**{"privacy.mode": "example", "privacy.grad-sample-mode": "ghost"})


def config(**keys: object) -> RunConfig:
    private = {"privacy.mode": "client", "privacy.noise-multiplier": 1.0, "privacy.clipping": "adaptive"}
    return tiny_config(**{**private, "privacy.target-delta": 1e-3, **keys})


def test_the_claim_is_that_of_a_fixed_norm() -> None:
    spent, fixed = (
        mechanism_of(config(**{"privacy.clipping": how})).spent({0: 3}) for how in ("adaptive", "flat")
    )
    assert spent == fixed


class Stop(Exception):
    pass


def test_a_resumed_run_goes_on_with_its_norm(tmp_path: Path, cache: Path) -> None:
    wanted = config(**{"engine.name": "in-process"})
    engine = start(wanted)
    simulate_on(engine, wanted, RunDirectory(tmp_path / "whole"))

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            raise Stop

    path = tmp_path / "stopped"
    with pytest.raises(Stop):
        FederatedRun(engine.session(wanted, path), RunDirectory(path), [Tell(stop)]).run()
    simulate_on(engine, wanted, RunDirectory(path, resume=True))
    engine.close()
    whole, resumed = (
        [record["clipping_norm"] for record in RunDirectory(tmp_path / name, resume=True).rounds()]
        for name in ("whole", "stopped")
    )
    assert whole == resumed
    assert whole[0] == 1.0
    assert len(set(whole)) == 3
    assert adapter(path) == adapter(tmp_path / "whole")


def test_noise_that_was_charged_cannot_be_calibrated_anew(tmp_path: Path, cache: Path) -> None:
    """With more rounds the same target takes more noise, and those that were done had less."""
    keys = {"engine.name": "in-process", "privacy.noise-multiplier": 0.0, "privacy.target-epsilon": 8.0}
    done, more = config(**keys), config(**keys, **{"num-server-rounds": 9})
    engine = start(done)
    simulate_on(engine, done, RunDirectory(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"num-server-rounds = 9: the run in .* has 3; it cannot change"):
        simulate_on(engine, more, RunDirectory(tmp_path / "run", resume=True))
    given = {"privacy.noise-multiplier": 2.0}
    simulate_on(engine, config(**keys | given), RunDirectory(tmp_path / "given"))
    more = config(**keys | given, **{"num-server-rounds": 4})
    result = simulate_on(engine, more, RunDirectory(tmp_path / "given", resume=True))
    engine.close()
    assert result["rounds"] == 4
