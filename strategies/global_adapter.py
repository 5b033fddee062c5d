"""The global model as one adapter over the pristine base, for whoever applies no base patches.

    s B A  =  P_1 + .. + P_v + s B_v A_v        (each layer; s stays the adapter's scaling)

Patches and adapter are stacked, and where their ranks sum to more than the layer has rows or columns the
matrix is multiplied out, ``I M`` or ``M I``. No decomposition: the cost is one product for each layer, so
that it can be had every round. `fedlora.models.export.global_adapters` takes the SVD, for files.
"""

from __future__ import annotations

from fedlora.core.adapters import lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, Product, bounded
from fedlora.core.state import State


def stacked_adapters(state: State) -> AdapterSet:
    """Adapters that make the global model from the pristine base, ranks differing by layer if need be.

    A layer whose base never moved keeps its own factors bit for bit (a core is folded into A). The others
    have a rank of min(out, in) at most, and their scaling is still that of the state's adapter.
    """
    moved = state.moved
    return {n: _whole(state, n) if n in moved else f.folded() for n, f in lora_set(state.adapters).items()}


def _whole(state: State, name: str) -> LoraFactors:
    scaling, stacked = state.adapters[name].scaling, state.product(name)
    exact = bounded(Product(stacked.left.double(), stacked.right.double()))
    dtype = stacked.left.dtype
    return LoraFactors(A=(exact.right / scaling).to(dtype), B=exact.left.to(dtype), scaling=scaling)
