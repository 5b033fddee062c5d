"""The ``[devices]`` table: what clients run on in simulated time, and how long a round waits for them."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from fedlora.config.checks import parse_json, require
from fedlora.config.section import by_field, kebab, section

FromZeroBelowOne = Annotated[float, Field(ge=0, lt=1)]
Portion = Annotated[float, Field(gt=0, le=1e9)]
Spread = Annotated[float, Field(ge=0, le=10)]


@section("devices.profiles ")
class DeviceProfile:
    """One kind of device; what is not said does not limit it."""

    share: Portion = 1.0
    """How many of the clients are of this kind, relative to the other kinds."""
    tokens_per_second: PositiveFloat | None = None
    """Tokens that it trains on in a second."""
    download_mbps: PositiveFloat | None = None
    """Megabits a second from the server."""
    upload_mbps: PositiveFloat | None = None
    """Megabits a second to the server."""
    memory_gb: PositiveFloat | None = None
    """Memory in units of 10^9 bytes."""
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability that it is there when a round begins."""
    failure: FromZeroBelowOne = 0.0
    """Probability that it vanishes before its reply has arrived."""
    spread: Spread = 0.0
    """Standard deviation of the logarithm of its speeds: devices of a kind differ by exp(spread N(0, 1))."""


_PHONE = {"tokens_per_second": 1000.0, "download_mbps": 20.0, "upload_mbps": 5.0}
NAMED_PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "equal": {"device": _PHONE},
    "heavy-tailed": {"device": {**_PHONE, "spread": 1.0}},
    "phones-and-workstations": {
        "phone": {
            **_PHONE, "share": 4.0, "spread": 0.5, "memory_gb": 4.0, "availability": 0.5, "failure": 0.05,
        },
        "workstation": {
            "tokens_per_second": 20000.0, "download_mbps": 200.0, "upload_mbps": 50.0, "memory_gb": 32.0,
        },
    },
}  # fmt: skip
"""Populations by name. The numbers are round ones for trying things out, nobody has measured them."""


@section("devices.")
class DevicesConfig:
    """Simulated time: devices, networks and absences. Off where neither profiles nor a trace are given.

    Rounds of a buffer are there for real nodes, too.
    """

    profiles: str = ""
    """``equal``, ``heavy-tailed``, ``phones-and-workstations``, or a JSON object of your own, for instance
    ``{"phone": {"tokens-per-second": 800, "upload-mbps": 5, "spread": 0.5}}``."""
    trace: str = ""
    """A csv, jsonl or parquet file with a row for each partition: ``partition`` and any of a profile's keys,
    for instance ``phones.csv``."""
    deadline: NonNegativeFloat = 0.0
    """Simulated seconds after which a round goes on without who is late; 0 means ``round-timeout``."""
    over_selection: Annotated[float, Field(ge=1)] = 1.0
    """So many times the clients of ``fraction-train`` are asked, and the first that answer are taken, as many
    as ``fraction-train`` says."""

    buffer_size: NonNegativeInt = 0
    """Rounds that do not wait (FedBuff), in simulated time or over real nodes: the server aggregates whenever
    so many updates have come; 0 means that rounds wait."""
    in_flight: NonNegativeInt = 0
    """Clients at work at a time where rounds do not wait; 0 means ``fraction-train`` of all, at least the
    buffer's size."""
    tiers: NonNegativeInt = 0
    """Clients in so many tiers by their speed, each with rounds of its own, out of which it merges (FedAT);
    0 means none."""
    max_staleness: NonNegativeInt = 0
    """An update is dropped if more aggregations than this came after it started; 0 drops none."""
    staleness: Literal["sqrt", "constant"] = "sqrt"
    """Weight of a late update: 1 / ``sqrt`` (1 + staleness), or ``constant`` 1."""

    def __post_init__(self) -> None:
        require(
            not (self.profiles and self.trace), "devices.trace", self.trace, "devices.profiles is set, too"
        )
        usual = DevicesConfig.__dataclass_fields__
        for key in ("deadline", "over_selection", "tiers"):
            why = "means nothing without devices.profiles or devices.trace"
            value = getattr(self, key)
            require(self.timed or value == usual[key].default, _key(key), value, why)
        require(
            bool(self.buffer_size) or not self.in_flight,
            "devices.in-flight", self.in_flight, "means nothing without devices.buffer-size",
        )  # fmt: skip
        for key in ("max_staleness", "staleness"):
            why, value = "means nothing without devices.buffer-size or devices.tiers", getattr(self, key)
            require(not self.waits or value == usual[key].default, _key(key), value, why)
        require(
            not (self.buffer_size and self.tiers),
            "devices.tiers",
            self.tiers,
            "devices.buffer-size is set, too",
        )
        require(
            self.waits or self.over_selection == 1,
            "devices.over-selection", self.over_selection,
            f"rounds of devices.{'tiers' if self.tiers else 'buffer-size'} ask for no more than they take",
        )  # fmt: skip
        _ = self.kinds

    @property
    def timed(self) -> bool:
        """Whether time is simulated."""
        return bool(self.profiles or self.trace)

    @property
    def waits(self) -> bool:
        """Whether a round waits for the clients that it asks."""
        return not (self.buffer_size or self.tiers)

    @cached_property
    def kinds(self) -> dict[str, DeviceProfile]:
        """The profiles by name; empty where there are none."""
        given = NAMED_PROFILES.get(self.profiles)
        if given is None:
            names = ", ".join(NAMED_PROFILES)
            own = self.profiles.strip().startswith("{") or not self.profiles
            require(own, "devices.profiles", self.profiles, f"accepted are {names}, or a JSON object")
            given = parse_json("devices.profiles", self.profiles, dict)
            require(bool(given) or not self.profiles, "devices.profiles", self.profiles, "names no kind")
            for name, entry in given.items():
                require(isinstance(entry, dict), f"devices.profiles {name}", entry, "must be an object")
        return {name: DeviceProfile(**by_field(entry)) for name, entry in given.items()}


def _key(field: str) -> str:
    return f"devices.{kebab(field)}"
