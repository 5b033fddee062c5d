"""Certificates and keys of a federation: a CA of its own, a server certificate, one key for each node.

Node keys lie on a NIST curve, which is all that Flower accepts. Private keys are made with mode 0600.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.errors import ConfigError

SECRET = 0o600
YEARS = 10
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Every server certificate is also good for these, so that a federation can be tried on one machine."""


def write_authority(certificate: Path, key: Path, name: str) -> None:
    """A certificate authority, which signs nothing but server certificates."""
    secret = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} CA")])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    signed = (
        _builder(subject, subject, secret.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), critical=False)
        .sign(secret, hashes.SHA384())
    )
    _write_pem(certificate, signed, key, secret)


def write_server(certificate: Path, key: Path, authority: tuple[Path, Path], hosts: Sequence[str]) -> None:
    """A server certificate for the given names and addresses, and for the loopback.

    Args:
        certificate: where it goes.
        key: where its private key goes.
        authority: certificate and key of `write_authority`.
        hosts: DNS names and IP addresses under which nodes reach the server.
    """
    ca = x509.load_pem_x509_certificate(authority[0].read_bytes())
    ca_key = serialization.load_pem_private_key(authority[1].read_bytes(), password=None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    secret = ec.generate_private_key(ec.SECP384R1())
    names = dict.fromkeys([*hosts, *LOOPBACK])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, next(iter(names))[:64])])
    signed = (
        _builder(subject, ca.subject, secret.public_key())
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA384())
    )
    _write_pem(certificate, signed, key, secret)


def check_server(server: Path) -> None:
    """Whether nodes will take the certificate in a server's directory.

    Raises:
        ConfigError: it or its authority's cannot be read, is of another time, or another authority signed it.
    """
    found = [_certificate(server / name) for name in ("ca.crt", "server.crt")]
    now = datetime.now(UTC)
    for file, certificate in zip((server / "ca.crt", server / "server.crt"), found, strict=True):
        first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not first <= now <= last:
            raise ConfigError(
                f"{file}: is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, and this machine's clock says "
                f"{now:%Y-%m-%d %H:%M} UTC; set the clock, or make another by fedlora federation certify"
            )
    try:
        found[1].verify_directly_issued_by(found[0])
    except (ValueError, TypeError, InvalidSignature):
        raise ConfigError(
            f"{server / 'server.crt'}: is not signed by {server / 'ca.crt'}, which nodes go by; make another "
            "by fedlora federation certify"
        ) from None


def _certificate(file: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"{file}: is no certificate") from None


def write_node_key(key: Path, public: Path) -> str:
    """A node's key pair in OpenSSH's format; returns the public key's fingerprint."""
    secret = ec.generate_private_key(ec.SECP384R1())
    write_secret(
        key,
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    line = secret.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    public.write_bytes(line + b"\n")
    return _fingerprint(secret.public_key())


def fingerprint(public_pem: bytes) -> str:
    """The fingerprint of a public key as Flower reports it; empty for what is no public key.

    It is the SHA-256 of the key's DER form (SubjectPublicKeyInfo), in hex.
    """
    try:
        key = serialization.load_pem_public_key(public_pem)
    except ValueError:
        return ""
    return _fingerprint(key) if isinstance(key, ec.EllipticCurvePublicKey) else ""


def write_secret(path: Path, content: bytes) -> None:
    """A new file that only its owner can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET), "wb") as file:
        file.write(content)


def _fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365 * YEARS))
    )


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pem(
    certificate: Path, signed: x509.Certificate, key: Path, secret: ec.EllipticCurvePrivateKey
) -> None:
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    write_secret(key, secret.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
