"""Budget shares of groups of tensors: what each is clipped to, and what all together cost."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from clients.training import clip_shares, made_up, opacus_parts
from clients.training.batched import private
from clients.training.batched.self_check import check_cohort
from clients.training.clip_shares import tensor_clips
from clients.training.dp_mechanism import Mechanism
from clients.training.self_check import self_check
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel
from tests.clients.cohort import samples
from tests.clients.samples import PAD, loaded
from tests.conftest import tiny_config

NAMES = [
    "enc.layer.0.query.A",
    "enc.layer.0.query.B",
    "enc.layer.1.query.A",
    "enc.layer.1.query.B",
    "out.bias",
]
FACTORS = (("A", 1.0), ("B", 3.0), ("head", 4.0))
SHARED = Mechanism(
    noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=4, clipping="per-layer", shares=FACTORS
)


@pytest.mark.parametrize(
    ("shares", "squares"),
    [
        ((), [0.2] * 5),
        (FACTORS, [1 / 16, 3 / 16, 1 / 16, 3 / 16, 0.5]),
        ((("layer.1", 3.0), ("rest", 1.0)), [1 / 12, 1 / 12, 3 / 8, 3 / 8, 1 / 12]),
        ((("layer.1", 1.0), ("A", 1.0), ("rest", 2.0)), [1 / 4, 1 / 4, 1 / 8, 1 / 8, 1 / 4]),
    ],
    ids=["alike", "factors", "layers", "first fits"],
)
def test_norms_are_the_shares_and_together_the_whole(shares: Any, squares: list[float]) -> None:
    clips = tensor_clips(NAMES, 0.7, shares)
    assert [(c / 0.7) ** 2 for c in clips] == pytest.approx(squares)
    assert math.hypot(*clips) == pytest.approx(0.7)


def test_what_is_not_trained_takes_no_share() -> None:
    assert math.hypot(*tensor_clips(NAMES[1:4:2], 1.0, FACTORS)) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"privacy\.clip-shares: out\.bias is in no group of it"):
        tensor_clips(NAMES, 1.0, FACTORS[:2])


@pytest.mark.parametrize(
    "value", ["A", "[1]", "{}", '{"A": 0}', '{"A": "1"}', '{"A": true}', '{"A": Infinity}']
)
def test_shares_that_are_none_are_refused(value: str) -> None:
    with pytest.raises(
        ConfigError, match=r"privacy\.clip-shares = .*: must be a JSON object of groups"
    ) as refused:
        tiny_config(**{"privacy.clipping": "per-layer", "privacy.clip-shares": value})
    assert "\n" not in str(refused.value)


def test_shares_contradict_flat_clipping_and_whole_clients() -> None:
    with pytest.raises(ConfigError, match=r'takes privacy\.clipping = "per-layer", which is .flat'):
        tiny_config(**{"privacy.clip-shares": '{"A": 1}'})
    with pytest.raises(ConfigError, match=r"privacy\.clip-shares = .*: must be empty where privacy\.mode"):
        tiny_config(
            **{"privacy.clip-shares": '{"A": 1}', "privacy.clipping": "per-layer", "privacy.mode": "client"}
        )


WAYS = {
    "hooks": SHARED,
    "loop": replace(SHARED, grad_sample_mode="loop"),
    "secure": replace(SHARED, secure=True),
    "units": replace(SHARED, unit_examples=4),
}


@pytest.mark.parametrize("mechanism", WAYS.values(), ids=WAYS)
def test_the_self_tests_pass(mechanism: Mechanism) -> None:
    self_check(loaded(), PAD, mechanism)
    check_cohort(loaded(), PAD, mechanism)


@pytest.mark.parametrize("check", [self_check, check_cohort])
def test_norms_that_are_longer_together_are_found(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (clip_shares, made_up, opacus_parts, private):
        monkeypatch.setattr(module, "tensor_clips", lambda names, clip, shares=(): [clip] * len(names))
    with pytest.raises(RunFailed, match="tensors together may be longer than max-grad-norm"):
        check(loaded(), PAD, SHARED)


@pytest.mark.parametrize(("check", "module"), [(self_check, opacus_parts), (check_cohort, private)])
def test_other_shares_than_claimed_are_found(
    check: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tensor_clips", lambda names, clip, shares=(): tensor_clips(names, clip))
    with pytest.raises(RunFailed, match=r"the clipped (step|sum) of"):
        check(loaded(), PAD, SHARED)


def test_clients_of_a_cohort_come_out_as_if_alone() -> None:
    network: AdaptedModel = samples.model()
    members = [samples.member(network, k, rank=2 + k, steps=2 + k) for k in range(3)]
    shared = samples.privately(members, clipping="per-layer", shares=FACTORS)
    samples.assert_same(network, shared, samples.task())
