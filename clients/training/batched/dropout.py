"""LoRA dropout as the one-by-one trainer draws it: per client, in the shape of the client's own batch.

There a client's layers draw in the order of their execution, each for its whole batch. A pass here holds rows
of many clients, perhaps only some of each; so the first pass of a step that comes to the n-th adapted layer
draws for the whole batches of all clients, and the later passes take their rows of the same masks.

On a processor the numbers are those of ``torch.nn.functional.dropout``. On an accelerator torch draws them by
a kernel of its own, so that there they are others (of the same law).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.training.batched.rows import Rows


class Masks:
    """The masks of one step of a cohort.

    Args:
        p: probability with which an input is dropped, > 0.
        generators: each client's stream.
        rows: the rows of the step.
        padded: shorter examples are filled up; images are not, and their layers see no length of theirs.
    """

    def __init__(
        self, p: float, generators: Sequence[torch.Generator], rows: Rows, *, padded: bool = True
    ) -> None:
        self._padded = padded
        self._keep = 1.0 - p
        self._generators = generators
        self._rows = rows
        self._clients = sorted(set(rows.clients.tolist()))
        self._drawn: list[dict[int, Tensor]] = []
        self._call = 0
        self._current = rows

    def begin(self, rows: Rows) -> None:
        """The next calls are those of a pass over these rows."""
        self._call, self._current = 0, rows

    def __call__(self, x: Tensor) -> Tensor:
        """The input of the next adapted layer, some of it dropped."""
        if self._call == len(self._drawn):
            self._drawn.append({client: self._draw(client, x) for client in self._clients})
        masks = self._drawn[self._call]
        self._call += 1
        kept = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        for row, (client, place) in enumerate(zip(self._current.clients, self._current.places, strict=True)):
            mask = masks[int(client)][int(place)]
            if x.ndim == 2:
                kept[row] = mask
            else:
                tokens = min(len(mask), x.shape[1])  # what lies beyond is padding
                kept[row, :tokens] = mask[:tokens]
        return x * kept.to(x.dtype).div_(self._keep)

    def _draw(self, client: int, x: Tensor) -> Tensor:
        """(batch, longest, in), or (batch, in) where the layer sees one vector for each example."""
        lengths = self._rows.lengths[self._rows.clients == client]
        longest = int(lengths.max()) if self._padded else x.shape[1]
        tokens = () if x.ndim == 2 else (longest,)
        in_memory = sorted(range(x.ndim), key=x.stride, reverse=True)  # torch fills a transposed input so
        noise = torch.empty_permuted(
            (len(lengths), *tokens, x.shape[-1]), in_memory, dtype=x.dtype, device=x.device
        )
        return noise.bernoulli_(self._keep, generator=self._generators[client]).bool()
