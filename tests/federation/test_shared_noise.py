"""Runs in which clients clip and noise their own updates: what the server is told, what is claimed of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from typer.testing import CliRunner

from clients.handler import handle
from clients.privacy import mechanism_of
from clients.privacy.distributed import DistributedClientPrivacy
from clients.secure import words_of
from fedlora import wire
from fedlora.cli import cli
from fedlora.config import to_flat
from fedlora.core.state import State
from fedlora.errors import ConfigError, RunFailed
from fedlora.privacy.ledger import read_ledgers
from fedlora.secure.graph import colluders_held
from fedlora.secure.noise import system_words
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.preview import preview
from fedlora.study.report.configuration import _seen_by_less
from tests.federation.secured import ENGINE, carry_out, config_of, numbers, phase

pytestmark = pytest.mark.slow

KEYS: dict[str, Any] = {
    "privacy.mode": "client", "secure.noise": "distributed", "privacy.noise-multiplier": 1e-3,
    "privacy.clipping-norm": 0.01, "num-server-rounds": 1, "privacy.target-epsilon": 1e9,
    "engine.cohort-size": 1, "privacy.accountant": "rdp",
}  # fmt: skip
SOME = {
    **KEYS, "privacy.noise-multiplier": 4.0, "privacy.target-epsilon": 8.0, "engine.cohort-size": 2,
}  # fmt: skip


def test_almost_without_noise_it_is_the_central_mechanism(cache: Path, tmp_path: Path) -> None:
    """Clipped by clients as by the server, over the planned cohort, also where one of five gets lost."""

    def losing(message: Any, partition: int, reply: Any) -> Any:
        return None if (phase(message), partition) == ("train", 3) else reply

    summed, grid = carry_out(tmp_path / "sums", losing, **KEYS)
    central = {**KEYS, "secure.mode": "none", "secure.noise": "none"}
    plain, _ = carry_out(tmp_path / "plain", losing, **central)
    for name, tensor in plain.state.adapters.items():
        for factor, value in tensor.tensors().items():
            apart = summed.state.adapters[name].tensors()[factor] - value
            assert float(apart.abs().max()) < 6 * 1e-5 * math.sqrt(3)
    moved = torch.cat([t.reshape(-1) for t in numbers(plain.state).values()])
    assert float(moved.abs().max()) > 1e-3
    line = summed.directory.rounds()[0]
    assert line["participants"] == [0, 1, 2, 4]
    assert line["train_loss"] is None
    rows = [c[wire.MASKED][wire.MASKED].numpy() for _, at, c in grid.replies if at == "train"]
    shipped = sum(t.numel() for a in plain.state.adapters.values() for t in a.tensors().values())
    shipped += sum(t.numel() for t in plain.state.head.values())
    assert {row.nbytes for row in rows} == {4 * shipped}  # no weight, no loss, no count beside them
    said = dict(preview(summed.config).lines())["traffic"]
    assert said.startswith(f"{4 * shipped / 1e6:.3g} MB up")


def test_the_model_has_the_noise_of_everybody_in_the_sum(cache: Path, tmp_path: Path) -> None:
    """Of five shares, three less one of which are counted on: sqrt(5 / 2) of the claimed noise."""
    noisy, _ = carry_out(tmp_path / "noisy", **SOME)
    quiet, _ = carry_out(tmp_path / "quiet", **KEYS)
    apart = [
        (tensor.tensors()[x] - quiet.state.adapters[name].tensors()[x]).numpy().ravel()
        for name, tensor in noisy.state.adapters.items()
        for x in "AB"
    ]
    found, expected = np.concatenate(apart).std(), math.sqrt(5 / 2) * 4.0 * 0.01 / 5
    assert found == pytest.approx(expected, rel=0.06)


def test_both_epsilons_are_recorded_and_the_ledger_has_the_larger(cache: Path, tmp_path: Path) -> None:
    """Against the rule for one Gaussian mechanism of z / sqrt(rounds), with noise of two and of three."""
    run, _ = carry_out(tmp_path / "run", **{**SOME, "num-server-rounds": 2, "privacy.accountant": "pld"})
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    claim = result["claim"]
    assert (claim["granularity"], claim["sampling_method"], claim["steps"]) == ("client", "none", 2)
    from scipy.optimize import brentq

    from tests.secure.test_shared_noise import gaussian

    for key, share in (("epsilon", 1.0), ("epsilon_of_model", (3 * 1024 - 4) / (2 * 1024 - 4))):
        sigma = 4.0 * math.sqrt(share / 2)
        exact = brentq(lambda e, s=sigma: gaussian(s, e) - 1e-5, 1e-4, 50)
        assert exact <= claim[key] <= exact + 2e-3
    assert claim["colluding"] == 1
    [*accounts] = read_ledgers(run.session.stores / "ledger")
    assert len(accounts) == 5
    assert {account.unit for account in accounts} == {":client"}
    assert {round(a.standing.epsilon, 6) for a in accounts} == {round(claim["epsilon"], 6)}
    shown = CliRunner().invoke(cli, ["privacy", "spent", str(tmp_path), "--json"]).stdout
    assert [row["epsilon_of_model"] for row in json.loads(shown)] == [claim["epsilon_of_model"]] * 5
    options = ["--clients", "5", "--rounds", "2", "--min-clients", "3", "--target-delta", "1e-5"]
    told = ["privacy", "plan", *options, "--accountant", "pld", "--json", "--target-epsilon"]
    plan = json.loads(CliRunner().invoke(cli, [*told, str(claim["epsilon"])]).stdout)
    assert plan["noise_multiplier"] == pytest.approx(4.0, rel=1e-3)
    assert plan["epsilon_of_model"] == pytest.approx(claim["epsilon_of_model"], rel=1e-3)
    assert plan["model_noise"] == pytest.approx(math.sqrt(5 / 2), rel=2e-3)


def test_fewer_clients_than_the_noise_counts_on_end_the_run(cache: Path, tmp_path: Path) -> None:
    def losing(message: Any, partition: int, reply: Any) -> Any:
        return None if phase(message) == "train" and partition > 2 else reply

    with pytest.raises(RunFailed, match=r"3 clients uploaded, secure\.min-clients = 4"):
        carry_out(tmp_path / "run", losing, **{**SOME, "secure.min-clients": 4})


def test_a_client_over_its_budget_takes_no_part(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"privacy\.target-epsilon = 0\.5"):
        carry_out(tmp_path / "run", **{**SOME, "privacy.target-epsilon": 0.5})


def test_outside_of_a_simulation_noise_is_no_ones_to_repeat(cache: Path) -> None:
    run = config_of(**SOME)
    assert words_of(run, 1, 0, simulation=False) is system_words
    drawn = [words_of(run, *place, simulation=True)(4).tolist() for place in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert drawn[0] == drawn[3]
    assert len({*map(tuple, drawn)}) == 3


def test_outside_of_a_simulation_no_evaluation_leaves_a_node(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the reason for it: what a client measures is in no epsilon."""
    monkeypatch.setattr("clients.owner.REFUSAL_SECONDS", 1e-3)
    message: dict[str, Any] = {}

    def keeping(asked: Any, partition: int, reply: Any) -> Any:
        if phase(asked) == "train" and partition == 0:
            message["content"] = asked.content
        return reply

    carry_out(tmp_path / "run", keeping, **SOME)
    node = {"partition-id": 0, "state-dir": str(tmp_path / "node")}
    reply = handle("evaluate", message["content"], to_flat(config_of(**SOME)), node, ENGINE.runtimes)
    assert not any(dict(record) for record in reply.metric_records.values())
    assert "the node declines; its own log says why" in str(dict(reply.config_records))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (
            {"secure.mode": "none"},
            "secure.noise = 'distributed': clients' shares of noise add up in sums alone",
        ),
        ({"privacy.mode": "none"}, "secure.noise = 'distributed': is noise for whole clients"),
        ({"privacy.mode": "example"}, "secure.noise = 'distributed': is noise for whole clients"),
        ({"privacy.noise-bands": 2}, "privacy.noise-bands = 2: noise that a later round takes back"),
        ({"privacy.clipping": "adaptive"}, "privacy.clipping = 'adaptive': norms are counted nowhere"),
        ({"privacy.release-metrics": True}, "privacy.release-metrics = True: nothing leaves a client"),
        ({"secure.colluding": 3}, "secure.colluding = 3: must be below secure.min-clients, which is 3"),
        ({"secure.colluding": 2}, "secure.colluding = 2: the masks of 3 clients .* against at most 1"),
        ({"privacy.noise-multiplier": 1e-7}, "privacy.noise-multiplier = 1e-07: its grid is too fine"),
        (
            {"fraction-train": 0.4},
            "fraction-train = 0.4: a round asks 2 of 5 clients, secure.min-clients = 3",
        ),
        ({"strategy.name": "flora"}, "the aggregate of flora is no mean"),
        ({"secure.noise": "skellam"}, "secure.noise = 'skellam'"),
    ],
)
def test_what_shares_of_noise_do_not_cover_is_refused_before_anything_starts(
    keys: dict[str, Any], why: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        carry_out(tmp_path / "run", **{**SOME, **keys})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clients", [3, 4, 50])
def test_more_shares_are_worth_more_noise_and_a_lost_one_less(clients: int) -> None:
    privacy = mechanism_of(config_of(**SOME))
    assert isinstance(privacy, DistributedClientPrivacy)
    assert privacy.noise_of(privacy.config.secure.honest) == pytest.approx(4.0)
    assert privacy.noise_of(clients) > 4.0 * math.sqrt(clients / 2)
    assert privacy.noise_of(1) < 4.0 / math.sqrt(2)


STEP: dict[str, Any] = {
    "privacy.mode": "example", "privacy.noise-multiplier": 2.0, "privacy.target-epsilon": 50.0,
    "train.optimizer": "sgd", "train.local-steps": 1, "num-server-rounds": 2, "privacy.accountant": "pld",
    "train.learning-rate": 1e-3, "engine.cohort-size": 1,
}  # fmt: skip


def test_other_clients_noise_in_a_sum_is_a_second_epsilon(cache: Path, tmp_path: Path) -> None:
    """As the same run would claim with sqrt(T) times the noise; the sums' noise is that of all five."""
    run, _ = carry_out(tmp_path / "run", **STEP)
    claim = json.loads((tmp_path / "run" / "result.json").read_text())["claim"]
    [[noise, rate, steps]] = claim["history"]
    assert (noise, steps) == (2.0, 2)
    louder = PLDAccountant()
    louder.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(2.0 * math.sqrt(2))), steps)
    assert claim["epsilon_of_sums"] == pytest.approx(louder.get_epsilon(1e-5), rel=5e-3)
    assert claim["epsilon_of_sums"] < claim["epsilon"]
    before, after = (
        torch.cat([t.B.reshape(-1) for t in state.adapters.values()])
        for state in (_started(tmp_path / "other"), run.state)
    )
    expected = 1e-3 * 2.0 / 2 * math.sqrt(2 * 5) / 5
    assert float((after - before).std()) == pytest.approx(expected, rel=0.15)


def _started(path: Path) -> State:
    """Where such runs start."""
    return FederatedRun(ENGINE.session(config_of(**STEP), path), RunDirectory(path)).state


@pytest.mark.parametrize(
    "keys",
    [
        {"train.local-steps": 2}, {"train.local-epochs": 1}, {"train.optimizer": "adamw"},
        {"train.weight-decay": 0.1}, {"train.max-grad-norm": 1.0}, {"privacy.clipping": "adaptive"},
        {"privacy.noise-multiplier": 0.0}, {"train.learning-rate": 0.5}, {"secure.mode": "none"},
        {"strategy.name": "flexlora"}, {"secure.colluding": 2}, {"train.nested-ranks": True},
        {"client-groups": '[{"partitions": "0", "batch-size": 1}]'},
        {"train.optimizer-options": '{"nesterov": true}', "train.momentum": 0.5},
    ],
)  # fmt: skip
def test_where_noise_does_not_add_up_nothing_is_claimed_of_sums(keys: dict[str, Any]) -> None:
    claim = {"history": [[2.0, 0.1, 2]]}
    assert mechanism_of(config_of(**STEP)).beside(claim, 5)
    assert mechanism_of(config_of(**{**STEP, **keys})).beside(claim, 5) == {}


@pytest.mark.parametrize(
    "history",
    [None, [], [[2.0, 0.1, 2], [3.0, 0.1, 2]], [[3.0, 0.1, 2]], [[2.0, 1.5, 2]], [[2.0, 0.1, 9]], "x"],
)
def test_a_claim_that_is_not_of_this_run_gets_no_second_epsilon(history: Any) -> None:
    assert mechanism_of(config_of(**STEP)).beside({"history": history}, 5) == {}
    assert mechanism_of(config_of(**SOME)).beside({"steps": history}, 5) == {}


def test_colluders_that_masks_do_not_hold_against_are_not_counted_on() -> None:
    """Everybody masks with everybody up to 31; beyond, a fifth may collude."""
    assert [colluders_held(n, n, 0.66) for n in (2, 3, 10, 31)] == [1, 1, 6, 20]
    assert [colluders_held(least, 100, 0.66) for least in (3, 50, 100)] == [0, 10, 20]


def test_a_report_has_the_second_epsilon_of_whoever_spent_most() -> None:
    claims: list[dict[str, Any]] = [{"epsilon_of_model": 1.234}, {"epsilon_of_model": 2.0}, {}]
    runs: list[Any] = [SimpleNamespace(result={"claim": claim}) for claim in claims]
    assert _seen_by_less(runs) == {"Epsilon against who sees the model alone": "2.00 at most"}
    assert _seen_by_less([SimpleNamespace(result={})]) == {}  # type: ignore[list-item]
