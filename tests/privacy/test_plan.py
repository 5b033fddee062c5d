"""The noise that ``fedlora privacy plan`` asks for, what other ways of counting spend, and how it refuses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedlora.cli import cli
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent
from fedlora.privacy.plan import Request, make_plan

REQUEST = Request(
    dataset_size=100,
    batch_size=10,
    local_steps=5,
    rounds=8,
    max_participations=8,
    fraction_train=0.5,
    target_epsilon=0.5,
    target_delta=1e-5,
    accountant="prv",
)
OPTIONS = {
    "dataset-size": "100",
    "batch-size": "10",
    "local-steps": "5",
    "rounds": "8",
    "fraction-train": "0.5",
    "target-epsilon": "0.5",
    "target-delta": "1e-5",
}


@lru_cache
def invoke(*flags: str, **changed: str) -> Result:
    options = {**OPTIONS, **{name.replace("_", "-"): value for name, value in changed.items()}}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    return CliRunner().invoke(cli, ["privacy", "plan", *arguments, *flags])


@lru_cache
def planned(**changed: Any) -> dict[str, Any]:
    return make_plan(replace(REQUEST, **changed))


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_the_noise_keeps_the_budget_in_the_worst_case_and_one_per_cent_less_does_not(accountant: str) -> None:
    plan = planned(max_participations=6, accountant=accountant)
    assert plan["steps"] == 6 * 5
    assert plan["sample_rate"] == 0.1
    assert plan["delta"] == 1e-5
    assert plan["epsilon"] <= 0.5
    assert plan["epsilon"] == epsilon_spent(plan["noise_multiplier"], 0.1, 30, 1e-5, accountant)
    assert epsilon_spent(0.99 * plan["noise_multiplier"], 0.1, 30, 1e-5, accountant) > 0.5


def test_the_expected_case_claims_less_than_the_worst_case_spends() -> None:
    plan, expected = planned(), planned()["expected_case"]
    assert expected["participations"] == 4.0
    assert expected["steps"] == 20
    assert expected["epsilon_claimed"] == epsilon_spent(plan["noise_multiplier"], 0.1, 20, 1e-5)
    assert expected["noise_multiplier"] == calibrate_noise(0.5, 1e-5, 0.1, 20)
    assert expected["epsilon_spent"] == epsilon_spent(expected["noise_multiplier"], 0.1, 40, 1e-5)
    assert expected["epsilon_claimed"] < plan["epsilon"] <= 0.5 < expected["epsilon_spent"]


def test_client_sampling_in_the_sample_rate_claims_even_less() -> None:
    plan, sampling = planned(), planned()["client_sampling"]
    assert (sampling["sample_rate"], sampling["steps"]) == (0.05, 40)
    assert sampling["noise_multiplier"] == calibrate_noise(0.5, 1e-5, 0.05, 40)
    assert sampling["epsilon_spent"] == epsilon_spent(sampling["noise_multiplier"], 0.1, 40, 1e-5)
    assert sampling["epsilon_spent"] > plan["expected_case"]["epsilon_spent"]


def test_who_is_picked_more_often_than_expected_is_counted() -> None:
    """Of 8 fair coins, more than 4 heads: (1 - C(8, 4) / 2^8) / 2."""
    assert planned()["expected_case"]["picked_more_often"] == pytest.approx((1 - 70 / 256) / 2)
    share = planned(fraction_train=0.1, rounds=10, accountant="rdp")["expected_case"]["picked_more_often"]
    assert share == pytest.approx(1 - 0.9**10 - 10 * 0.1 * 0.9**9)  # 0.1 x 10 is exactly one round


@pytest.mark.parametrize("changed", [{"fraction_train": 1.0}, {"max_participations": 3}])
def test_where_the_server_allows_no_more_than_expected_the_cases_are_one(changed: dict[str, Any]) -> None:
    plan = planned(**changed, accountant="rdp")
    assert plan["expected_case"]["steps"] == plan["steps"]
    assert plan["expected_case"]["noise_multiplier"] == plan["noise_multiplier"]
    assert (
        plan["expected_case"]["epsilon_spent"] == plan["expected_case"]["epsilon_claimed"] == plan["epsilon"]
    )
    assert plan["expected_case"]["picked_more_often"] == 0.0


def test_rdp_says_how_loose_it_is() -> None:
    plan = planned(accountant="rdp")
    tight = plan["tight"]
    assert plan["epsilon"] / tight["epsilon"] > 1.05
    assert tight["epsilon"] == epsilon_spent(plan["noise_multiplier"], 0.1, 40, 1e-5, "pld")
    assert tight["noise_multiplier"] == calibrate_noise(0.5, 1e-5, 0.1, 40, "pld") < plan["noise_multiplier"]
    assert planned()["tight"] is None


def test_what_prv_cannot_resolve_is_left_open_and_not_made_up() -> None:
    plan = planned(accountant="rdp", target_delta=1e-13)
    assert plan["by_accountant"]["prv"] is plan["by_accountant"]["pld"] is None
    assert plan["by_accountant"]["rdp"] == plan["epsilon"] <= 0.5
    assert (
        "prv not resolved, rdp 0.5, pld not resolved" in invoke(accountant="rdp", target_delta="1e-13").stdout
    )


@pytest.mark.parametrize(
    ("examples", "by_its_later_formula", "picked_every_round"),
    [pytest.param(392_702, 7.10, 8.29, id="mnli"), pytest.param(67_349, 8.02, 10.44, id="sst2")],
)
def test_the_nominal_6_of_fedsvds_first_code_is_7_to_8_on_average_and_up_to_10(
    examples: int, by_its_later_formula: float, picked_every_round: float
) -> None:
    """Six clients with equal shares, half of them a round, batches of 128, 100 rounds of 10 steps.

    The first released code multiplied the share of the clients into the sample rate (all 1000 steps);
    the later one counts the 500 expected steps at the client's own rate, 1 / its number of batches.
    """
    rate = 1 / math.ceil(examples / 6 / 128)
    noise = calibrate_noise(6.0, 1e-5, rate * 0.5, 1000)
    assert epsilon_spent(noise, rate * 0.5, 1000, 1e-5) == pytest.approx(6.0, abs=0.02)
    assert epsilon_spent(noise, rate, 500, 1e-5) == pytest.approx(by_its_later_formula, abs=0.03)
    assert epsilon_spent(noise, rate, 1000, 1e-5) == pytest.approx(picked_every_round, abs=0.03)


# --- the command --------------------------------------------------------------------------------------


def test_json_is_the_plan_and_every_round_is_the_default() -> None:
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert json.loads(result.stdout) == planned()
    assert invoke("--json", max_participations="8").stdout == result.stdout


def test_people_read_aligned_numbers_that_are_those_of_the_plan() -> None:
    plan, text = planned(), invoke().stdout
    expected, sampling = plan["expected_case"], plan["client_sampling"]
    table = [line for line in text.splitlines() if re.match(r"the worst|the expected|client sampling", line)]
    assert [float(line.split()[-1]) for line in table] == [
        pytest.approx(epsilon, abs=0.005)
        for epsilon in (plan["epsilon"], expected["epsilon_spent"], sampling["epsilon_spent"])
    ]
    assert [float(line.split()[-2]) for line in table] == [
        pytest.approx(case["noise_multiplier"], abs=1e-4) for case in (plan, expected, sampling)
    ]
    assert len({len(line) for line in table}) == 1
    assert "8 rounds of 5 steps, 40 in all" in text
    assert "36.3 % of the clients spend more" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_printed_noise_keeps_the_budget() -> None:
    printed = float(re.findall(r"noise multiplier +(\S+)", invoke(accountant="rdp").stdout)[0])
    assert printed >= planned(accountant="rdp")["noise_multiplier"]
    assert epsilon_spent(printed, 0.1, 40, 1e-5, "rdp") <= 0.5


def test_rdp_is_called_a_bound() -> None:
    text = invoke(accountant="rdp").stdout
    loose = 100 * (planned(accountant="rdp")["epsilon"] / planned(accountant="rdp")["tight"]["epsilon"] - 1)
    assert f"rdp is an upper bound, here {loose:.1f} % above pld" in text


def test_everybody_in_every_round_is_said_in_one_sentence() -> None:
    text = invoke(fraction_train="1").stdout
    assert "the expected case is the worst case" in text
    assert "client sampling" not in text


@pytest.mark.parametrize(("delta", "warned"), [("0.01", True), ("0.0099", False)])
def test_a_delta_from_one_over_n_is_warned_of_and_not_refused(delta: str, warned: bool) -> None:
    result = invoke("--json", target_delta=delta, accountant="rdp")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["delta"] == float(delta)
    lines = result.stderr.splitlines()
    assert len(lines) == warned
    assert all(line.startswith(f"warning: --target-delta = {delta}") and "0.01" in line for line in lines)


REFUSED = {
    "no budget": ("target-epsilon", "0", "must be > 0"),
    "negative budget": ("target-epsilon", "-1", "must be > 0"),
    "budget nan": ("target-epsilon", "nan", "must be > 0"),
    "budget inf": ("target-epsilon", "inf", "at most 100"),
    "budget out of reach": ("target-epsilon", "0.001", "no noise reaches it"),
    "delta 0": ("target-delta", "0", "(0, 0.01]"),
    "delta 1": ("target-delta", "0.99", "(0, 0.01]"),
    "delta nan": ("target-delta", "nan", "(0, 0.01]"),
    "delta below the accountant": ("target-delta", "1e-12", "1e-10 or more"),
    "sample rate over 1": ("batch-size", "101", "at most --dataset-size, which is 100"),
    "no batch": ("batch-size", "0", "must be >= 1"),
    "no examples": ("dataset-size", "-5", "must be >= 1"),
    "no steps": ("local-steps", "0", "must be >= 1"),
    "no rounds": ("rounds", "0", "must be >= 1"),
    "too many steps": ("rounds", "1000000", "at most 100,000"),
    "more participations than rounds": ("max-participations", "9", "at most --rounds, which is 8"),
    "no participations": ("max-participations", "0", "must be >= 1"),
    "no share": ("fraction-train", "0", "(0, 1]"),
    "share over 1": ("fraction-train", "1.01", "(0, 1]"),
    "share nan": ("fraction-train", "nan", "(0, 1]"),
    "unknown accountant": ("accountant", "gdp", "prv, rdp, pld"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rubbish_is_refused_in_one_line_with_exit_code_2(name: str) -> None:
    option, value, words = REFUSED[name]
    result = invoke("--json", **{option: value})
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert (option in line) or name == "too many steps"


def test_what_an_attacker_finds_stands_beside_epsilon() -> None:
    found = planned()["attacker"]
    rates = found["true_positive_rate_at"]
    assert found["found_by"] == "the privacy loss distribution"
    assert list(rates) == ["0.001", "0.01", "0.1"]
    for alarm, reached in rates.items():
        assert float(alarm) < reached < 1e-5 + math.exp(0.5) * float(alarm)
    shown = math.ceil(1000 * rates["0.01"]) / 10
    assert f"{shown:.1f} % at 1 %" in invoke().stdout


def test_a_plan_for_client_level_is_the_gaussian_curve() -> None:
    from scipy.stats import norm

    plan = planned(
        dataset_size=1, batch_size=1, local_steps=1, rounds=8, fraction_train=1.0, target_epsilon=2.0
    )
    for alarm, reached in plan["attacker"]["true_positive_rate_at"].items():
        exact = norm.cdf(norm.ppf(float(alarm)) + math.sqrt(8) / plan["noise_multiplier"])
        assert exact <= reached <= exact + 2e-4


# --- whole clients ------------------------------------------------------------------------------------

CLIENTS = [
    "privacy", "plan", "--clients", "500", "--fraction-train", "0.1", "--rounds", "100",
    "--target-epsilon", "4", "--target-delta", "1e-3",
]  # fmt: skip


def test_noise_for_whole_clients_counts_the_rounds_that_fit() -> None:
    result = CliRunner().invoke(cli, [*CLIENTS, "--noise-bands", "10", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["hides"], plan["mechanism"]) == ("client", "banded matrix factorisation")
    assert (plan["participations"], plan["asked"], plan["noise_bands"]) == (10, 50, 10)
    assert plan["noise_multiplier"] == calibrate_noise(4.0, 1e-3, 1.0, 10)
    assert plan["epsilon"] == epsilon_spent(plan["noise_multiplier"], 1.0, 10, 1e-3) <= 4
    assert plan["sensitivity"] == pytest.approx(math.sqrt(10))
    assert plan["model_noise"] == pytest.approx(math.sqrt(9.237130770142961 / 50.5))
    shown = CliRunner().invoke(cli, [*CLIENTS, "--noise-bands", "10"]).stdout
    assert "10 rounds of a client, at most once in 10; 50 of 500 clients in each round" in shown
    assert "42.8 % of what independent noise" in shown
    alone = json.loads(CliRunner().invoke(cli, [*CLIENTS, "--json"]).stdout)
    assert (alone["mechanism"], alone["participations"], alone["model_noise"]) == ("Gaussian", 100, 1.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--noise-bands", "11"],
            "--noise-bands = 11: a client takes part once in so many rounds, so of 500 at",
        ),
        (["--batch-size", "4"], "--batch-size = 4: is of a client's examples, leave it out with --clients"),
        (["--server-momentum", "1"], "--server-momentum = 1.0: must be < 1"),
        (["--max-participations", "101"], "--max-participations = 101: must be at most --rounds"),
        (["--clients", "0"], "--clients = 0: must be >= 1"),
        (["--min-clients", "51"], "--min-clients = 51: must be above --colluding 1 and at most the 50"),
        (["--min-clients", "5", "--colluding", "-5"], "--colluding = -5: must be >= 0"),
        (
            ["--min-clients", "5", "--colluding", "4"],
            "--colluding = 4: the masks of 5 clients (--min-clients) hold",
        ),
        (["--min-clients", "5", "--colluding", "5"], "--min-clients = 5: must be above --colluding 5"),
    ],
)
def test_a_plan_of_whole_clients_is_refused_in_one_line(flags: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, [*CLIENTS, *flags])
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_without_clients_their_options_are_refused_and_examples_are_asked_for() -> None:
    alone = ["privacy", "plan", "--rounds", "9", "--target-epsilon", "4", "--target-delta", "1e-3"]
    missing = CliRunner().invoke(cli, [*alone, "--batch-size", "4"])
    assert missing.exit_code == 2
    assert "--dataset-size, --local-steps: must be given, or --clients" in " ".join(missing.stderr.split())
    bands = CliRunner().invoke(cli, [*alone, "--noise-bands", "4"])
    assert "--noise-bands = 4: is of whole clients, needs --clients" in " ".join(bands.stderr.split())
