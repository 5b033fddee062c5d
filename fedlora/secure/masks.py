"""Keys that two clients agree on, and what follows from them: masks, and sealed shares.

X25519 (RFC 7748) and HKDF-SHA256 (RFC 5869) make a key; AES-256 in counter mode stretches it to a mask, read
as little-endian numbers, and AES-256-GCM seals shares. All primitives are those of `cryptography`. A key's
purpose names the round's session and both clients, so that no key serves twice, and what was sealed for
another round does not open.
"""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedlora.errors import SecureRefused

Unsigned = NDArray[np.uint32] | NDArray[np.uint64]
"""Numbers modulo 2^32 or 2^64; the low bits of those modulo 2^32 are numbers modulo 2^16 and 2^24."""
KEY_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16
ZEROS = bytes(2**17)


def public_of(private: bytes) -> bytes:
    """The public key of a private one, both 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: str) -> bytes:
    """The key that the owners of two pairs have in common for a purpose, 32 bytes.

    Raises:
        SecureRefused: the public key is none.
    """
    try:
        theirs = X25519PublicKey.from_public_bytes(public)
        common = X25519PrivateKey.from_private_bytes(private).exchange(theirs)
    except ValueError:
        raise SecureRefused("a public key is no point that a secret can be agreed on with") from None
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=purpose.encode()).derive(common)


def add_expanded(total: Unsigned, key: bytes, *, positive: bool = True) -> None:
    """Add as many numbers out of a key as the total has, or take them off, in place; no key serves twice.

    In pieces that stay in a processor's cache.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    operation, room = np.add if positive else np.subtract, bytearray(len(ZEROS) + 15)
    per_piece = len(ZEROS) // total.itemsize
    for begin in range(0, len(total), per_piece):
        piece = total[begin : begin + per_piece]
        stream.update_into(ZEROS[: piece.nbytes], room)
        operation(piece, np.frombuffer(room, total.dtype, len(piece)), out=piece)


def packed(values: Unsigned, bits: int) -> NDArray[np.uint8]:
    """The low bits of each number, 16, 24, 32 or 64 of them, as bytes that travel."""
    size = values.dtype.itemsize
    little = values.astype(f"<u{size}", copy=False).view(np.uint8).reshape(-1, size)
    return np.ascontiguousarray(little[:, : bits // 8]).reshape(-1)


def unpacked(body: NDArray[np.uint8], bits: int) -> Unsigned:
    """The numbers again, with zeros above."""
    size = bytes_of(bits)
    wide = np.zeros((len(body) * 8 // bits, size), np.uint8)
    wide[:, : bits // 8] = body.reshape(-1, bits // 8)
    numbers: Unsigned = wide.reshape(-1).view(f"<u{size}")
    return numbers


def bytes_of(bits: int) -> int:
    """Bytes of the numbers that are computed with."""
    return 8 if bits > 32 else 4


def of_integers(integers: NDArray[np.float64], bits: int) -> Unsigned:
    """Whole numbers as they are computed with."""
    size = bytes_of(bits)
    numbers: Unsigned = integers.astype(f"<i{size}").view(f"<u{size}")
    return numbers


def signed(total: Unsigned, bits: int) -> NDArray[np.float64]:
    """The whole numbers that residues stand for, from -2^(bits - 1) on; higher bits say nothing."""
    above = 8 * total.dtype.itemsize - bits
    numbers: NDArray[np.float64] = ((total << above).view(f"i{total.dtype.itemsize}") >> above).astype(float)
    return numbers


def seal(key: bytes, plain: bytes) -> bytes:
    """A text that only who has the key can read, and nobody can change."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, None)


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The text again.

    Raises:
        SecureRefused: it was sealed with another key, or changed since.
    """
    if len(sealed) < NONCE_BYTES + TAG_BYTES:
        raise SecureRefused("a sealed share is cut short")
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], None)
    except InvalidTag:
        raise SecureRefused("a sealed share does not open: of another round, or changed on the way") from None
