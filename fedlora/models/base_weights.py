"""The base weights as they move: ``W_v = W_{v-1} + P_v`` in float32, the same bits for everybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedlora.core.base_patches import Patch
from fedlora.core.factors import Product, Tensors
from fedlora.core.parallel import one_thread
from fedlora.errors import FactorShapeError, RunFailed
from fedlora.models.layers import LinearLayer, layer_spec, oriented
from fedlora.models.shared_memory import hashes


class PatchedBase:
    """The weights of the adapted layers, and which patches are in them.

    No weight is ever written in place: the pristine tensors may be shared between processes.
    A weight in another type than float32 is kept as a float32 master beside it.
    """

    def __init__(self, layers: Mapping[str, LinearLayer]) -> None:
        self._layers = dict(layers)
        self._pristine: dict[str, Tensor] = {name: layer.weight.data for name, layer in layers.items()}
        self._exact: dict[str, Tensor] = {}
        self._applied: list[str] = []

    @property
    def version(self) -> int:
        """Number of patches in the weights."""
        return len(self._applied)

    def pristine(self, name: str) -> Tensor:
        """The weight W_0 of a layer, (out, in), float32 on the CPU."""
        self._check_whole(name)
        return oriented(self._layers[name], self._pristine[name]).float().cpu()

    def move(self, patches: Sequence[Patch], since: int = 0) -> None:
        """Apply ``P_{since+1}, P_{since+2}, ...`` in order; those already in the weights are skipped.

        The bits do not depend on how many patches come in one call, nor on the number of threads.

        Raises:
            RunFailed: patches before ``since`` are missing here, or an applied patch was another one.
            FactorShapeError: a patch for an unknown layer or of another shape.
        """
        if since > self.version:
            raise RunFailed(f"base version {since} is needed to go on, this base has version {self.version}")
        for number, patch in enumerate(patches, start=since + 1):
            digest = patch.digest()
            if number > self.version:
                self._check(patch)
                with one_thread(), torch.no_grad():
                    for name in sorted(patch.products):
                        self._add(name, patch.products[name])
                self._applied.append(digest)
            elif self._applied[number - 1] != digest:
                raise RunFailed(
                    f"base patch {number} is {digest[:12]}, but {self._applied[number - 1][:12]} is already "
                    "in the weights: reset the base first"
                )

    def check_whole(self) -> None:
        """Refuse weights that take no patch, before there is one.

        Raises:
            RunFailed: a layer that is held in 4 or 8 bits.
        """
        for name in self._layers:
            self._check_whole(name)

    def move_to(self, patches: Sequence[Patch]) -> None:
        """Bring the weights to ``W_0 + P_1 + .. + P_v``, from W_0 where other patches are in them."""
        if [patch.digest() for patch in patches[: self.version]] != self._applied:
            self.reset()
        self.move(patches)

    @property
    def moved_weights(self) -> dict[str, Tensor]:
        """W_v of the layers that a patch has changed, float32, as it is stored."""
        return dict(self._exact)

    def adopt(self, chain: Sequence[str], weights: Mapping[str, Tensor]) -> None:
        """Take over the `moved_weights` of another process; they may be shared and are only read.

        Args:
            chain: digests of the patches that are in the weights.
            weights: W_v of every layer that they changed, float32.
        """
        self.reset()
        for name in sorted(weights):
            self._set(name, weights[name].to(self._pristine[name].device))
        self._applied = list(chain)

    @property
    def pristine_weights(self) -> dict[str, Tensor]:
        """W_0 of every layer, as it is stored."""
        return dict(self._pristine)

    def moved_digests(self) -> dict[str, str]:
        """A hash of W_v of the layers that moved, as it stands."""
        return hashes({f"{name}.weight": weight for name, weight in self._exact.items()})

    def reset(self) -> None:
        """Back to the pristine weights, version 0."""
        for name, weight in self._pristine.items():
            self._layers[name].weight.data = weight
        self._exact.clear()
        self._applied.clear()

    @contextmanager
    def pristine_again(self) -> Iterator[None]:
        """Inside, the layers have the weights W_0; afterwards what they had."""
        try:
            for name in self._exact:
                self._layers[name].weight.data = self._pristine[name]
            yield
        finally:
            for name, weight in self._exact.items():
                self._set(name, weight)

    @contextmanager
    def gradients(self) -> Iterator[Callable[[Tensor], Tensors]]:
        """Inside, these weights take part in backward passes.

        Yields:
            Loss -> module -> its gradient (out, in), float32 on the CPU.
        """
        layers = self._layers

        def gradients(loss: Tensor) -> Tensors:
            found = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
            named = zip(layers.items(), found, strict=True)
            return {name: oriented(layer, g).to("cpu", torch.float32) for (name, layer), g in named}

        try:
            for layer in layers.values():
                layer.weight.requires_grad_(True)
            yield gradients
        finally:
            for layer in layers.values():
                layer.weight.requires_grad_(False)

    @contextmanager
    def watched_inputs(self, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Inside, ``see`` is told the name and the input of each adapted layer that a pass comes to."""

        def hook(name: str) -> Callable[..., None]:
            return lambda _, given: see(name, given[0])

        handles = [layer.register_forward_pre_hook(hook(n)) for n, layer in self._layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, product: Product) -> None:
        layer = self._layers[name]
        before = self._exact.get(name, self._pristine[name].float())
        change = oriented(layer, product.dense().float().cpu())
        self._set(name, before + change.to(before.device))

    def _set(self, name: str, weight: Tensor) -> None:
        layer = self._layers[name]
        self._exact[name] = weight
        layer.weight.data = weight.to(layer.weight.dtype)

    def _check(self, patch: Patch) -> None:
        for name, product in patch.products.items():
            if name not in self._layers:
                raise FactorShapeError(f"a base patch names {name}, which is not an adapted layer")
            self._check_whole(name)
            spec = layer_spec(self._layers[name])
            shape = (product.left.shape[0], product.right.shape[1])
            if shape != (spec.out_features, spec.in_features):
                raise FactorShapeError(
                    f"a base patch for {name} is {shape}, expected {(spec.out_features, spec.in_features)}"
                )

    def _check_whole(self, name: str) -> None:
        if not self._pristine[name].is_floating_point():
            raise RunFailed(f"{name} is held in 4 bits: its weight can neither be read nor take a patch")
