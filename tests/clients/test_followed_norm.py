"""Adaptive clipping in a client's own steps: counts, their noise, where the norm settles, what is charged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.budget import plan_release
from clients.ledger_ref import LedgerRef
from clients.privacy import mechanism_of
from clients.training.batched.private import ClippedSums
from clients.training.batched.self_check import check_cohort
from clients.training.dp_mechanism import Mechanism
from clients.training.followed_norm import FollowedNorm
from clients.training.self_check import self_check
from fedlora.audit.run import check_audit
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel
from fedlora.prepared.cache import open_prepared, prepare
from fedlora.privacy.quantile import Quantile
from tests.clients.cohort import samples
from tests.clients.samples import PAD, loaded
from tests.conftest import tiny_config
from tests.in_process import client_runtime

FOLLOWING = Mechanism(
    noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=4, quantile=Quantile(), count_noise=5.0
)
WAYS = {
    "hooks": FOLLOWING,
    "loop": replace(FOLLOWING, grad_sample_mode="loop"),
    "units": replace(FOLLOWING, unit_examples=4),
    "secure": replace(FOLLOWING, secure=True),
}


@pytest.fixture(scope="module")
def network() -> AdaptedModel:
    return samples.model()


@pytest.mark.parametrize("options", [{}, {"max_physical_batch_size": 2}], ids=["whole", "chunks"])
def test_clients_come_out_as_if_alone(network: AdaptedModel, options: dict[str, Any]) -> None:
    members = [samples.member(network, k, rank=2 + k, steps=3 + k, size=20) for k in range(3)]
    fixed = samples.privately(members, **options)
    following = samples.privately(members, quantile=Quantile(learning_rate=0.8), count_noise=0.5, **options)
    moved = samples.assert_same(network, following, samples.task())
    stayed, _ = samples.together(network, fixed, samples.task())
    assert any(not torch.equal(t, stayed[0][name]) for name, t in moved[0].items())


@pytest.mark.parametrize("mechanism", WAYS.values(), ids=WAYS)
def test_the_self_tests_pass(mechanism: Mechanism) -> None:
    self_check(loaded(), PAD, mechanism)
    check_cohort(loaded(), PAD, mechanism)


@pytest.mark.parametrize("mechanism", [FOLLOWING, WAYS["secure"]], ids=["seeded", "secure"])
@pytest.mark.parametrize("check", [self_check, check_cohort])
def test_a_count_without_noise_is_found(
    check: Any, mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quantile, "noisy", lambda self, count, std, rng: count)
    with pytest.raises(RunFailed, match="noise on the count of norms has standard deviation 0, claimed is 5"):
        check(loaded(), PAD, mechanism)


def test_a_wrong_count_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quantile, "counted", lambda self, norms, norm: len(norms) / 2)
    with pytest.raises(RunFailed, match="the count of norms is not that of single examples"):
        self_check(loaded(), PAD, FOLLOWING)


def test_a_wrong_count_of_a_cohort_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    add = ClippedSums.add

    def once_more(self: ClippedSums, gradients: Any, clients: Any) -> None:
        add(self, gradients, clients)
        self.counts += 0.5

    monkeypatch.setattr(ClippedSums, "add", once_more)
    with pytest.raises(RunFailed, match="the count of norms is not that of its clients"):
        check_cohort(loaded(), PAD, FOLLOWING)


def test_the_norm_settles_at_the_quantile() -> None:
    quantile = Quantile(target=0.7)
    norms = torch.from_numpy(np.random.default_rng(0).lognormal(0.0, 0.6, 2000))
    rng = np.random.default_rng(1)
    mechanism = replace(FOLLOWING, max_grad_norm=20.0, expected_batch_size=100, quantile=quantile)
    norm, seen = FollowedNorm(mechanism, torch.Generator().manual_seed(0)), []
    for _ in range(400):
        norm.see(norms[rng.random(2000) < 0.05])
        norm.advance()
        seen.append(norm.value)
    shares = [float((norms <= value).double().mean()) for value in seen[-200:]]
    assert np.mean(shares) == pytest.approx(0.7, abs=0.03)


def test_the_ledger_is_charged_what_sum_and_count_cost_together(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(
        **{"privacy.mode": "example", "privacy.noise-multiplier": 1.1, "privacy.clipping": "adaptive",
           "privacy.accountant": "rdp", "privacy.count-noise": 4.0}
    )  # fmt: skip
    plan = plan_release(
        client_runtime(config), config, LedgerRef(directory=tmp_path, run_key="run"),
        partition_id=0, server_round=1, local_steps=2, seed=1,
    )  # fmt: skip
    made = plan.mechanism
    assert plan.release.noise_multiplier == 1.1
    assert made.clipping == "flat"
    assert made.noise_multiplier**-2 + (2 * made.count_noise) ** -2 == pytest.approx(1.1**-2)


def test_a_count_that_takes_everything_is_refused_before_the_run(cache: Path) -> None:
    config = tiny_config(
        **{"privacy.mode": "example", "privacy.noise-multiplier": 1.1, "privacy.clipping": "adaptive",
           "privacy.count-noise": 0.5}
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"privacy\.count-noise = 0\.5: must be above half of the noise"):
        mechanism_of(config).check_data(open_prepared(prepare(config)), [0, 1])


def test_an_audit_says_that_it_cannot() -> None:
    config = tiny_config(**{"privacy.mode": "example", "privacy.clipping": "adaptive"})
    with pytest.raises(ConfigError, match=r"privacy\.clipping = 'adaptive': what a canary is clipped to"):
        check_audit(config, 64, 0.95)
