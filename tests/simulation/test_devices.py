"""Devices: how long a task takes on one, and who runs on which."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import DeviceProfile, from_flat
from fedlora.errors import ConfigError
from fedlora.simulation.devices import devices_of, task_of


def test_the_time_of_a_task_is_bytes_over_rates_and_tokens_over_speed() -> None:
    device = DeviceProfile(tokens_per_second=50, download_mbps=8, upload_mbps=2)
    task = task_of(device, 3, 1, 0, tokens=600, bytes_down=3_000_000, bytes_up=500_000)
    assert (task.down, task.train, task.up, task.vanishes) == (3.0, 12.0, 2.0, None)
    assert task_of(DeviceProfile(), 3, 1, 0, tokens=600, bytes_down=9, bytes_up=9).seconds == 0


def test_devices_are_drawn_by_their_shares_and_spread_by_the_seed_alone() -> None:
    kinds = {"slow": {"tokens-per-second": 10, "spread": 0.7}, "fast": {"tokens-per-second": 1e6, "share": 3}}
    config = from_flat({"devices.profiles": json.dumps(kinds), "seed": 5})
    devices = devices_of(config, range(4000))
    speed = [devices(p).tokens_per_second or 0.0 for p in range(4000)]
    slow = [math.log(s / 10) for s in speed if s < 1e5]
    assert abs(len(slow) - 1000) < 5 * math.sqrt(4000 * 0.25 * 0.75)
    mean = sum(slow) / len(slow)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in slow) / len(slow))
    assert abs(mean) < 5 * 0.7 / math.sqrt(len(slow))
    assert abs(deviation - 0.7) < 5 * 0.7 / math.sqrt(2 * len(slow))
    again = devices_of(config, range(7))
    assert [again(p).tokens_per_second for p in (6, 0, 3)] == [speed[6], speed[0], speed[3]]


def test_a_client_group_has_the_device_that_it_names() -> None:
    kinds = {"slow": {"tokens-per-second": 10}, "fast": {"tokens-per-second": 99, "share": 1e-9}}
    groups = [{"partitions": "2-3", "device": "fast"}]
    config = from_flat({"devices.profiles": json.dumps(kinds), "client-groups": json.dumps(groups)})
    devices = devices_of(config, range(5))
    assert [devices(p).tokens_per_second for p in range(5)] == [10, 10, 99, 99, 10]
    with pytest.raises(ConfigError, match="client-groups device = 'phone': devices"):
        from_flat(
            {
                "devices.profiles": json.dumps(kinds),
                "client-groups": '[{"partitions": "1", "device": "phone"}]',
            }
        )


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_trace_says_what_each_partition_runs_on(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"trace.{ending}"
    rows = [{"partition": p, "tokens-per-second": 10.0 * (p + 1), "upload_mbps": None} for p in (1, 0, 2)]
    if ending == "csv":
        file.write_text("partition,tokens-per-second,upload_mbps\n1,20,\n0,10,\n2,30,\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    devices = devices_of(from_flat({"devices.trace": str(file)}), range(3))
    assert [(devices(p).tokens_per_second, devices(p).upload_mbps) for p in range(3)] == [
        (10, None), (20, None), (30, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("partition,upload-mbps\n0,5\n2,5\n", "there is no row for partition 1"),
        ("partition,upload-mbps\n0,-5\n1,5\n", "row 1: .*upload-mbps = -5.0: must be > 0"),
        ("partition,upload-mbps\n0,5\n0,5\n", "row 2: partition 0 has two rows"),
        ("partition,upload-mbps\n0,nan\n1,5\n", "row 1: .*upload-mbps = nan"),
        ("partition,upload-mbps\n0,fast\n1,5\n", "row 1: upload-mbps = 'fast': must be a number"),
        ("partition,upload\n0,5\n1,5\n", "row 1: column 'upload': accepted are partition, tokens-per-second"),
        ("client,upload-mbps\n0,5\n1,5\n", "row 1: "),
        ("partition,upload-mbps\n0.5,5\n1,5\n", "row 1: partition = '0.5': must be a partition's number"),
        ("partition,failure\n0,1\n1,0\n", "row 1: .*failure = 1.0: must be < 1"),
        ("partition,spread\n0,1\n1,0\n", "row 1: column 'spread'"),
        ("partition,upload-mbps\n-1,5\n0,5\n1,5\n", "row 1: partition = '-1': must be a partition's number"),
        ("partition,upload-mbps,upload_mbps\n0,5,6\n1,5,6\n", "row 1: columns .*: two of them are the same"),
    ],
)
def test_a_trace_with_faults_is_refused_in_one_line(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=why) as refused:
        devices_of(from_flat({"devices.trace": str(file)}), range(2))
    assert "devices.trace" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"profiles": "equal", "trace": "a.csv"}, "devices.profiles is set, too"),
        ({"profiles": "fast"}, "accepted are equal, heavy-tailed"),
        ({"profiles": "[1]"}, "accepted are equal, heavy-tailed"),
        ({"profiles": '{"a": 1}'}, "devices.profiles a = 1: must be an object"),
        ({"profiles": "{}"}, "devices.profiles = '{}': names no kind"),
        ({"profiles": '{"a": {"spread": 11}}'}, "spread = 11: must be <= 10"),
        ({"profiles": '{"a": {"share": 1e10}}'}, "share = .*: must be <= 1000000000"),
        ({"profiles": "equal", "staleness": "constant"}, "means nothing without devices.buffer-size or"),
        ({"deadline": 3.0}, "means nothing without devices.profiles"),
        ({"over-selection": 1.5}, "means nothing without devices.profiles"),
        ({"tiers": 2}, "means nothing without devices.profiles"),
        ({"profiles": "equal", "in-flight": 2}, "means nothing without devices.buffer-size"),
        ({"profiles": "equal", "over-selection": 1.5}, "times fraction-train = 1 must be <= 1"),
        ({"profiles": "equal", "deadline": -1.0}, "devices.deadline = -1.0: must be >= 0"),
    ],
)
def test_contradictions_are_refused(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        from_flat({f"devices.{key}": value for key, value in keys.items()})
