"""A cluster of two Ray nodes on one machine, addresses where there is none, and a Ray that is there before.

These tests leave the Ray of the process, which all others of the folder share; by their name they come first.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from fedlora.config import EngineConfig
from fedlora.errors import ConfigError
from fedlora.server.directory import RunDirectory
from fedlora.simulation import ray_cluster
from fedlora.simulation.ray_cluster import check_address, connect
from fedlora.simulation.ray_grid import RayGrid
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.simulate import simulate, simulate_on
from tests.conftest import tiny_config
from tests.simulation.light import LIGHT, order
from tests.simulation.test_ray_engine import adapter


@pytest.fixture
def address() -> Iterator[str]:
    ray.shutdown()
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    two.add_node(num_cpus=1)
    two.wait_for_nodes()
    yield str(two.address)
    ray.shutdown()
    two.shutdown()


@pytest.mark.slow
def test_two_nodes_train_with_an_actor_on_each_and_the_bits_of_one_machine(
    address: str, cache: Path, tmp_path: Path
) -> None:
    config = tiny_config(**{"engine.address": address, "strategy.name": "flora", "num-server-rounds": 2})
    with pytest.raises(ConfigError, match=r"no machine has them \(in all 2 CPUs, 0 GPUs\)"):
        RayPool(EngineConfig(address=address, num_cpus=2.0))
    pool = RayPool(config.engine)
    assert pool.size == 2
    simulate_on(pool, config, RunDirectory(tmp_path / "cluster"))
    at = ray.get([actor.node.remote() for actor in pool.actors])
    assert len(set(at)) == 2
    pool.close()
    simulate(tiny_config(**{"strategy.name": "flora", "num-server-rounds": 2}), tmp_path / "here")
    assert adapter(tmp_path / "here") == adapter(tmp_path / "cluster")


def test_sigterm_stays_with_whoever_had_it_before_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler kills the raylet under a driver that then aborts with a trace."""

    def begin(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", begin)
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        assert connect("")
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        connect("")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_ray_that_was_started_for_a_pool_ends_with_it() -> None:
    ray.shutdown()
    RayPool(EngineConfig(num_actors=1), LIGHT).close()
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match="no machine has them"):
        RayPool(EngineConfig(num_gpus=99.0), LIGHT)
    assert not ray.is_initialized()


def test_a_ray_that_was_there_is_used_from_where_the_driver_is_now_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a ledger's path is relative to the driver's directory, so must an actor's be."""
    ray.shutdown()
    for key in ray_cluster.QUIET:
        monkeypatch.delenv(key, raising=False)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    joined = ray.get_runtime_context().gcs_address
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    pool = RayPool(EngineConfig(num_cpus=0.5), LIGHT)
    assert pool.size == 2
    grid = RayGrid(pool, range(1), {}, tmp_path)
    (reply,) = grid.send_and_receive([order(grid, 0)])
    answer = reply.content.config_records["config"]
    assert (answer["directory"], answer["quiet"]) == (str(tmp_path), "0")
    assert str(tmp_path / "modules") in answer["paths"]  # type: ignore[operator]
    pool.close()
    RayPool(EngineConfig(address=joined, num_cpus=0.5), LIGHT).close()
    assert ray.get_runtime_context().gcs_address == joined
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"{other}': this process uses Ray at {joined} already"):
            RayPool(EngineConfig(address=other), LIGHT)
    ray.shutdown()


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", "head:port", ":6379", "local"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^engine.address = .*: accepted are auto and host:port"):
        check_address(address)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_where_nobody_listens_is_known_at_once(host: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no Ray cluster answers there") as caught:
        check_address(f"{host}:{free_port()}")
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)


def test_a_cluster_that_was_killed_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address stays in a file, where ``auto`` finds it; Ray alone would knock for minutes."""
    left = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(ray_cluster, "LAST_STARTED", left)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_address("auto")
    for address, reason in ((f"127.0.0.1:{free_port()}", "refused"), ("nonsense", "invalid literal")):
        left.write_text(address)
        expected = (
            rf"^engine.address = 'auto': no Ray cluster answers there \({address} in {left}: .*{reason}"
        )
        with pytest.raises(ConfigError, match=expected):
            check_address("auto")
    monkeypatch.setattr(ray_cluster, "LAST_STARTED", tmp_path / ("x" * 300))  # the system cannot look
    with pytest.raises(ConfigError, match=r"no Ray cluster answers there \(the address in .*too long"):
        check_address("auto")
    monkeypatch.setattr(ray_cluster, "LAST_STARTED", left)
    with socket.create_server(("127.0.0.1", 0)) as server:
        left.write_text(f"127.0.0.1:{server.getsockname()[1]}\n")
        check_address("auto")


def test_who_listens_and_is_not_ray_is_known_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setattr(ray_cluster, "TRIAL_SECONDS", 6.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=server.accept, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}'.*no answer within 6 s"):
            connect(f"127.0.0.1:{port}")
    assert time.monotonic() - started < 20
    assert not ray.is_initialized()


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: object) -> None:
        raise Exception("The current node timed out during startup.\nMore about it.")  # as Ray raises it

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match=r"^engine.address = '': .* \(The current node timed out [^\n]*\)$"):
        connect("")
