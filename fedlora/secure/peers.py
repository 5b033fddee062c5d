"""Public keys of a federation's nodes by partition, and what nodes sign with them in a round of secure sums.

A node signs its keys of the round, so that a server cannot invent clients, and the list of clients that are
in the sum, so that it cannot tell each a list of its own. What is signed begins with what it is for, and
names the session, which names the run and the round: no signature serves for another. ECDSA with SHA-384, by
the keys with which SuperNodes sign their requests; the primitives are those of `cryptography`.

The file is a table of partition and OpenSSH public key, one a line:

    0 = "ecdsa-sha2-nistp384 AAAA.."
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlora.errors import ConfigError, SecureRefused

PEERS_FILE, KEY_FILE = "peers.toml", "key"
"""In a node's directory; the private key lies beside the others' public ones."""
ALGORITHM = ec.ECDSA(hashes.SHA384())
PUBLIC, SURVIVORS = "public keys", "clients of the sum"
"""What is signed."""


@dataclass(frozen=True, slots=True)
class Peers:
    """The registered nodes' public keys, by partition."""

    keys: Mapping[int, ec.EllipticCurvePublicKey]

    def check(self, partition: int, signature: bytes, signed: bytes) -> None:
        """Make sure that a partition's node has signed something.

        Raises:
            SecureRefused: the partition is none of the nodes', or the signature is not its own.
        """
        if partition not in self.keys:
            raise SecureRefused(f"partition {partition} is none of the registered nodes")
        try:
            self.keys[partition].verify(signature, signed, ALGORITHM)
        except InvalidSignature:
            raise SecureRefused(f"what partition {partition} says is not signed by its node's key") from None


@dataclass(frozen=True, slots=True)
class Identity:
    """A node that signs: its private key, and the public ones of all."""

    secret: ec.EllipticCurvePrivateKey
    peers: Peers

    def sign(self, signed: bytes) -> bytes:
        """The signature of this node."""
        return self.secret.sign(signed, ALGORITHM)


def to_sign(what: str, session: str, *parts: bytes | int) -> bytes:
    """What a signature is over; each part with its length before it, so that none passes for another.

    Args:
        what: `PUBLIC` or `SURVIVORS`.
        session: the round's.
        parts: what is said.
    """
    told = [b"fedlora secure sums", what.encode(), session.encode()]
    told += [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return b"".join(len(part).to_bytes(8, "big") + part for part in told)


def read_peers(file: Path) -> Peers:
    """The keys in a file of a node's owner.

    Raises:
        ConfigError: there is no such file, or a line is not a partition and a key that nobody else has.
    """
    try:
        table = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    keys: dict[int, ec.EllipticCurvePublicKey] = {}
    for name, line in table.items():
        key = public_key(line.encode()) if isinstance(line, str) else None
        if not (name.isascii() and name.isdigit()) or int(name) in keys or key is None:
            raise ConfigError(f"{file}: {name} = {str(line)[:60]!r}: must be a partition and its ECDSA key")
        if key in keys.values():
            raise ConfigError(f"{file}: {name}: another partition has the same key")
        keys[int(name)] = key
    if not keys:
        raise ConfigError(f"{file}: names no node")
    return Peers(keys)


def read_identity(file: Path, partition: int) -> Identity:
    """A node's private key, beside the file of all nodes' public ones.

    Raises:
        ConfigError: one of them cannot be read, or that file has another key for this partition.
    """
    peers, place = read_peers(file), file.with_name(KEY_FILE)
    try:
        secret = load_ssh_private_key(place.read_bytes(), password=None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{place}: cannot be read as a private key ({error})") from None
    own = secret.public_key()
    if not isinstance(secret, ec.EllipticCurvePrivateKey) or peers.keys.get(partition) != own:
        raise ConfigError(f"{file}: partition {partition} has another key there than this node")
    return Identity(secret, peers)


def public_key(line: bytes) -> ec.EllipticCurvePublicKey | None:
    """The key in a line of OpenSSH's format, None where there is none of a NIST curve."""
    try:
        key = load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, ec.EllipticCurvePublicKey) else None


def peers_toml(lines: Iterable[tuple[int, bytes]]) -> str:
    """The file's text, from partitions and lines of OpenSSH's format."""
    told = "".join(f'{partition} = "{line.decode().strip()}"\n' for partition, line in lines)
    return (
        "# The nodes of this federation: partition and public key. Who is not in it takes part in no secure\n"
        "# sum with this node; compare the lines with the other owners', not with the server.\n" + told
    )
