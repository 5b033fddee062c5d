"""What a round did to the model, measured alike for every rule, without forming any (out, in) matrix.

With dW_k client k's change from the *global* effective weight before the round,

    gap = || W_after - (W_before + sum_k p_k dW_k) || / || sum_k p_k dW_k ||

over all layers together (Frobenius). W_before = W_0 + patches + s B A, so the gap is
``|| P + s B' A' - T || / || T - s B A ||`` with T = sum_k p_k s_k B_k A_k and P the new patch.

A T that differs from s B A by rounding only asks for nothing; the quotient of two rounding errors
would be of order 1 for any rule, so the gap is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fedlora.factors import add, as_product, norm, scale, stack
from fedlora.updates import ClientUpdate, State

RESOLUTION = 1e-6
"""A change below this share of T itself is float32 rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """What one round's aggregation did.

    Attributes:
        gap: relative aggregation error, 0 for exact rules up to rounding (about 1e-7 in float32).
        update_norm: Frobenius norm of the change that the clients' mean asked for.
    """

    gap: float
    update_norm: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def diagnose(
    before: State, after: State, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> Diagnostics:
    """The diagnostics of the round that led from ``before`` to ``after``."""
    patch = after.base[-1].products if len(after.base) > len(before.base) else {}
    missed = asked = size = 0.0
    for name, start in before.adapters.items():
        target = stack(
            (weight, update.adapters[name]) for weight, update in zip(weights, updates, strict=True)
        )
        reached = [as_product(after.adapters[name])]
        if name in patch:
            reached.append(patch[name])
        missed += norm(add(*reached, scale(-1.0, target))) ** 2
        asked += norm(add(target, scale(-1.0, as_product(start)))) ** 2
        size += norm(target) ** 2
    gap = math.sqrt(missed / asked) if asked > RESOLUTION**2 * size else 0.0
    return Diagnostics(gap=gap, update_norm=math.sqrt(asked))
