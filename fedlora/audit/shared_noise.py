"""Noise that clients share, as whoever knows the noise of all but T of them sees it: see `SharedSums`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedlora.config import RunConfig
from fedlora.core.seeding import stream
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.secure import noise
from strategies.client_dp import ClientDP, changes, moved


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSums(ClientDP):
    """`ClientDP` whose clients clip their own changes and write them as integers with a share of noise.

    Masks cancel in a sum and are left out. T clients, the last of them by partition, add their noise by the
    code of secure sums; that of all others, who collude, is known and taken off.

    Attributes:
        honest: T, whose noise counts.
        bits: of the modulus.
    """

    honest: int
    bits: int

    def privatise(
        self, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast], planned: int, server_round: int
    ) -> list[ClientUpdate]:
        """See `ClientDP.privatise`; a client that is counted on and not there adds noise to zero."""
        ordered = sorted(updates, key=lambda update: update.partition_id)
        start = sent[ordered[0].partition_id]
        named = [changes(update, sent[update.partition_id]) for update in ordered]
        rows = [torch.cat([t.reshape(-1) for t in own.values()]).numpy() for own in named]
        rows = [*(np.zeros_like(rows[0]) for _ in range(self.honest - len(rows))), *rows]
        shared = noise.SharedNoise(
            clipping_norm=self.clipping_norm, noise_multiplier=self.noise_multiplier, honest=self.honest,
            clients=len(rows), bits=self.bits,
        )  # fmt: skip
        shares = (
            shared.encode(
                row, noise.seeded_words(stream(self.seed or 0, "secure-noise", server_round, number))
            )
            for number, row in enumerate(rows[-self.honest :])
        )
        total = next(shares)
        for share in shares:
            total = total + share  # modulo 2^bits
        known = sum(
            (noise.clipped(row, self.clipping_norm) for row in rows[: -self.honest]), np.zeros_like(rows[0])
        )
        mean = torch.from_numpy((shared.decode(total) + known) / planned)
        sizes = [tensor.numel() for tensor in named[0].values()]
        parts = zip(named[0].items(), torch.split(mean, sizes), strict=True)
        adapters, head = moved(start, {name: part.reshape(t.shape) for (name, t), part in parts})
        return [replace(ordered[0], adapters=adapters, head=head, weight=1.0)]


def shared_sums(config: RunConfig, central: ClientDP) -> SharedSums:
    """The mechanism of a run whose clients share noise, beside the central one of the same noise."""
    return SharedSums(
        clipping_norm=central.clipping_norm, noise_multiplier=central.noise_multiplier, seed=central.seed,
        honest=config.secure.honest, bits=config.secure.bits,
    )  # fmt: skip
