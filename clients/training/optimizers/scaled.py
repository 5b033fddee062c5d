"""ScaledGD: each factor's gradient is divided by the Gram matrix of the other.

Tong, Ma, Chi, "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent", JMLR 22,
2021 (arXiv 2005.08898), and for LoRA Zhang, Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning
Foundation Models", ICML 2024 (arXiv 2402.02347):

    A <- A - lr (B^T B + d I)^-1 g_A / s^2,    B <- B - lr g_B (A A^T + d I)^-1 / s^2

Without damping the step of the product does not depend on how B A is split, as LoRA-Pro's, but the two
factors' steps overlap: it is P_B G + G P_A, not the projection P_B G + G P_A - P_B G P_A (`lora_pro`).

Here and not in the papers: 1/s^2, so that a rate is that of the whole weight, whatever alpha and r are; d is
``damping`` times the Gram matrix' own largest eigenvalue, so that it means the same at every size of the
factors; and of a factor that is zero (B before the first step) the inverse is zero, where the papers' 1/d
would multiply the noise of a private step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from clients.training.optimizers.grams import nearest
from clients.training.optimizers.local import Layer, LocalOptimizer
from fedlora.errors import ConfigError


class ScaledGD(LocalOptimizer):
    """Preconditioned gradient steps.

    Args:
        groups, lr, momentum, weight_decay, beta2: see `LocalOptimizer`.
        damping: >= 0, a share of each Gram matrix' largest eigenvalue.

    Raises:
        ConfigError: another ``damping``.
    """

    stacked: ClassVar[bool] = True

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        beta2: float = 0.0,
    ) -> None:
        super().__init__(groups, lr, momentum, weight_decay, beta2)
        if damping < 0:
            raise ConfigError(f"train.optimizer-options damping = {damping}: must be >= 0")
        self.damping = damping

    def direction(self, layer: Layer) -> Mapping[str, Tensor]:
        """``H g_A / s^2`` and ``g_B K / s^2``; shapes (..., r, in) and (..., out, r)."""
        return {letter: nearest(layer, letter, self.damping) for letter in layer.trained}
