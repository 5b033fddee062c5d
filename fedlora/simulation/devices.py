"""Devices of a simulated population: who computes, receives and sends how fast, and who is there when.

Every draw is addressed by the seed and the round, and is at its partition's place in the stream, so that none
depends on who else is asked, nor on how many there are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.config import DeviceProfile, RunConfig
from fedlora.config.section import kebab
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError

Partitions = NDArray[np.int64]
"""Ids of partitions, sorted."""
MEGABIT = 1e6 / 8


@dataclass(frozen=True, slots=True)
class ClientTask:
    """One client's work in one round, in simulated seconds.

    Attributes:
        partition_id: whose it is.
        down, train, up: seconds of the download, the training and the upload, one after the other.
        vanishes: after how many of these seconds it vanishes for good; None: it does not.
    """

    partition_id: int
    down: float
    train: float
    up: float
    vanishes: float | None = None

    @property
    def seconds(self) -> float:
        """From the order to the reply."""
        return self.down + self.train + self.up

    @property
    def begins(self) -> bool:
        """Whether it begins to train before it vanishes."""
        return self.vanishes is None or self.vanishes > self.down

    @property
    def trains(self) -> bool:
        """Whether it has trained before it vanishes."""
        return self.vanishes is None or self.vanishes >= self.down + self.train


@dataclass(frozen=True, slots=True, eq=False)
class Devices:
    """Devices of all partitions; a partition without a row of its own is never asked for.

    Attributes:
        kinds: what devices there are.
        place: (partitions,), the kind of each partition.
        speeds: (partitions, 2), factors on its kind's speed and on its kind's rates.
    """

    kinds: Sequence[DeviceProfile]
    place: NDArray[np.int64]
    speeds: NDArray[np.float64]

    @classmethod
    def listed(cls, kinds: Sequence[DeviceProfile]) -> Devices:
        """A device of its own for each partition, in their order."""
        return cls(kinds, np.arange(len(kinds)), np.ones((len(kinds), 2)))

    def __call__(self, partition_id: int) -> DeviceProfile:
        """The device of a partition; its ``share`` and ``spread`` are used up."""
        kind: DeviceProfile = self.kinds[int(self.place[partition_id])]
        faster, nearer = self.speeds[partition_id].tolist()
        return replace(
            kind,
            share=1.0,
            spread=0.0,
            tokens_per_second=_times(kind.tokens_per_second, faster),
            download_mbps=_times(kind.download_mbps, nearer),
            upload_mbps=_times(kind.upload_mbps, nearer),
        )

    def present(self, partitions: Partitions, server_round: int, attempt: int, seed: int) -> Partitions:
        """Those of the partitions that are there when a round begins, or is tried to begin once more."""
        likely = np.array([kind.availability for kind in self.kinds])
        if (likely == 1).all():
            return partitions
        draws = stream(seed, "availability", server_round, attempt).random(len(self.place))
        there: NDArray[np.bool_] = draws < likely[self.place]
        return partitions[there[partitions]]


def devices_of(config: RunConfig, partitions: Collection[int]) -> Devices:
    """The device of each partition: of the trace, of its group's profile, or drawn by the profiles' shares.

    Raises:
        ConfigError: a trace that cannot be read, or lacks a partition.
    """
    if config.devices.trace:
        traced = _traced(Path(config.devices.trace), partitions)
        return Devices.listed([traced.get(p, DeviceProfile()) for p in range(max(partitions) + 1)])
    names, kinds = list(config.devices.kinds), list(config.devices.kinds.values())
    count, bounds = max(partitions) + 1, np.cumsum([kind.share for kind in kinds])
    drawn = stream(config.seed, "devices").random(count) * bounds[-1]
    place = np.searchsorted(bounds, drawn, side="right")
    if config.groups:
        for partition in partitions:
            group = config.group_of(partition)
            if group is not None and group.device is not None:
                place[partition] = names.index(group.device)
    spread = np.array([kind.spread for kind in kinds])[place]
    normal = stream(config.seed, "speeds").standard_normal((count, 2))
    return Devices(kinds, place, np.exp(spread[:, None] * normal))


def task_of(
    device: DeviceProfile, partition_id: int, server_round: int, seed: int,
    *, tokens: float, bytes_down: int, bytes_up: int,
) -> ClientTask:  # fmt: skip
    """The work of a partition in a round: bytes over rates, tokens over speed, and whether it vanishes."""
    down = _over(bytes_down, device.download_mbps, MEGABIT)
    train = _over(tokens, device.tokens_per_second)
    up = _over(bytes_up, device.upload_mbps, MEGABIT)
    draws = stream(seed, "vanishing", server_round, partition_id)
    vanishes = draws.random() < device.failure
    return ClientTask(
        partition_id, down, train, up, draws.random() * (down + train + up) if vanishes else None
    )


def tiers_of(seconds: Mapping[int, float], partitions: int, count: int) -> NDArray[np.int64]:
    """Tier of each partition, 0 the fastest, by what its work takes; sizes differ by one at most.

    Args:
        seconds: of each partition that takes part; the others are in tier -1.
        partitions: how many there are.
        count: of the tiers.

    >>> tiers_of({0: 9.0, 1: 1.0, 3: 5.0}, 4, 2).tolist()
    [1, 0, -1, 0]
    """
    found = np.full(partitions, -1)
    for tier, members in enumerate(np.array_split(sorted(seconds, key=lambda p: (seconds[p], p)), count)):
        found[members.astype(np.int64)] = tier
    return found


def _times(rate: float | None, factor: float) -> float | None:
    return None if rate is None else rate * factor


def _over(amount: float, rate: float | None, unit: float = 1.0) -> float:
    return 0.0 if rate is None else amount / (rate * unit)


def _traced(path: Path, partitions: Collection[int]) -> Mapping[int, DeviceProfile]:
    """The rows of a trace by partition; each value as if it stood in a profile."""
    from fedlora.data.sources import read_file  # with datasets and pandas, where data is prepared already

    where = f"devices.trace = {str(path)!r}"
    found: dict[int, DeviceProfile] = {}
    try:
        rows = list(read_file(path, "devices.trace"))
    except ValueError as error:  # a number that no column holds
        raise ConfigError(f"{where}: cannot be read ({error})") from None
    for number, row in enumerate(rows, start=1):
        try:
            values = {key.strip().replace("-", "_"): _number(key, value) for key, value in row.items()}
            if len(values) < len(row):
                raise ConfigError(f"columns {', '.join(row)}: two of them are the same")
            partition = values.pop("partition", None)
            if partition is None or not partition.is_integer() or partition < 0:
                raise ConfigError(f"partition = {row.get('partition')!r}: must be a partition's number")
            taken = {k: v for k, v in values.items() if v is not None}
            if wrong := sorted(
                taken.keys() - asdict(DeviceProfile()).keys() | taken.keys() & {"share", "spread"}
            ):
                accepted = ", ".join(
                    kebab(k) for k in asdict(DeviceProfile()) if k not in ("share", "spread")
                )
                raise ConfigError(f"column {wrong[0]!r}: accepted are partition, {accepted}")
            if int(partition) in found:
                raise ConfigError(f"partition {int(partition)} has two rows")
            found[int(partition)] = DeviceProfile(**taken)
        except ConfigError as error:
            raise ConfigError(f"{where}, row {number}: {error}") from None
    if missing := sorted(set(partitions) - found.keys()):
        raise ConfigError(f"{where}: there is no row for partition {missing[0]} ({len(missing)} are missing)")
    return found


def _number(key: str, value: Any) -> float | None:
    """A cell as a number; None for an empty one."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{key} = {str(value)[:40]!r}: must be a number") from None
