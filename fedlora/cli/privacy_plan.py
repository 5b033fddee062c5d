"""``fedlora privacy plan``: the noise that a budget needs, before anything is trained."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import err, marked, one_line_errors, out, percent, table_of
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.privacy.client_plan import ClientRequest

NEIGHBOURS = {
    "zero_out_one": "an example is replaced by nothing; that there are {} is public",
    "add_or_remove_one": "an example more or less; {} are declared, how many there are is hidden",
}


@one_line_errors
def plan(
    rounds: Annotated[int, typer.Option(help="R: num-server-rounds.")],
    target_epsilon: Annotated[float, typer.Option(help="Budget of the client over the whole run.")],
    target_delta: Annotated[float, typer.Option(help="Its delta, well below 1 / N.")],
    dataset_size: Annotated[
        int | None, typer.Option(help="N: examples of the client, or the number declared.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="B: train.batch-size.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="T: train.local-steps.")] = None,
    clients: Annotated[
        int | None, typer.Option(help="Hide whole clients of so many, in place of a client's examples.")
    ] = None,
    max_participations: Annotated[
        int | None, typer.Option(help="P: privacy.max-participations.", show_default="all rounds")
    ] = None,
    fraction_train: Annotated[float, typer.Option(help="F: share of the clients picked in a round.")] = 1.0,
    accountant: Annotated[str, typer.Option(help="prv, pld or rdp.")] = "prv",
    neighboring_relation: Annotated[
        str,
        typer.Option(help="zero_out_one: N is the real number; add_or_remove_one: a declared one."),
    ] = "zero_out_one",
    noise_bands: Annotated[int, typer.Option(help="b: privacy.noise-bands, with --clients.")] = 1,
    server_momentum: Annotated[
        float, typer.Option(help="strategy.server-beta-1 of fedavgm, with --clients.")
    ] = 0.0,
    min_clients: Annotated[
        int, typer.Option(help="n: secure.min-clients, where --clients share the noise.")
    ] = 0,
    colluding: Annotated[int, typer.Option(help="c: secure.colluding, with --min-clients.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The noise that keeps a client's budget in as many rounds as the server allows it.

    Also says what noise for the expected rounds would have promised and really spent.

    Example: fedlora privacy plan --dataset-size 2000 --batch-size 16 --local-steps 10 --rounds 100
    --fraction-train 0.5 --target-epsilon 8 --target-delta 1e-5

    Of whole clients, who share the noise with --min-clients 45: fedlora privacy plan --clients 500
    --fraction-train 0.1 --rounds 100 --noise-bands 10 --target-epsilon 4 --target-delta 1e-3
    """
    from fedlora.config.checks import require
    from fedlora.privacy.client_plan import ClientRequest
    from fedlora.privacy.plan import Request, make_plan

    of_examples = {"dataset-size": dataset_size, "batch-size": batch_size, "local-steps": local_steps}
    if clients is not None:
        for name, value in of_examples.items():
            require(
                value is None, f"--{name}", value, "is of a client's examples, leave it out with --clients"
            )
        require(
            neighboring_relation == "zero_out_one",
            "--neighboring-relation", neighboring_relation, "is of a client's examples, leave it out",
        )  # fmt: skip
        _plan_clients(
            ClientRequest(
                clients=clients,
                rounds=rounds,
                fraction_train=fraction_train,
                max_participations=max_participations or 0,
                noise_bands=noise_bands,
                server_momentum=server_momentum,
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                accountant=accountant,
                min_clients=min_clients,
                colluding=colluding,
            ),
            as_json=as_json,
        )
        return
    require(noise_bands == 1, "--noise-bands", noise_bands, "is of whole clients, needs --clients")
    require(min_clients == 0, "--min-clients", min_clients, "is of whole clients, needs --clients")
    require(
        server_momentum == 0, "--server-momentum", server_momentum, "is of whole clients, needs --clients"
    )
    if dataset_size is None or batch_size is None or local_steps is None:
        missing = ", ".join(f"--{name}" for name, value in of_examples.items() if value is None)
        raise ConfigError(f"{missing}: must be given, or --clients to hide whole clients")
    request = Request(
        dataset_size=dataset_size,
        batch_size=batch_size,
        local_steps=local_steps,
        rounds=rounds,
        max_participations=rounds if max_participations is None else max_participations,
        fraction_train=fraction_train,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
        neighboring_relation=neighboring_relation,
    )
    _warn_of_delta(target_delta, "--dataset-size", dataset_size)
    result = make_plan(request)
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    _print_worst_case(result, batch_size, dataset_size)
    if result["expected_case"]["participations"] < result["participations"]:
        _print_hopeful_cases(result, target_epsilon)
    else:
        out.print("\nOn average a client takes part as often as it may: the expected case is the worst case.")
    _print_accountants(result, target_epsilon)


def _warn_of_delta(target_delta: float, option: str, count: int) -> None:
    if target_delta * count >= 1:
        err.print(
            marked(
                "warning:",
                f" --target-delta = {target_delta:g}: is not below 1 / {option} = {1 / count:.2g}, so giving "
                "one away whole would pass as private",
                "yellow",
            ),
        )


def _plan_clients(request: ClientRequest, *, as_json: bool) -> None:
    from fedlora.privacy.client_plan import make_client_plan

    _warn_of_delta(request.target_delta, "--clients", request.clients)
    plan = make_client_plan(request)
    if as_json:
        sys.stdout.write(json.dumps(plan) + "\n")
        return
    bands, most = plan["noise_bands"], _count(plan["participations"], "round")
    once = f", at most once in {bands}" if bands > 1 else ""
    observer, seen_by_less = " but the server", {}
    if request.min_clients:
        shares = f"{request.min_clients} clients, {request.colluding} of whom tell the server theirs"
        observer = f" and the server, which has sums of {shares}"
        seen_by_less = {"epsilon of model": f"{_epsilon(plan['epsilon_of_model'])}, who sees the model alone"}
    rows = {
        "hides": f"one client, from everybody{observer}: its updates are replaced by nothing",
        "noise multiplier": f"{_noise(plan['noise_multiplier'])}  (noise standard deviation / clipping norm)",
        "epsilon": f"{_epsilon(plan['epsilon'])} at delta {plan['delta']:g}, by {plan['accountant']}",
        **seen_by_less,
        "attacker": _attacker(plan["attacker"]),
        "covers": f"{most} of a client{once}; {plan['asked']:,} of {request.clients:,} clients in each round",
        "mechanism": f"{plan['mechanism']}, nothing is counted for sampling clients",
        "in the model": f"{percent(plan['model_noise'])} of what independent noise of this size leaves",
    }
    for name, text in rows.items():
        out.print(f"{name:16}  {text}")


def _print_worst_case(plan: dict[str, Any], batch_size: int, dataset_size: int) -> None:
    rounds, steps = plan["participations"], plan["steps"]
    batch = f"{batch_size:,} of {_count(dataset_size, 'example')} in a batch on average"
    relation = plan["neighboring_relation"]
    rows = {
        "noise multiplier": f"{_noise(plan['noise_multiplier'])}  (noise standard deviation / clipping norm)",
        "epsilon": f"{_epsilon(plan['epsilon'])} at delta {plan['delta']:g}, by {plan['accountant']}",
        "attacker": _attacker(plan["attacker"]),
        "neighbours": f"{relation}: {NEIGHBOURS[relation].format(f'{dataset_size:,}')}",
        "covers": f"{_count(rounds, 'round')} of {_count(steps // rounds, 'step')}, {steps:,} in all",
        "sample rate": f"{plan['sample_rate']:.4g}  ({batch})",
    }
    for name, text in rows.items():
        out.print(f"{name:16}  {text}")


def _attacker(found: dict[str, Any]) -> str:
    """Percent of the members, for percent of false alarms."""
    from fedlora.privacy.trade_off import LOSSES, percent_up

    rates = found["true_positive_rate_at"]
    shares = [f"{percent_up(most)} % at {100 * float(rate):g} %" for rate, most in rates.items()]
    loosely = "" if found["found_by"] == LOSSES else f", by {found['found_by']}"
    return f"finds at most {', '.join(shares)} of false alarms{loosely}"


def _print_hopeful_cases(plan: dict[str, Any], target_epsilon: float) -> None:
    expected, sampling = plan["expected_case"], plan["client_sampling"]
    worst, average = _count(plan["participations"], "round"), _count(expected["participations"], "round")
    what = "noise calibrated for"
    rows = [
        [name, _noise(case["noise_multiplier"]), _epsilon(epsilon)]
        for name, case, epsilon in (
            (f"the worst case, {worst}", plan, plan["epsilon"]),
            (f"the expected case, {average}", expected, expected["epsilon_spent"]),
            ("client sampling multiplied into the sample rate", sampling, sampling["epsilon_spent"]),
        )
    ]
    out.print()
    out.print(table_of([what, "noise", f"epsilon of a client picked in {worst}"], rows, left=[what]))
    out.print(
        f"\nThe expected case would have claimed epsilon {_epsilon(target_epsilon)} with its noise, "
        f"and {percent(expected['picked_more_often'])} of the clients spend more."
        f"\nWith noise {_noise(plan['noise_multiplier'])} it would have claimed epsilon "
        f"{_epsilon(expected['epsilon_claimed'])}.",
    )


def _print_accountants(plan: dict[str, Any], target_epsilon: float) -> None:
    epsilons = ", ".join(f"{name} {_epsilon(value)}" for name, value in plan["by_accountant"].items())
    out.print(f"\nNoise {_noise(plan['noise_multiplier'])} by each accountant: epsilon {epsilons}.")
    tight = plan["tight"]
    if tight and tight["epsilon"]:
        out.print(
            f"rdp is an upper bound, here {percent(plan['epsilon'] / tight['epsilon'] - 1)} above pld, which "
            f"keeps epsilon {_epsilon(target_epsilon)} with noise {_noise(tight['noise_multiplier'])}.",
        )


def _noise(value: float | None) -> str:
    """Four decimals, rounded up: the next lower number would break the budget."""
    return "not resolved" if value is None else f"{math.ceil(1e4 * value) / 1e4:.4f}"


def _epsilon(value: float | None) -> str:
    if value is None:
        return "not resolved"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _count(number: float, thing: str) -> str:
    return f"{number:,.10g} {thing}{'' if number == 1 else 's'}"
