"""Shares, masks and fixed point against published vectors, other implementations and enumeration."""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter
from contextlib import suppress
from itertools import product

import numpy as np
import pytest
import torch
from Crypto.Cipher import AES
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError, SecureRefused
from fedlora.secure import masks, shamir
from fedlora.secure.fixed_point import FixedPoint
from fedlora.wire.secure import row_length, to_row


def test_the_agreed_key_is_hkdf_of_x25519_by_the_vectors_of_rfc_7748() -> None:
    """Section 6.1, and HKDF (RFC 5869) written out by HMAC."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    common = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert masks.public_of(alice).hex() == public
    key = masks.agree(alice, masks.public_of(bob), "a purpose")
    assert key == masks.agree(bob, masks.public_of(alice), "a purpose")
    assert key != masks.agree(bob, masks.public_of(alice), "another")
    extracted = hmac.new(bytes(32), common, hashlib.sha256).digest()
    assert key == hmac.new(extracted, b"a purpose\x01", hashlib.sha256).digest()


@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.data())
@settings(max_examples=40, deadline=None)
def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not(
    secret: bytes, t: int, data: st.DataObject
) -> None:
    shares = shamir.split(secret, t, range(1, 8))
    chosen = data.draw(st.lists(st.sampled_from(range(1, 8)), min_size=t, max_size=t, unique=True))
    assert shamir.combine({x: shares[x] for x in chosen}) == secret
    if t > 1:
        with suppress(ValueError):
            assert shamir.combine({x: shares[x] for x in chosen[1:]}) != secret


def test_shares_by_hand() -> None:
    """f(x) = 1234 + 166 x + 94 x^2: the textbook's polynomial, and a coefficient that wraps."""
    shares = {x: int.from_bytes(s, "big") for x, s in shamir.shares_of([1234, 166, 94], range(1, 6)).items()}
    assert shares == {1: 1494, 2: 1942, 3: 2578, 4: 3402, 5: 4414}
    wrapped = shamir.shares_of([5, shamir.PRIME - 1], [2])
    assert int.from_bytes(wrapped[2], "big") == 3


def test_shares_below_the_threshold_say_nothing_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modulo 7, t = 3: each pair of shares comes equally often with each secret."""
    monkeypatch.setattr(shamir, "PRIME", 7)
    for holders in ((1, 2), (2, 5), (4, 6)):
        seen = Counter(
            (secret, tuple(shamir.shares_of([secret, a, b], holders).values()))
            for secret, a, b in product(range(7), repeat=3)
        )
        assert len(seen) == 7 * 49
        assert set(seen.values()) == {1}


@pytest.mark.parametrize(("threshold", "holders"), [(0, [1]), (3, [1, 2]), (1, [0, 1]), (2, [1, 1, 2])])
def test_what_cannot_be_shared(threshold: int, holders: list[int]) -> None:
    with pytest.raises(ValueError, match="holders"):
        shamir.split(bytes(32), threshold, holders)
    with pytest.raises(ValueError, match="no shares"):
        shamir.combine({})


@pytest.mark.parametrize("bits", [16, 24, 32, 64])
def test_numbers_travel_in_as_many_bytes_as_they_are_long(bits: int) -> None:
    generator = np.random.default_rng(bits)
    values = generator.integers(0, 2**bits, 50, dtype=np.dtype(f"<u{masks.bytes_of(bits)}").type)
    body = masks.packed(values, bits)
    assert body.tobytes() == b"".join(int(v).to_bytes(bits // 8, "little") for v in values)
    assert np.array_equal(masks.unpacked(body, bits), values)


@pytest.mark.parametrize("kind", ["<u4", "<u8"])
def test_masks_are_aes_256_in_counter_mode_over_several_pieces(kind: str) -> None:
    key, numbers = bytes(range(32)), 2**16 + 7
    total = np.zeros(numbers, kind)
    masks.add_expanded(total, key)
    counter = AES.new(key, AES.MODE_CTR, nonce=b"", initial_value=0)
    assert total.tobytes() == counter.encrypt(bytes(total.nbytes))
    masks.add_expanded(total, key, positive=False)
    assert not total.any()


@given(
    st.integers(1, 300),
    st.sampled_from([16, 24, 32, 64]),
    st.floats(1e-3, 10),
    st.integers(1, 1000),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_within_the_stated_error_and_never_overflow(
    clients: int, bits: int, limit: float, most: int, seed: int
) -> None:
    """Also where everybody is at the limit with the largest weight, which is the most there can be."""
    if bits == 16:
        clients, most = min(clients, 31), min(most, 1000)
    fixed, generator = FixedPoint(clients, bits, limit, most), np.random.default_rng(seed)
    weights = generator.integers(0, most, clients, endpoint=True)
    values = generator.uniform(-1.2 * limit, 1.2 * limit, (clients, 20))
    values[:, 0], values[:, 1], weights[0] = limit, -limit, most
    kind = np.dtype(f"<u{masks.bytes_of(bits)}")
    total, count = np.zeros(20, kind), np.zeros(1, kind)
    for w, x in zip(weights, values, strict=True):
        total = total + fixed.encode(x, float(w), generator)
        count = count + fixed.count(int(w))
    for sums in (total, count):  # what is above the modulus says nothing
        sums += np.left_shift(kind.type(171), kind.type(bits)) if bits < 32 else kind.type(0)
    assert fixed.counted(count) == [weights.sum()]
    mean = fixed.decode(total) / weights.sum()
    exact = weights @ np.clip(values, -limit, limit) / weights.sum()
    assert np.abs(mean - exact).max() <= fixed.error(float(weights.sum())) * (1 + 1e-9) + 1e-14 * limit


def test_rounding_is_right_in_the_mean() -> None:
    fixed = FixedPoint(1, 32, 1.0, 1)
    value = 0.3 / fixed.steps  # three tenths of a step
    drawn = fixed.encode(np.full(100_000, value), 1.0, np.random.default_rng(0))
    assert set(drawn.tolist()) == {0, 1}
    assert drawn.mean() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("clients", [10, 100, 1000])
def test_at_the_defaults_a_mean_is_off_by_less_than_a_ten_thousandth_of_its_norm(clients: int) -> None:
    """Changes of 1e-3 a number, weights that differ eightfold."""
    generator = np.random.default_rng(clients)
    fixed = FixedPoint(clients, 32, 1.0, 400)
    weights = generator.integers(50, 400, clients, endpoint=True)
    shift = generator.normal(0, 1e-3, 2000)
    total, exact = np.zeros(2000, "<u4"), np.zeros(2000)
    for w in weights:
        x = shift + generator.normal(0, 1e-3, 2000)
        total, exact = total + fixed.encode(x, float(w), generator), exact + w * x
    error = np.linalg.norm(fixed.decode(total) - exact) / np.linalg.norm(exact)
    assert error < 1e-4


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ((2**22, 32, 1.0, 1), "secure.bits = 32"),
        ((32, 16, 1.0, 1), "secure.bits = 16"),
        ((100, 32, 1.0, 10**8), "secure.max-weight"),
    ],
)
def test_a_modulus_that_is_too_small_is_refused(values: tuple[int, int, float, int], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        FixedPoint(*values)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_leaves_no_client(value: float) -> None:
    """As an integer it would be any number, and under masks the server could not tell whose."""
    start, trained = {"a": torch.zeros(2)}, {"a": torch.tensor([0.1, value])}
    fixed, draws = FixedPoint(clients=3, bits=32, limit=1.0, max_weight=5), np.random.default_rng(0)
    with pytest.raises(SecureRefused, match="holds a NaN or an infinity"):
        to_row(start, trained, 1, None, fixed, draws)
    assert len(to_row(start, {"a": torch.ones(2)}, 1, None, fixed, draws)) == row_length(start)
