"""LoRA-Pro: A and B move together so that their product moves like the projected full gradient.

Wang, Liang, He, Wang, Tan, "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025
(arXiv 2407.18242), Theorems 2.1 to 2.3. With g_A = s B^T G and g_B = s G A^T for the full gradient G,

    ~g_A = H g_A / s^2 + X A,    ~g_B = (I - B H B^T) g_B K / s^2 - B X,    H = (B^T B)^-1,  K = (A A^T)^-1

move the product by  s (B ~g_A + ~g_B A) = P_B G + G P_A - P_B G P_A  (P_B = B H B^T, P_A = A^T K A),
whatever X is: the nearest to G that a change of A and B comes, and the same however B A is split into B Q and
Q^-1 A.

X (``x``) shares the part P_B G P_A out between the two factors:

* ``nearest``, the paper's: ~g_A and ~g_B as near as possible to g_A and g_B, which solves
  B^T B X + X A A^T = - H g_A A^T / s^2. Its share depends on the split (not on an orthogonal Q), so that the
  term of second order in the step size, lr^2 ~g_B ~g_A, does, too.
* ``even``: X = - H g_A A^T K / (2 s^2), half each. Then every step of the product, of any length and with
  momentum and weight decay, is the same for every split.

Where only one factor moves (FFA-LoRA, RoLoRA), the nearest change is H g_A / s^2 or g_B K / s^2 alone; of a
core R (Fed-SB) it is H g_R K / s^2; beside a core, B R takes the place of B, and R A that of A.

Notation of the paper: B, A, s, X as here; g^A, g^B our ~g_A, ~g_B; g^A_lora, g^B_lora our g_A, g_B.

Here and not in the released code: s is the adapter's own, not one written in; inverses are pseudo-inverses,
so that the first step, with B = 0, moves B alone; moments are those of A and B (momentum), not of the
(out, in) gradient, so that memory stays LoRA's. Adam's division by each entry's own size would undo the
invariance. Rates are therefore those of full fine-tuning by SGD; ``beta2`` divides a layer's step by the size
of its product's (`LocalOptimizer`), which leaves the invariance as it is, and makes them those of AdamW.

Noise (DP-SGD), clipping by tensor and penalties make g_A and g_B gradients of no common G; the formulas take
them as they are, and the split of B A then matters as much as it does to the noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from clients.training.optimizers.grams import inverse, nearest, reciprocal, spectrum
from clients.training.optimizers.local import Layer, LocalOptimizer
from fedlora.errors import ConfigError

SHARES = ("nearest", "even")


class LoRAPro(LocalOptimizer):
    """Steps of the product, of LoRA's memory.

    Args:
        groups, lr, momentum, weight_decay, beta2: see `LocalOptimizer`.
        x: how the two factors share their common part, see above.

    Raises:
        ConfigError: another ``x``, or two factors that are trained on both sides of a core.
    """

    stacked: ClassVar[bool] = True

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        x: str = "nearest",
        beta2: float = 0.0,
    ) -> None:
        super().__init__(groups, lr, momentum, weight_decay, beta2)
        if x not in SHARES:
            raise ConfigError(f"train.optimizer-options x = {x!r}: accepted are {', '.join(SHARES)}")
        self.x = x
        for group in self.param_groups:
            layer: Layer | None = group.get("layer")
            if layer is not None and len(layer.trained) > 1 and "R" in layer.factors:
                raise ConfigError(
                    "train.optimizer = 'lora-pro': of a layer with a core it moves one factor, not "
                    f"{', '.join(layer.trained)} at once"
                )

    def direction(self, layer: Layer) -> Mapping[str, Tensor]:
        """``~g_A`` and ``~g_B``; shapes (..., r, in) and (..., out, r)."""
        if len(layer.trained) == 1:
            return {letter: nearest(layer, letter) for letter in layer.trained}
        A, B, g, square = layer.factors["A"], layer.factors["B"], layer.gradients, layer.scaling**2
        beta, U = spectrum(B.mT @ B)  # (..., r), (..., r, r)
        alpha, V = spectrum(A @ A.mT)
        of_a = U @ (inverse(beta) * (U.mT @ g["A"])) / square  # H g_A / s^2
        of_b = ((g["B"] @ V) * inverse(alpha).mT) @ V.mT / square  # g_B K / s^2
        common = U.mT @ (of_a @ A.mT) @ V  # H g_A A^T / s^2, in both bases: (..., r, r)
        weights = beta.unsqueeze(-1) + alpha.unsqueeze(-2) if self.x == "nearest" else 2 * alpha.unsqueeze(-2)
        X = -U @ (common * reciprocal(weights)) @ V.mT
        # B (H B^T g_B K / s^2 + X), so that no (out, out) projector is ever built
        within = U @ (inverse(beta) * (U.mT @ (B.mT @ of_b))) + X
        return {"A": of_a + X @ A, "B": of_b - B @ within}
