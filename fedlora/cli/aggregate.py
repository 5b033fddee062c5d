"""``fedlora aggregate``: PEFT adapters that were trained anywhere, as one."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.console import one_line_errors, out
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.merge.aggregate import Outcome


@one_line_errors
def aggregate(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER_DIR...", help="Directories that save_pretrained wrote.")
    ],
    strategy: Annotated[str, typer.Option("--strategy", metavar="NAME", help="See: fedlora strategies.")],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory for the result.")],
    option: Annotated[
        list[str],
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the strategy. Repeatable."),
    ] = [],  # noqa: B006
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="One for each adapter; equal if left out.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The adapters' base model, to check their layers.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the base model with the update inside.")
    ] = False,
    max_rank: Annotated[
        int, typer.Option("--max-rank", metavar="R", help="Cut the adapter to this rank; 0: leave it.")
    ] = 0,
    reduce_intruders: Annotated[
        float | None,
        typer.Option("--reduce-intruders", metavar="SHARE", help="Leave 0 to 1 of each intruder dimension."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Aggregate saved PEFT adapters, as one round from a zero product.

    Mixed ranks, alphas, rsLoRA and target modules are read as they are. The result is a PEFT adapter, or with
    --merge a model. Pickles are never opened.

    Example: fedlora aggregate --strategy flora --weights 3,1 --out global clients/a clients/b
    """
    from fedlora.study import library

    outcome = library.aggregate(
        adapters,
        out_dir,
        strategy=strategy,
        options=parse_options(option),
        weights=None if weights is None else parse_weights(weights),
        base=base,
        merge=merge,
        max_rank=max_rank,
        reduce_intruders=reduce_intruders,
    )
    if as_json:
        paths = {"adapters": list(map(str, adapters)), "out": str(out_dir)}
        sys.stdout.write(json.dumps(asdict(outcome) | paths) + "\n")
        return
    lines = summary_lines(adapters, outcome, equal=weights is None)
    for line in (*lines, f"{'model' if merge else 'adapter'} in {out_dir}"):
        out.print(line)


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """``key=value`` strings; a value is TOML, or else a plain string.

    Raises:
        ConfigError: an assignment without ``=``.

    >>> parse_options(["lam=0.5", "init-a=kaiming"])
    {'lam': 0.5, 'init_a': 'kaiming'}
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--option {assignment}: must be key=value, for instance lam=0.01")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        options[key.strip().replace("-", "_")] = value
    return options


def parse_weights(text: str) -> list[float]:
    """A comma string of numbers.

    Raises:
        ConfigError: something in it is no number.

    >>> parse_weights("3, 1,0.5")
    [3.0, 1.0, 0.5]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--weights = {text!r}: must be a comma list of numbers, one for each adapter"
        ) from None


def summary_lines(adapters: Sequence[Path], outcome: Outcome, *, equal: bool) -> list[str]:
    """The outcome for people."""
    found = outcome.diagnostics
    lines = [
        f"{outcome.strategy} over {len(adapters)} adapters of {outcome.modules} modules"
        + (", equal weights (no --weights)" if equal and not outcome.custom_weights else "")
    ]
    for path, weight, ranks in zip(adapters, outcome.weights, outcome.ranks_in, strict=True):
        lines.append(f"  weight {weight:.4f}  rank {_ranks(ranks):8} {path}")
    lines += [
        f"  gap {found.gap:.3g} (0: nothing of the mean update is lost)",
        f"  energy lost {100 * found.energy_lost:.3g} %",
        f"  cosine between adapters {found.cosine:.3f}",
        f"  effective rank of the mean {found.effective_rank:.1f}",
    ]
    if outcome.head:
        lines.append(f"  averaged too: {', '.join(outcome.head)}")
    if outcome.ranks_out:
        lost = f", {100 * outcome.energy_cut:.3g} % of the energy cut off" if outcome.energy_cut else ""
        lines.append(f"  rank out {_ranks(outcome.ranks_out)}{lost}")
    if outcome.intruders is not None:
        count, looked_at = outcome.intruders
        lines.append(f"  intruder dimensions {count} of {looked_at}")
    return lines + [f"  note: {note}" for note in outcome.notes]


def _ranks(ranks: tuple[int, ...]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
