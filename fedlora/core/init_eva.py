"""EVA: A starts as the directions in which the inputs of its layer vary most.

Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024
(arXiv 2410.07170). With the layer's inputs on some examples as rows of X, a row for each token:

    X - mean = U S V^T,    A_0 = V_r^T,    B_0 = 0

so that the base stays. As in PEFT the inputs are centred. PEFT takes V by an incremental, approximate SVD
until it has settled; here it comes out of the covariance of all inputs, (in, in) in float64, once. Ranks are
not redistributed over the layers (PEFT's ``rho = 1``): all layers of an adapter have one rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.core.parallel import parallel_map
from fedlora.core.state import ModuleSpec, Template
from fedlora.errors import ConfigError


class InputMoments:
    """Number, sum and sum of squares of the inputs of each layer, float64 on the CPU."""

    def __init__(self, modules: Mapping[str, ModuleSpec]) -> None:
        widths = {name: spec.in_features for name, spec in modules.items()}
        self.count = dict.fromkeys(widths, 0)
        self._sum = {name: torch.zeros(n, dtype=torch.float64) for name, n in widths.items()}
        self._square = {name: torch.zeros(n, n, dtype=torch.float64) for name, n in widths.items()}

    def add(self, name: str, rows: Tensor) -> None:
        """Inputs (rows, in) of a layer."""
        x = rows.detach().to("cpu", torch.float64)
        self.count[name] += len(x)
        self._sum[name] += x.sum(dim=0)
        self._square[name] += x.T @ x

    def directions(self, name: str, rank: int) -> Tensor:
        """The ``rank`` directions of most variance, orthonormal rows (rank, in), float32.

        The largest entry of each is positive, so that the sign does not depend on the solver.
        """
        mean = self._sum[name] / self.count[name]
        covariance = self._square[name] / self.count[name] - torch.outer(mean, mean)
        rows = torch.linalg.eigh(covariance).eigenvectors.flip(1).T[:rank]
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        A: Tensor = (rows * largest.sign()).float()
        return A.contiguous()


def most_varied(template: Template, moments: InputMoments) -> AdapterSet:
    """An adapter of the template's rank with EVA's A and B = 0.

    Raises:
        ConfigError: a layer that has seen fewer inputs than its directions need.
    """
    for name, count in moments.count.items():
        if count <= template.rank:
            raise ConfigError(
                f"strategy.init-examples: too few, {name} was given {count} inputs by the public examples; "
                f"{template.rank} directions need more"
            )

    def of(name: str) -> LoraFactors:
        A = moments.directions(name, template.rank)
        return LoraFactors(
            A, torch.zeros(template.modules[name].out_features, template.rank), template.scaling
        )

    return dict(zip(template.modules, parallel_map(of, template.modules), strict=True))
