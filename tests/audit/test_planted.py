"""Faults that experts plant, each past the self-test: the audit finds them, and by which of its checks.

``python -m tests.audit.test_planted`` prints the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedlora.audit.evidence import TOGETHER
from fedlora.audit.run import INCONCLUSIVE, REFUTED, STANDS, Audit, audit
from tests.audit import broken
from tests.audit.test_audit import config

Break = Callable[[pytest.MonkeyPatch], None]
COHORTS = {"engine.cohort-size": 2}
GHOSTS = {"privacy.grad-sample-mode": "ghost"}
LAYERS = {"privacy.clipping": "per-layer"}
SHARES = {**LAYERS, "privacy.clip-shares": '{"A": 1, "B": 3, "head": 1}'}
UNITS = {"privacy.unit-column": "group", "train.batch-size": 16}
SMALL = {"train.batch-size": 24, "privacy.noise-multiplier": 1.2, "privacy.target-epsilon": 8.0}
PLANTED: dict[str, tuple[Break, dict[str, Any], str, float, float]] = {
    "half the noise": (broken.half_the_noise, {}, "farther than the claimed", 0.70, 1.05),
    "twice the rate": (broken.twice_the_rate, SMALL, "examples were drawn in 8 steps, claimed", 0.7, 1.2),
    "each layer by itself": (broken.each_layer_by_itself, {}, "farther than the claimed", 0.65, 1.2),
    "clipped after the sum": (broken.clipped_after_the_sum, {}, "less far than the claimed", -0.2, 0.2),
    "shuffled batches": (broken.shuffled_batches, {}, "too little in size for Poisson", 0.2, 0.7),
    "the same noise everywhere": (broken.the_same_noise_everywhere, {}, "updates share noise", -1.0, 2.0),
    "each example of a unit": (broken.each_example_of_a_unit_by_itself, UNITS, "farther than", 0.65, 1.3),
    "half the noise in cohorts": (broken.half_the_noise_in_cohorts, COHORTS, "farther than", 0.70, 1.05),
    "half the noise of ghosts": (broken.half_the_noise_of_ghosts, GHOSTS, "farther than", 0.70, 1.05),
}
"""What is broken, keys, what the audit says of it, and the least and largest separation of all canaries."""


@pytest.mark.parametrize(("plant", "keys", "words", "low", "high"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(
    plant: Break, keys: dict[str, Any], words: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = audit(config(**keys))
    assert found.outcome == REFUTED
    assert words in " ".join(found.found_wrong)
    assert low < found.separations[TOGETHER].value < high


RIGHT = {
    "cohorts": COHORTS,
    "ghosts": GHOSTS,
    "small": SMALL,
    "units": UNITS,
    "shares": SHARES,
}


@pytest.mark.parametrize("keys", RIGHT.values(), ids=RIGHT)
def test_a_right_mechanism_stands_where_theory_puts_it(keys: dict[str, Any]) -> None:
    found = audit(config(**keys))
    assert found.found_wrong == []
    assert found.outcome == STANDS
    together = found.separations[TOGETHER]
    assert abs(together.value - together.theory) < 0.2


def test_without_any_noise_no_claim_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is larger than so many canaries could refute for any mechanism."""
    broken.no_noise(monkeypatch)
    found = audit(config(**{"privacy.noise-multiplier": 1.0, "privacy.target-epsilon": 20.0}))
    assert found.strongest[2].largest < found.claimed_epsilon
    assert found.outcome == REFUTED
    assert found.separations[TOGETHER].low > found.separations[TOGETHER].theory


def test_what_would_not_have_been_noticed_is_inconclusive() -> None:
    large = {"privacy.noise-multiplier": 0.5, "privacy.target-epsilon": 20.0}
    few = audit(config(**{"train.batch-size": 8, "num-server-rounds": 1, **large}), canaries=16)
    assert few.outcome == INCONCLUSIVE


@pytest.mark.parametrize(
    "key", [{"train.optimizer": "adamw"}, {"train.loraplus-lr-ratio": 8.0}, {"train.nested-ranks": True}]
)
def test_where_a_step_is_not_all_that_it_let_out_canaries_are_not_held_to_a_distance(
    key: dict[str, Any],
) -> None:
    """An optimiser that divides, a rate of B's own, and steps that leave directions put them elsewhere."""
    loud = {"privacy.noise-multiplier": 1.0, "privacy.target-epsilon": 20.0, "num-server-rounds": 1}
    hidden = audit(config(**key, **loud), canaries=16)
    assert hidden.separations == {}
    assert hidden.outcome == INCONCLUSIVE


WHOLE = {"privacy.mode": "client", "privacy.noise-multiplier": 4.0, "num-server-rounds": 3}


def test_client_level_stands_where_theory_puts_it() -> None:
    found = audit(config(**WHOLE))
    assert (found.outcome, found.found_wrong) == (STANDS, [])
    (apart,) = found.separations.values()
    assert apart.theory == pytest.approx(3**0.5 / 4)
    assert abs(apart.value - apart.theory) < 0.3


SHARED = {
    **WHOLE, "secure.mode": "sums", "secure.noise": "distributed", "secure.min-clients": 3,
    "secure.colluding": 1,
}  # fmt: skip


def test_noise_that_clients_share_stands_where_the_claim_puts_it() -> None:
    """As whoever knows all noise but that of the two clients which are counted on sees it."""
    found = audit(config(**SHARED))
    assert (found.outcome, found.found_wrong) == (STANDS, [])
    assert found.strongest[2].epsilon < found.claimed_epsilon
    (apart,) = found.separations.values()
    assert apart.theory == pytest.approx(3**0.5 / 4)
    assert abs(apart.value - apart.theory) < 0.3


BANDED = {
    **WHOLE, "num-server-rounds": 9, "data.num-partitions": 6, "fraction-train": 0.34,
    "privacy.noise-bands": 3, "train.local-steps": 1,
}  # fmt: skip


def test_correlated_noise_is_no_fault() -> None:
    """Canaries are in three of nine rounds, and seen through the factor they stand where theory puts them."""
    found = audit(config(**BANDED))
    assert (found.outcome, found.found_wrong) == (STANDS, [])
    (apart,) = found.separations.values()
    assert apart.theory == pytest.approx(3**0.5 / 4)
    assert abs(apart.value - apart.theory) < 0.3


@pytest.mark.parametrize(
    ("keys", "plant", "words"),
    [
        (WHOLE, broken.half_the_noise_on_means, "has standard deviation 2"),
        (WHOLE, broken.clients_not_clipped, "farther than"),
        (WHOLE, broken.the_same_noise_each_round, "updates share noise"),
        (SHARED, broken.half_the_noise_in_shares, "has standard deviation 1.9"),
        (SHARED, broken.shares_not_clipped, "farther than"),
        (BANDED, broken.independent_in_place_of_correlated, "updates share noise"),
        (BANDED, broken.noise_forgotten_between_rounds, "has standard deviation"),
        (BANDED, broken.factor_with_ones, "has standard deviation 3"),
        (BANDED, broken.the_newest_noise_not_forgotten_first, "updates share noise"),
        (BANDED, broken.half_the_noise_on_means, "has standard deviation 2"),
    ],
)
def test_faults_at_client_level_are_found(
    keys: dict[str, Any], plant: Break, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = audit(config(**keys))
    assert found.outcome == REFUTED
    assert words in " ".join(found.found_wrong)


def _line(name: str, found: Audit) -> str:
    parts = ", ".join(f"{g} {s.value:.2f} (theory {s.theory:.2f})" for g, s in found.separations.items())
    return f"{name}: {found.outcome}; separation {parts}; {' | '.join(found.flaws)}"


if __name__ == "__main__":
    for seed in (1, 2, 3):
        print(_line(f"right, seed {seed}", audit(config(seed=seed))), flush=True)
        for name, (plant, keys, *_) in PLANTED.items():
            with pytest.MonkeyPatch.context() as patch:
                plant(patch)
                print(_line(f"{name}, seed {seed}", audit(config(seed=seed, **keys))), flush=True)
