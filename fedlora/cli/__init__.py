"""The command line. Exit codes: 0 done, 1 the run failed, 2 the request was wrong."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from fedlora.cli import federation as deployment
from fedlora.cli import membership
from fedlora.cli.aggregate import aggregate
from fedlora.cli.console import Commands, print_version
from fedlora.cli.forget import forget
from fedlora.cli.init import example, init
from fedlora.cli.node import log
from fedlora.cli.predict import chat, predict
from fedlora.cli.pretrain import pretrain
from fedlora.cli.privacy_audit import audit
from fedlora.cli.privacy_ledger import new_dataset, spent
from fedlora.cli.privacy_plan import plan
from fedlora.cli.probe import probe
from fedlora.cli.runs import compare, evaluate, run
from fedlora.cli.strategies import strategies
from fedlora.cli.watch import watch

cli = typer.Typer(
    name="fedlora",
    cls=Commands,
    suggest_commands=False,  # Click does, too
    no_args_is_help=True,
    add_completion=False,
    help="Federated LoRA fine-tuning: simulate, deploy, and budget privacy with one Flower app.",
    pretty_exceptions_enable=False,
)


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


for command in (
    init, example, run, compare, watch, evaluate, predict, chat, aggregate, forget, strategies, pretrain,
    probe,
):  # fmt: skip
    cli.command()(command)

privacy = typer.Typer(no_args_is_help=True, help="Budgets of privacy: what is spent, what noise costs.")
cli.add_typer(privacy, name="privacy")
privacy.command()(plan)
privacy.command("spent")(spent)
privacy.command("new-dataset")(new_dataset)
privacy.command("audit")(audit)

federation = typer.Typer(
    no_args_is_help=True, help="Deployments: one server, a machine for each data holder."
)
cli.add_typer(federation, name="federation")
for step in (
    deployment.init,
    deployment.up,
    deployment.down,
    deployment.status,
    deployment.register,
    membership.add,
    membership.revoke,
    membership.rotate,
    membership.certify,
    deployment.check,
    deployment.gate,
):
    federation.command()(step)


node = typer.Typer(no_args_is_help=True, help="A machine that holds data: what left it.")
cli.add_typer(node, name="node")
node.command("log")(log)


def main() -> None:
    """Entry point of the ``fedlora`` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to the clients
    cli()
