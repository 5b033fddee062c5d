"""``fedlora pretrain``: a small image backbone for machines without a hub."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated

import typer

from fedlora.cli.console import err, marked, one_line_errors, out, percent


@one_line_errors
def pretrain(
    kind: Annotated[str, typer.Argument(metavar="vit|mixer", help="A Vision Transformer or an MLP-Mixer.")],
    data: Annotated[
        str, typer.Option("--data", metavar="NAME", help="Built-in images: digits or fashion-mnist.")
    ] = "digits",
) -> None:
    """Train a small image backbone from random weights, on images that no client and no test ever sees.

    Takes some minutes on two cores; afterwards model.name finds it. It is not an off-the-shelf model.

    Example: fedlora pretrain vit --data fashion-mnist
    """
    from fedlora.data.image_reader import PRETRAINED
    from fedlora.models.vision.pretraining import CARD
    from fedlora.models.vision.pretraining import pretrain as carry_out

    line = f"pretraining {kind} on {data}"
    home, facts = carry_out(kind, data, lambda steps: _tracked(steps, line))
    name = next(name for name, made_of in PRETRAINED.items() if made_of == (kind, data))
    out.print(
        marked(
            f'model.name = "{name}"',
            f": {facts.parameters:,} parameters, accuracy {percent(facts.accuracy)} on {facts.held_out} "
            "held-out plain images, not an off-the-shelf model",
        ),
    )
    out.print(f"card: {home / CARD}")


def _tracked(steps: range, line: str) -> Iterable[int]:
    """The steps, with a progress bar on a terminal, else after one plain line; both on stderr."""
    from rich.progress import track

    if err.is_terminal:
        return track(steps, line, console=err)
    print(f"{line}, {len(steps)} steps", file=sys.stderr, flush=True)
    return steps
