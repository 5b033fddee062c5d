"""What ``fedlora federation init`` writes: private keys, certificates that hold, scripts that run."""

from __future__ import annotations

import ipaddress
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.keys import fingerprint
from fedlora.deployment.operator.layout import Layout, open_layout, roll_of
from fedlora.deployment.operator.scripts import RESTART_SECONDS
from fedlora.errors import ConfigError

HOSTS = ("fl.example.org", "192.0.2.7")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    path = tmp_path_factory.mktemp("federation") / "hospitals"
    return create(path, 3, HOSTS, port=8443)


def test_private_keys_are_their_owners_alone_and_nowhere_else(layout: Layout) -> None:
    private = {p for p in layout.path.rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()}
    names = {str(p.relative_to(layout.path)) for p in private}
    nodes = {f"nodes/node-{k}/key" for k in range(3)}
    assert names == {"ca/ca.key", "server/server.key", *nodes}
    assert {stat.S_IMODE(p.stat().st_mode) for p in private} == {0o600}
    assert stat.S_IMODE(layout.path.stat().st_mode) == 0o700


def test_the_server_certificate_is_signed_and_names_every_host(layout: Layout) -> None:
    ca = x509.load_pem_x509_certificate((layout.path / "ca" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((layout.server / "server.crt").read_bytes())
    server.verify_directly_issued_by(ca)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org", "localhost"]
    addresses = [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["192.0.2.7", "127.0.0.1", str(ipaddress.ip_address("::1"))]
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_node_keys_are_what_flower_accepts_and_the_roll_knows_them_as_flower_tells_them(
    layout: Layout,
) -> None:
    roll = roll_of(layout.server / "federation.toml")
    seen = {}
    for entry in layout.nodes:
        secret = serialization.load_ssh_private_key((layout.node(entry) / "key").read_bytes(), None)
        assert isinstance(secret, ec.EllipticCurvePrivateKey)
        assert uses_nist_ec_curve(secret.public_key())
        public = serialization.load_ssh_public_key(layout.public_key(entry).read_bytes())
        assert public == secret.public_key()
        seen[fingerprint(public_key_to_bytes(secret.public_key()))] = entry.partition_id
    assert seen == roll
    assert sorted(roll.values()) == [0, 1, 2]


def test_a_key_of_rubbish_has_no_fingerprint() -> None:
    assert fingerprint(b"-----BEGIN PUBLIC KEY-----\nrubbish\n-----END PUBLIC KEY-----\n") == ""


def test_scripts_are_sound_and_turn_every_call_home_off(layout: Layout) -> None:
    scripts = sorted(layout.path.rglob("*.sh"))
    assert len(scripts) == 5
    for script in scripts:
        assert stat.S_IMODE(script.stat().st_mode) & 0o100
        subprocess.run(["sh", "-n", str(script)], check=True)
        text = script.read_text()
        for off in ("FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"):
            assert off in text
        assert "umask 077" in text
    assert "--enable-supernode-auth" in (layout.server / "superlink.sh").read_text()
    assert "--superlink" in (layout.node(layout.nodes[0]) / "start.sh").read_text()
    assert "fl.example.org:8443" in (layout.node(layout.nodes[0]) / "start.sh").read_text()


def test_a_node_is_restarted_only_after_its_lease_ran_out(layout: Layout) -> None:
    unit = (layout.node(layout.nodes[1]) / "fedlora-supernode.service").read_text()
    found = re.search(r"^RestartSec=(\d+)$", unit, re.MULTILINE)
    assert found
    assert int(found[1]) == RESTART_SECONDS > HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE


def test_a_directory_that_holds_something_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        create(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"nodes": 2, "hosts": ["a b"]}, "--host 'a b'"),
        ({"nodes": 2, "hosts": ["a;rm"]}, "--host 'a;rm'"),
        ({"nodes": 2, "port": 70000}, "--port 70000"),
        ({"nodes": 2, "data": ["x.jsonl"]}, "--data is given 1 times"),
        ({"nodes": 1, "data": ["x.jsonl"]}, "--data x.jsonl"),
    ],
)
def test_requests_that_cannot_be_met_leave_nothing(
    arguments: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        create(tmp_path / "new", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_directory_that_is_no_federation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no federation"):
        open_layout(tmp_path)


def test_a_roll_with_one_key_twice_is_refused(layout: Layout, tmp_path: Path) -> None:
    text = (layout.server / "federation.toml").read_text()
    first, second = (entry.fingerprint for entry in layout.nodes[:2])
    (tmp_path / "federation.toml").write_text(text.replace(second, first))
    with pytest.raises(ConfigError, match="two nodes have one fingerprint"):
        roll_of(tmp_path / "federation.toml")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_finds_nothing_wrong_with_the_units(layout: Layout, tmp_path: Path) -> None:
    node = layout.node(layout.nodes[0])
    for folder, home in ((layout.server, "/opt/fedlora/server"), (node, "/opt/fedlora/node-0")):
        for unit in folder.glob("*.service"):
            text = unit.read_text()
            assert f"ExecStart={home}/" in text
            (tmp_path / unit.name).write_text(text.replace(home, str(folder)))
    units = sorted(map(str, tmp_path.glob("*.service")))
    assert len(units) == 3
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
