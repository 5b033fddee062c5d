"""Users' own pictures: directories and parquet files, and what is wrong with them in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from fedlora.config import DataConfig
from fedlora.data.image_files import own_images
from fedlora.data.images import ImageFormat, fitted
from fedlora.errors import ConfigError

TOGETHER: dict[str, Any] = {"partitioner": "iid", "num_partitions": 1}
FORM = ImageFormat(size=8, channels=1, mean=(0.5,), std=(0.5,))
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))


def picture(size: tuple[int, int] = (12, 10), channels: int = 3) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (*size, channels)).astype(np.uint8).squeeze())


def folder(root: Path, parts: tuple[str, ...] = ("train", "test"), each: int = 3) -> Path:
    for part in parts:
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for number in range(each):
                picture().save(root / part / label / f"{part}-{number}.png")
    return root


def refusal(config: DataConfig, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        own_images(config, FORM, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_of_labels(tmp_path: Path) -> None:
    data = own_images(DataConfig(name=str(folder(tmp_path / "pets")), **TOGETHER), FORM)
    assert data.label_names == ("cat", "dog")
    assert data.train.pixels.shape == data.test.pixels.shape == (6, 1, 8, 8)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert set(data.train.domains.tolist()) == {-1}
    assert data.domain_names == data.natural == ()
    with Image.open(tmp_path / "pets" / "train" / "dog" / "train-1.png") as image:
        np.testing.assert_array_equal(data.train.pixels[4], fitted(image, FORM))


def rows(count: int = 40) -> dict[str, Any]:
    numbers = range(count)
    return {
        "image": [picture(channels=1) for _ in numbers],
        "label": [["cat", "dog"][n % 2] for n in numbers],
        "scanner": [["old", "new"][n // (count // 2)] for n in numbers],
        "patient": [n // 4 for n in numbers],
    }


def parquet(path: Path, columns: dict[str, Any]) -> str:
    features = {name: Value("int64" if name == "patient" else "string") for name in columns}
    table = Dataset.from_dict(columns, features=Features({**features, "image": ImageFeature()}))
    table.to_parquet(path)
    return str(path)


COLUMNS: dict[str, Any] = {"domain_column": "scanner", "group_column": "patient", "partition_by": "patient"}


def test_a_parquet_file_with_domains_groups_and_natural_clients(tmp_path: Path) -> None:
    columns = rows()
    columns["image"][39] = columns["image"][0]  # the same picture of two patients
    data = own_images(DataConfig(name=parquet(tmp_path / "scans.parquet", columns), **COLUMNS), FORM)
    assert data.domain_names == ("new", "old")
    assert len(data.train) + len(data.test) == 40
    shapes = {image.tobytes() for image in data.train.pixels} & {i.tobytes() for i in data.test.pixels}
    assert not shapes
    assert len(data.natural) == len(data.train)
    sizes = np.unique(np.array(data.natural), return_counts=True)[1]
    assert (sizes == 4).all()  # nobody's pictures are in both parts
    again = own_images(DataConfig(name=str(tmp_path / "scans.parquet"), **COLUMNS), FORM)
    np.testing.assert_array_equal(again.test.pixels, data.test.pixels)


def test_a_validation_part_stands_in_the_place_of_the_test_images(tmp_path: Path) -> None:
    name = parquet(tmp_path / "scans.parquet", rows())
    whole = own_images(DataConfig(name=name, **COLUMNS), FORM)
    tuned = own_images(DataConfig(name=name, validation_fraction=0.25, **COLUMNS), FORM)
    before, after, held = (
        [image.tobytes() for image in images.pixels] for images in (whole.train, tuned.train, tuned.test)
    )
    assert sorted(after + held) == sorted(before), "what is left and what is held apart were training images"
    assert not set(after) & set(held)
    assert len(held) == 8
    assert len(tuned.natural) == len(after)
    sizes = np.unique(np.array(tuned.natural), return_counts=True)[1]
    assert (sizes == 4).all(), "nobody's pictures are in both parts"


def test_a_validation_part_of_images_with_a_test_split_of_their_own(tmp_path: Path) -> None:
    home = str(folder(tmp_path / "pictures", each=8))
    dealt: dict[str, Any] = {"name": home, "partitioner": "iid", "num_partitions": 2}
    whole = own_images(DataConfig(**dealt), FORM)
    tuned = own_images(DataConfig(**dealt, validation_fraction=0.25), FORM)
    before, held = ({image.tobytes() for image in i.pixels} for i in (whole.train, tuned.test))
    assert held < before
    assert len(tuned.train) + len(tuned.test) == len(whole.train)


def test_natural_clients_by_a_column_that_plays_no_other_part(tmp_path: Path) -> None:
    config = DataConfig(name=parquet(tmp_path / "a.parquet", rows()), partition_by="scanner")
    data = own_images(config, FORM)
    assert set(data.natural) == {"old", "new"}
    assert data.domain_names == ()


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    home = folder(tmp_path / "pets")
    (home / "train" / "dog" / "train-1.png").write_bytes(b"no picture")
    message = refusal(DataConfig(name=str(home), **TOGETHER))
    assert "train/dog/train-1.png" in message
    assert "cannot be used" in message


def test_a_picture_that_breaks_off_is_named(tmp_path: Path) -> None:
    home = folder(tmp_path / "pets")
    broken = home / "test" / "cat" / "test-2.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    assert "test/cat/test-2.png" in refusal(DataConfig(name=str(home), **TOGETHER))


def test_a_missing_picture_is_numbered(tmp_path: Path) -> None:
    columns = rows()
    columns["image"][7] = None
    assert "number 7" in refusal(DataConfig(name=parquet(tmp_path / "a.parquet", columns), **TOGETHER))


def test_a_column_without_images_is_refused(tmp_path: Path) -> None:
    name = parquet(tmp_path / "a.parquet", rows())
    assert "data.image-column = 'picture': no such column of images" in refusal(
        DataConfig(name=name, **TOGETHER), image_column="picture"
    )
    assert "data.image-column = 'scanner': no such column of images" in refusal(
        DataConfig(name=name, **TOGETHER), image_column="scanner"
    )


def test_a_missing_label_column_is_refused(tmp_path: Path) -> None:
    name = parquet(tmp_path / "a.parquet", rows())
    assert "data.label-column = 'animal'" in refusal(DataConfig(name=name, label_column="animal", **TOGETHER))


def test_equal_pictures_only_cannot_be_split(tmp_path: Path) -> None:
    columns = rows(8)
    columns["image"] = [columns["image"][0]] * 8
    assert "cannot be split" in refusal(DataConfig(name=parquet(tmp_path / "a.parquet", columns), **TOGETHER))
