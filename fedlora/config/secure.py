"""The ``[secure]`` table: whether the server sees updates, or their sums alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from fedlora.config.checks import require
from fedlora.config.section import section


@section("secure.")
class SecureConfig:
    """Secure aggregation, see ``docs/secure.md``."""

    mode: Literal["none", "sums"] = "none"
    """``none``, or ``sums``: the server learns the weighted sum of a round's updates and no single one, for
    the strategies whose aggregate is made of sums."""
    min_clients: Annotated[int, Field(ge=2)] = 3
    """The fewest clients that a sum may be of; a round with fewer fails. A node's owner may ask for more
    (``secure-clients``)."""
    threshold: Annotated[float, Field(gt=0.5, le=1)] = 0.66
    """Share of the clients that hold a client's secrets which is needed to put them together: so many must
    stay to the end of a round, and as many would have to collude with the server to see one update."""
    bits: int = 32
    """Sums are modulo 2^32, or 2^16, 2^24 or 2^64: as many bits travel for a number, and steps are coarser or
    finer, see ``docs/secure.md``."""
    largest_change: PositiveFloat = 1.0
    """Numbers that changed by more in a round are cut to it; how many clients cut some is told in the log."""
    max_weight: NonNegativeInt = 0
    """The most examples that a client may count for, for instance ``1000``; 0: the most that the server knows
    a partition to have."""
    sketch_size: NonNegativeInt = 0
    """Under rules of mean products, ``flexlora`` for one: columns and rows of the sketches of products that
    clients add up, for instance ``32``; 0: the sum of all clients' ranks, which loses nothing. With fewer
    the mean product loses what ``sketch_lost`` says, see ``docs/secure.md``."""

    noise: Literal["none", "distributed"] = "none"
    """``distributed``: with ``privacy.mode = "client"`` each client clips its own update and adds its share
    of the noise, so that the server need not be trusted with it; ``none``: clients add none to sums."""
    colluding: NonNegativeInt = 1
    """Clients that may tell the server what they know, or add no noise: that of ``min-clients`` less these
    alone is counted on against the server."""

    def __post_init__(self) -> None:
        require(self.bits in (16, 24, 32, 64), "secure.bits", self.bits, "accepted are 16, 24, 32, 64")
        require(
            self.noise == "none" or self.mode == "sums", "secure.noise", self.noise,
            f"clients' shares of noise add up in sums alone, secure.mode is {self.mode!r}, must be 'sums'",
        )  # fmt: skip
        require(
            self.sketch_size == 0 or self.mode == "sums", "secure.sketch-size", self.sketch_size,
            f"products are sketched for sums alone, secure.mode is {self.mode!r}, must be 'sums'",
        )  # fmt: skip
        require(
            self.mode == "none" or self.colluding < self.min_clients, "secure.colluding", self.colluding,
            f"must be below secure.min-clients, which is {self.min_clients}, or no other noise is left",
        )  # fmt: skip

    @property
    def honest(self) -> int:
        """Clients of a sum whose noise is counted on against the server, T."""
        return self.min_clients - self.colluding
