"""``fedlora privacy audit``: the epsilon that an attack shows, beside the one that is claimed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import marked, one_line_errors, out, table_of
from fedlora.cli.runs import ConfigFile, Overrides

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from fedlora.audit.membership import Measured, Membership
    from fedlora.audit.run import Audit

EXIT_CODES = {"stands": 0, "refuted": 1, "inconclusive": 3}


@one_line_errors
def audit(
    config: ConfigFile,
    set_: Overrides = [],  # noqa: B006
    canaries: Annotated[
        int, typer.Option(help="Canaries for the factors, and as many for the head, over all clients.")
    ] = 512,
    confidence: Annotated[float, typer.Option(help="Of all bounds together, in (0, 1).")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train once with canaries among the examples, attack, and compare with the claimed epsilon.

    Exit code 1 if the claim is refuted, 3 if the audit would not have noticed half the noise either. The
    ledgers of the data are left alone.

    Example: fedlora privacy audit audit.toml
    (fedlora example audit > audit.toml writes such a file)
    """
    from fedlora.audit.run import audit as carry_out
    from fedlora.audit.run import check_audit
    from fedlora.config import parse_overrides, read_config
    from fedlora.server.progress import RoundProgress

    settings = read_config(config, parse_overrides(set_))
    check_audit(settings, canaries, confidence)
    with RoundProgress(f"audit of {settings.strategy.name}", settings.num_server_rounds) as progress:
        progress.begin(0)
        found = carry_out(settings, canaries=canaries, confidence=confidence, progress=progress.update)
    if as_json:
        sys.stdout.write(json.dumps(as_record(found)) + "\n")
    else:
        out.print(_table(found))
        for line in [*verdict(found), *_notes(found), *membership_lines(found.membership)]:
            out.print(line)
    raise typer.Exit(EXIT_CODES[found.outcome])


def as_record(found: Audit) -> dict[str, Any]:
    """The audit as JSON, with the strongest bound by itself."""
    view, group, bound = found.strongest
    strongest = {"view": view, "group": group, **asdict(bound)}
    return {
        **asdict(found), "strongest": strongest, "outcome": found.outcome, "found_wrong": found.found_wrong,
    }  # fmt: skip


def verdict(found: Audit) -> list[str | Text]:
    """The bound next to the claim, in words."""
    _, group, bound = found.strongest
    sure = f"{100 * found.confidence:g} % confidence"
    lines: list[str | Text] = [
        f"An attack shows at least {bound.epsilon:.2f} with {sure}; the largest that {bound.canaries} "
        f"canaries could show is {bound.largest:.2f}; claimed: {found.claimed_epsilon:.2f} at delta "
        f"{found.target_delta:g}."
    ]
    for name, s in found.separations.items():
        lines.append(
            f"Canaries that are in and out lie {s.value:.2f} ({s.low:.2f} to {s.high:.2f}) standard "
            f"deviations apart ({name}); the claimed mechanism puts them {s.theory:.2f} apart."
        )
    if bound.epsilon > found.claimed_epsilon:
        refuted = f": the {group} give away more than it allows."
        lines.append(marked("The claim is refuted", refuted, "red"))
    lines += [
        marked("The mechanism is not the claimed one", f": {flaw}.", "red") for flaw in found.found_wrong
    ]
    if found.outcome == "inconclusive":
        lines.append("Inconclusive: half the noise would not have been noticed either. Use more canaries.")
    elif found.outcome == "stands":
        lines.append("The claim is not refuted. No audit proves one: this is what one attack found.")
    return lines


def membership_lines(found: Membership | None) -> list[str]:
    """Membership inference, for people."""
    if found is None:
        return ["Membership inference: not measured, there is no global model."]
    lines = [
        f"Membership inference by loss, {found.members} members and {found.non_members} non-members: "
        f"AUC {_measured(found.auc)}, 0.5 is chance"
    ]
    for at in found.true_positives:
        rate = f"not resolvable, {at.non_members_needed} non-members would do"
        if at.rate is not None:
            rate = _measured(at.rate)
        lines.append(f"  true positives at {100 * at.false_positive_rate:g} % false positives: {rate}")
    return lines


def _table(found: Audit) -> Table:
    header = ["view", "canaries", "number", "right guesses", "epsilon shown", "largest possible"]
    rows = [
        [view, group, str(b.canaries), f"{b.right} of {b.guesses}", f"{b.epsilon:.2f}", f"{b.largest:.2f}"]
        for view, groups in found.bounds.items()
        for group, b in groups.items()
    ]
    return table_of(header, rows, left=header[:2])


def _notes(found: Audit) -> list[str]:
    notes = []
    if found.unmeasured:
        notes.append(f"The final model was not attacked: {found.unmeasured}.")
    if found.draws < 1:
        notes.append(
            f"A canary in the data was in {found.draws:.2f} batches on average, so most left no trace "
            "whatever the noise: more steps, larger batches or smaller clients make the attack stronger."
        )
    if found.optimizer != "sgd":
        notes.append(
            f"train.optimizer = {found.optimizer!r} makes the attack weaker: it reads updates as if by sgd."
        )
    return notes


def _measured(found: Measured) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
