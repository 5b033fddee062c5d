"""No image for pretraining is ever with a client or in a test, and none is in two of anything."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedlora.assets.fetch import cache_dir, is_cached
from fedlora.data.builtin import fashion_mnist, image_sets
from fedlora.data.builtin.image_domains import DOMAINS
from fedlora.data.builtin.image_sets import SOURCES, built_in_images, distinct, image_parts, source_identity
from fedlora.data.images import ImageFormat, Images
from fedlora.errors import AssetError, ConfigError

RNG = np.random.default_rng(0)


def drawing(*counts: int) -> list[np.ndarray]:
    return [RNG.integers(0, 256, (count, 28, 28)).astype(np.uint8) for count in counts]


def contents(images: Images) -> set[bytes]:
    return {image.tobytes() for image in images.pixels}


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins for both image sets, with images that occur twice, in the files' own formats."""
    digits = drawing(100)[0]
    digits[50], digits[77] = digits[0], digits[1]
    labels = np.arange(100) % 10
    rows = [",".join(map(str, [*image.ravel(), label])) for image, label in zip(digits, labels, strict=True)]
    (tmp_path / image_sets.DIGITS_FILE).write_bytes(gzip.compress("\n".join(rows).encode()))
    monkeypatch.setattr(image_sets, "asset_path", lambda _: tmp_path)
    train, test = drawing(300, 40)
    train[3], train[9] = test[5], train[8]
    for part, images in (("train", train), ("t10k", test)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", (np.arange(len(images)) % 10).astype(np.uint8))
    monkeypatch.setattr(fashion_mnist, "_home", lambda: tmp_path)
    return None


def check_apart(name: str) -> tuple[int, int, int]:
    parts = image_parts(name)
    found = [parts.pretrain, parts.train, parts.test]
    assert len(set().union(*map(contents, found))) == sum(map(len, found))
    return len(parts.pretrain), len(parts.train), len(parts.test)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(("name", "total"), [("digits", 98), ("fashion-mnist", 338)])
def test_the_parts_share_no_image_and_repeat_none(name: str, total: int) -> None:
    assert sum(check_apart(name)) == total


@pytest.mark.usefixtures("fakes")
def test_a_test_image_is_never_given_up_for_its_copy() -> None:
    assert len(image_parts("fashion-mnist").test) == 40


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "sizes"), [("digits", (2000, 2000, 1000)), ("fashion-mnist", (20000, 40000, 10000))]
)
def test_the_parts_of_the_real_images(name: str, sizes: tuple[int, int, int]) -> None:
    there = (
        is_cached("digits") if name == "digits" else (cache_dir() / "assets" / fashion_mnist.PACKAGE).is_dir()
    )
    if not there:
        pytest.skip(f"{name} is not in the cache")
    assert check_apart(name) == sizes
    for part in vars_of(image_parts(name)):
        assert np.ptp(np.bincount(part.labels)) == 0


def vars_of(parts: image_sets.Parts) -> list[Images]:
    return [parts.pretrain, parts.train, parts.test]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", SOURCES)
def test_the_federation_holds_the_parts_each_image_once(name: str) -> None:
    data, parts = built_in_images(name), image_parts(name)
    assert data.domain_names == tuple(DOMAINS)
    assert len(data.label_names) == 10
    for shown, plain in ((data.train, parts.train), (data.test, parts.test)):
        np.testing.assert_array_equal(shown.labels, plain.labels)
        same = shown.domains == 0
        np.testing.assert_array_equal(shown.pixels[same], plain.pixels[same])
        inverted = shown.domains == tuple(DOMAINS).index("inversion")
        np.testing.assert_array_equal(shown.pixels[inverted], 255 - plain.pixels[inverted])


@pytest.mark.usefixtures("fakes")
def test_a_larger_model_gets_larger_images() -> None:
    form = ImageFormat(size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert built_in_images("digits", form).test.pixels.shape[1:] == (3, 32, 32)


def test_distinct_looks_at_all_arrays_before() -> None:
    a = np.array([[1, 1], [2, 2], [1, 1]])
    b = np.array([[2, 2], [3, 3]])
    assert [flags.tolist() for flags in distinct(a, b)] == [[True, True, False], [False, True]]


def test_an_unknown_name_is_refused() -> None:
    for function in (image_parts, source_identity):
        with pytest.raises(ConfigError, match="digits, fashion-mnist"):
            function("cifar")


def test_without_apt_one_line_names_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "FOLDER", Path("nowhere/at/all"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r'no apt here.*data.name = "digits"') as caught:
        fashion_mnist.read_fashion_mnist("train")
    assert "\n" not in str(caught.value)


def test_a_failing_apt_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(fashion_mnist, "FOLDER", Path("nowhere/at/all"))
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'E: Unable to locate package x' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(AssetError, match=r"apt-get failed \(Unable to locate") as caught:
        fashion_mnist.read_fashion_mnist("train")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "usr"
    installed.mkdir()
    for file in fashion_mnist.FILES:
        (installed / file).write_bytes(b"something else")
    monkeypatch.setattr(fashion_mnist, "FOLDER", installed)  # absolute: "/" / absolute is itself
    with pytest.raises(AssetError, match="not the pinned file"):
        fashion_mnist.read_fashion_mnist("train")
