"""Clients by nature: which a file names, and which of them are left without examples.

The number of a client is that of its name among all names in the rows of the file that may be trained on. It
stays so where all rows of a client are held out, or where nothing of them is left when they are encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.data.columns import codes_of


def named_clients(known: Sequence[str], names: Sequence[str], kept: Sequence[str | int]) -> dict[str, Any]:
    """Summary of a column from which clients are numbered, as JSON.

    Args:
        known: the names in the file, in order.
        names: those and more (of test examples), by whose positions rows are encoded.
        kept: the names, or their positions, of the rows that are left to train on.

    Returns:
        ``names`` as known, their ``codes``, and which of the names are ``held_out`` entirely.
    """
    rest = {names[value] if isinstance(value, int) else value for value in kept}
    held_out = [name for name in known if name not in rest]
    return {"names": list(known), "codes": codes_of(known, names).tolist(), "held_out": held_out}


def why_left_out(
    parts: Sequence[np.ndarray], clients: dict[str, Any], held: Collection[int], config: DataConfig
) -> dict[int, str]:
    """Partition -> why it has no examples, of those that have none.

    Args:
        parts: the examples of each partition.
        clients: of the column whose values are the clients, from `named_clients`.
        held: the codes of that column that examples have.
        config: how they were dealt.
    """
    empty = [number for number, part in enumerate(parts) if not len(part)]
    if not empty:
        return {}
    lost = [name for name, code in zip(clients["names"], clients["codes"], strict=True) if code not in held]
    # Each client of a name that has examples has some, so the empty ones are the lost names, in order.
    return {number: _why(name, clients["held_out"], config) for number, name in zip(empty, lost, strict=True)}


def _why(name: str, held_out: Sequence[str], config: DataConfig) -> str:
    if name in held_out:
        return f"all examples of {name!r} are held out for evaluation"
    return f"no example of {name!r} has anything to learn within data.max-length = {config.max_length}"
