"""Correlated noise for whole clients: what is added, what is remembered, who may take part, what it costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.linalg import solve_triangular

from clients.privacy import mechanism_of
from fedlora.audit.separation import gaussian_epsilon
from fedlora.config import RunConfig, from_flat
from fedlora.core.seeding import stream
from fedlora.core.state import ServerState
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.privacy.banded import model_noise, square_root
from fedlora.server.callbacks import Tell
from fedlora.server.checkpoint import read_checkpoint, write_checkpoint
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import check
from fedlora.simulation.in_process import InProcessEngine
from strategies.allocation import make_allocation
from strategies.client_dp import ClientDP
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from strategies.sampling import Selection
from strategies.server_optimizer import ServerOptimizer
from tests.conftest import tiny_config
from tests.privacy.test_banded import factor
from tests.strategies.test_client_dp import FEDERATION

SHAPE, STD = torch.Size((40, 30)), 1.5
WHOLE = {"privacy.mode": "client", "privacy.noise-multiplier": 1.0}


def mechanism(bands: int = 3, seed: int | None = 5, momentum: float = 0.0) -> ClientDP:
    c = square_root(bands, momentum)
    return ClientDP(clipping_norm=1.0, noise_multiplier=STD, seed=seed, coefficients=c)


def published(of: ClientDP, rounds: range, name: str = "x") -> np.ndarray:
    """Noise of each round, in units of its deviation; what was summed is zero."""
    rows = [of._noisy(torch.zeros(SHAPE, dtype=torch.float64), name, number) for number in rounds]
    return np.stack([row.numpy().ravel() for row in rows]) / STD


def test_the_factor_times_the_noise_is_independent_noise() -> None:
    """Against the matrices: C Y = Z, Z being the rows that a mechanism without correlation draws."""
    drawn = published(mechanism(bands=1), range(1, 8))
    correlated = published(mechanism(bands=3), range(1, 8))
    by_matrix = solve_triangular(factor(square_root(3), 7), drawn, lower=True)
    np.testing.assert_allclose(correlated, by_matrix, atol=0.05)  # the grids, 1 / 256 each
    assert np.abs(correlated[1:] - drawn[1:]).max() > 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_left_of_it_in_the_model_is_what_is_planned(momentum: float) -> None:
    noise = published(mechanism(bands=4, seed=None, momentum=momentum), range(1, 13))
    model, velocity, left = 0.0, 0.0, []
    for row in noise:
        velocity = momentum * velocity + row
        model = model + velocity
        left.append(float(np.std(model)))
    np.testing.assert_allclose(left, model_noise(square_root(4, momentum), 12, momentum), rtol=0.15)


def test_rounds_in_which_nothing_was_published_count_as_rounds() -> None:
    """Else a client's rounds would be closer together than the factor has bands."""
    every, some = published(mechanism(), range(1, 8)), published(mechanism(), range(1, 8, 3))
    np.testing.assert_array_equal(some, every[[0, 3, 6]])


def test_the_noise_of_a_round_serves_once() -> None:
    used = mechanism()
    published(used, range(1, 3))
    for again in (2, 1):
        with pytest.raises(RunFailed, match=rf"round {again}: its noise is drawn, and serves once"):
            published(used, range(again, again + 1))


@pytest.mark.parametrize("seed", [5, None])
def test_noise_goes_on_from_what_was_remembered(seed: int | None, tmp_path: Path) -> None:
    """Through a checkpoint; noise by the system takes back what was added before, and is new otherwise."""
    first, second = mechanism(seed=seed), mechanism(seed=seed)
    published(first, range(1, 5))
    state = replace(FEDERATION.start(make_rule("fedavg")), round=4)
    write_checkpoint(tmp_path, ServerState(state, asked={3: 4, 1: 2}, private=first.memory()))
    read = read_checkpoint(tmp_path)
    assert read is not None
    assert read.asked == {1: 2, 3: 4}
    assert sorted(read.private) == ["3/x", "4/x"]
    second.remember(read.private, read.state.round)
    if seed is None:
        mean = (-square_root(3)[1] * first.rows["x"][4] - square_root(3)[2] * first.rows["x"][3]).numpy()
        row = published(second, range(5, 6))[0]
        assert np.corrcoef(row, mean.ravel())[0, 1] > 0.3
    else:
        np.testing.assert_array_equal(published(second, range(5, 9)), published(first, range(5, 9)))


@pytest.mark.parametrize("kept", [{}, {"3/x": torch.zeros(SHAPE)}])
def test_without_the_noise_of_the_last_round_nothing_goes_on(kept: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.noise-bands = 3: the noise of round 4 was not kept"):
        mechanism().remember(kept, 4)
    mechanism(bands=1).remember({}, 4)
    mechanism().remember({}, 0)


# --- who takes part -----------------------------------------------------------------------------------


def asked(
    bands: int, fraction: float, clients: int = 40, rounds: int = 30, *, absent: float = 0.0, **keys: Any
) -> list[list[int]]:
    selection = Selection(fraction_train=fraction, separation=bands, seed=3, **keys)
    cohorts = []
    for number in range(1, rounds + 1):
        there = stream(1, "absent", number).random(clients) >= absent
        cohorts.append(selection.choose(np.flatnonzero(there).tolist(), number))
    return cohorts


@pytest.mark.parametrize(("bands", "fraction"), [(4, 0.25), (4, 0.1), (7, 0.14), (3, 0.3)])
@pytest.mark.parametrize("absent", [0.0, 0.3])
def test_a_client_is_asked_at_most_once_in_so_many_rounds(bands: int, fraction: float, absent: float) -> None:
    cohorts = asked(bands, fraction, absent=absent)
    for client in range(40):
        rounds = [number for number, cohort in enumerate(cohorts) if client in cohort]
        assert all(later - earlier >= bands for earlier, later in pairwise(rounds))
        assert len(rounds) <= math.ceil(30 / bands)
    assert asked(bands, fraction, absent=absent) == cohorts
    if not absent:
        assert {len(cohort) for cohort in cohorts} == {int(fraction * 40 + 1e-9)}
    assert asked(1, fraction, absent=absent) != cohorts


def test_where_all_are_asked_in_turn_the_turns_repeat() -> None:
    cohorts = asked(4, 0.25)
    assert all(cohort == cohorts[number % 4] for number, cohort in enumerate(cohorts))
    assert Counter(client for cohort in cohorts[:4] for client in cohort) == Counter(range(40))
    most = asked(4, 0.25, max_participations=2, min_train_nodes=0)
    assert max(Counter(client for cohort in most for client in cohort).values()) == 2


# --- a run --------------------------------------------------------------------------------------------


def run(config: RunConfig, path: Path, stop_after: int = 0) -> FederatedRun:
    """The rounds that are left, in this process; ``stop_after`` breaks it off."""

    def progress(record: dict[str, Any]) -> None:
        if record["round"] == stop_after:
            raise KeyboardInterrupt

    session = InProcessEngine().session(config, path)
    federation = FederatedRun(session, RunDirectory(path / "run", resume=True), [Tell(progress)])
    federation.run()
    return federation


def config(**keys: Any) -> RunConfig:
    """Six clients, two in each of six rounds."""
    return tiny_config(
        **{
            **WHOLE,
            "num-server-rounds": 6,
            "data.num-partitions": 6,
            "data.partitioner": "iid",
            "fraction-train": 0.34,
            "privacy.noise-bands": 3,
            "train.local-steps": 1,
            **keys,
        }
    )


def test_a_stopped_run_goes_on_with_the_same_bits_and_clients(tmp_path: Path) -> None:
    whole = run(config(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config(), tmp_path / "stopped", stop_after=4)
    resumed = run(config(), tmp_path / "stopped")
    one, two = (
        load_file(tmp_path / n / "run/adapter/adapter_model.safetensors") for n in ("whole", "stopped")
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    records = [[r["participants"] for r in f.directory.rounds()] for f in (whole, resumed)]
    assert records[0] == records[1]
    assert records[0][:3] == records[0][3:]
    assert sorted(p for cohort in records[0][:3] for p in cohort) == list(range(6))


def test_it_costs_what_so_many_rounds_of_independent_noise_cost(tmp_path: Path) -> None:
    """Each client takes part twice; by the Gaussian mechanism of the sensitivity that brute force finds."""
    federation = run(config(**{"privacy.accountant": "prv"}), tmp_path)
    last = federation.directory.rounds()[-1]
    c = factor(square_root(3), 6)
    moved = math.sqrt(max((c[:, [i, i + 3]] ** 2).sum() for i in range(3)))
    assert last["epsilon"] == pytest.approx(gaussian_epsilon(moved / 1.0, 1e-5), abs=0.02)
    spent = mechanism_of(config()).spent({0: 2})[0]
    assert (spent["granularity"], spent["noise_bands"], spent["steps"]) == ("client", 3, 2)


def test_noise_is_calibrated_for_the_rounds_that_fit() -> None:
    """100 rounds, one in 10: ten participations, as a limit of ten says without correlation."""
    keys = {"privacy.mode": "client", "num-server-rounds": 100, "fraction-train": 0.1}
    correlated = mechanism_of(from_flat({**keys, "privacy.noise-bands": 10})).server(seeded=True)
    limited = mechanism_of(from_flat({**keys, "privacy.max-participations": 10})).server(seeded=True)
    assert correlated is not None
    assert limited is not None
    assert correlated.noise_multiplier == limited.noise_multiplier
    assert correlated.coefficients == square_root(10)
    assert limited.coefficients == (1.0,)


def test_momentum_of_the_server_is_in_the_factor() -> None:
    keys = {"privacy.mode": "client", "privacy.noise-bands": 5, "fraction-train": 0.1}
    own = {"strategy.server-optimizer": "fedavgm", "strategy.server-beta-1": 0.7}
    of = mechanism_of(from_flat({**keys, **own})).server(seeded=True)
    assert of is not None
    assert of.coefficients == square_root(5, 0.7) != square_root(5)


REFUSED = [
    ({"strategy.name": "fedsvd"}, "privacy.noise-bands = 3: fedsvd writes the model in another basis"),
    ({"strategy.name": "rolora"}, "privacy.noise-bands = 3: rolora ships other tensors by turns"),
    ({"strategy.server-optimizer": "fedadam"}, "'fedadam' divides by the noise, must be none or fedavgm"),
    (
        {"strategy.allocation": "random-layers"},
        "strategy.allocation = 'random-layers': what rests takes back no noise",
    ),
    ({"privacy.mode": "example"}, "privacy.noise-bands = 3: must be 1 unless privacy.mode = 'client'"),
    ({"privacy.noise-bands": 0}, "privacy.noise-bands = 0"),
]


@pytest.mark.parametrize(("keys", "words"), REFUSED)
def test_where_noise_would_not_cancel_it_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config(**keys))


def test_the_strategy_refuses_by_itself_too() -> None:
    with pytest.raises(NotApplicable, match="client_dp: 3 coefficients, but fedsvd writes"):
        FactorStrategy(make_rule("fedsvd"), client_dp=mechanism())
    for name in ("fedavg", "ffa", "fed-sb"):
        assert FactorStrategy(make_rule(name), client_dp=mechanism()).selection.separation == 3
    with pytest.raises(ConfigError, match=r"coefficients: their length is 1\.11803, must be 1"):
        replace(mechanism(), coefficients=(1.0, 0.5))


def test_more_clients_than_can_rest_are_refused_before_anything_starts() -> None:
    asks = config(**{"fraction-train": 0.5})
    with pytest.raises(
        ConfigError, match=r"of 6 at most 2 can be asked in each; fraction-train = 0\.5 and min"
    ):
        mechanism_of(asks).check_data(None, range(6))
    with pytest.raises(ConfigError, match="min-train-nodes = 3 ask 3"):
        mechanism_of(config(**{"min-train-nodes": 3})).check_data(None, range(6))
    mechanism_of(config()).check_data(None, range(6))


def test_every_rule_is_decided() -> None:
    able = {n for n, r in RULES.items() if r.facts.client_dp and not r.facts.personal and r.facts.uploaded}
    taken = {n for n in able if not _refuses(n)}
    assert taken == {"fedavg", "ffa", "fed-sb", "zero-padding"}


def _refuses(name: str) -> bool:
    try:
        mechanism().check(make_rule(name))
    except NotApplicable:
        return True
    return False


def test_what_else_the_rule_is_composed_with() -> None:
    resting = make_rule("fedavg", allocation=make_allocation("random-layers", {"layers": 1}))
    adaptive = make_rule("fedavg", optimizer=ServerOptimizer(name="fedadam"))
    for rule in (resting, adaptive):
        with pytest.raises(NotApplicable, match="client_dp: 3 coefficients"):
            mechanism().check(rule)
    mechanism().check(make_rule("fedavg", optimizer=ServerOptimizer(name="fedavgm")))
