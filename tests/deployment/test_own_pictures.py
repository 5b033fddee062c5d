"""A node's own pictures: the pixels and labels that the run would give them, and nothing told of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from typer.testing import CliRunner

from clients.owner import REFUSAL
from fedlora.cli import cli
from fedlora.data.images import fitted
from fedlora.deployment.operator.create import create
from fedlora.errors import OwnDataRefused
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.prepared.node_data import OwnData, own_data, read_own
from fedlora.tasks import task_named
from tests.conftest import tiny_config
from tests.deployment.test_limits import reply
from tests.in_process import client_runtime
from tests.vision.samples import shaded

TASK = task_named("image-classification")
READER = TASK.reader("tiny-vit")
LABELS = tuple(f"shade-{k}" for k in range(4))


@pytest.fixture(autouse=True)
def _own_cache(cache: Path) -> None:
    """All of it in the tests' own cache."""


def folder(root: Path, *labels: int, part: str = "", each: int = 6, seed: int = 0) -> Path:
    """``PART/LABEL/*.png``, in the order of the labels."""
    images = shaded(each * 4, seed=seed)
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        if not labels or label in labels:
            place = root / part / LABELS[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[0]).save(place / f"{number:03}.png")
    return root


def own(path: Path, home: Path, **more: Any) -> OwnData:
    keys = {"dataset_id": "mine", "partition_id": 0, "labels": LABELS}
    return OwnData(path=str(path), home=home / "home", **{**keys, **more})


def encoded(mine: OwnData) -> Prepared:
    return own_data(mine, "tiny-vit", 64, TASK)


def pixels(prepared: Prepared) -> np.ndarray:
    return prepared.train.tokens.reshape(len(prepared.train), 1, 28, 28)


def table_of(images: list[Any], labels: list[Any], kind: Any, name: str = "image") -> Dataset:
    return Dataset.from_dict(
        {name: images, "label": labels}, features=Features({name: ImageFeature(), "label": kind})
    )


def refusal(mine: OwnData) -> str:
    """What the owner reads; others are told nothing of it."""
    with pytest.raises(OwnDataRefused) as caught:
        encoded(mine)
    said = str(caught.value)
    assert "\n" not in said
    assert not [key for key in ("data.name", "data.image", "data.label", "data.text") if key in said]
    assert mine.path not in caught.value.told
    return said


def test_own_pictures_are_what_the_same_files_are_as_a_run(tmp_path: Path) -> None:
    home = folder(folder(tmp_path / "scans", part="train"), part="test", each=1, seed=1)
    keys = {"data.partitioner": "iid", "data.num-partitions": 1}
    config = tiny_config(
        **{"task": TASK.name, "model.name": "tiny-vit", "data.name": str(home), **keys},
    )
    whole = open_prepared(prepare(config))
    mine = client_runtime(config, own(home, tmp_path)).data
    assert (mine.label_names, mine.domain_names, mine.declared) == (whole.label_names, (), "mine")
    assert np.array_equal(pixels(mine), pixels(whole))
    assert np.array_equal(mine.train.labels, whole.train.labels)
    assert mine.train.image == whole.train.image == READER.form
    assert np.array_equal(mine.test.tokens, whole.test.tokens)
    assert (len(mine.train), len(mine.test)) == (24, 4)
    assert (tmp_path / "home").is_dir()


def test_a_parquet_file_and_a_saved_dataset_are_the_same_pictures(tmp_path: Path) -> None:
    images = shaded(8)
    pictures = [Image.fromarray(image[0]) for image in images.pixels]
    names = [LABELS[label] for label in images.labels]
    table_of(pictures, names, Value("string"), "photo").to_parquet(tmp_path / "scans.parquet")
    classes = ClassLabel(names=[*reversed(LABELS)])
    saved = table_of(pictures, names, classes, "photo")
    DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "saved"))
    for name in ("scans.parquet", "saved"):
        mine = encoded(own(tmp_path / name, tmp_path, image_column="photo"))
        assert np.array_equal(pixels(mine), images.pixels)
        assert np.array_equal(mine.train.labels, images.labels)
        assert len(mine.test) == (8 if name == "saved" else 0)


@pytest.mark.parametrize("part", ["", "train"])
def test_a_node_with_pictures_of_one_label_keeps_the_runs_number(part: str, tmp_path: Path) -> None:
    mine = encoded(own(folder(tmp_path / "scans", 2, part=part), tmp_path))
    assert mine.train.labels.tolist() == [2] * 6
    assert mine.num_labels == 4


def test_pictures_directly_in_the_directory_have_no_label_of_the_run(tmp_path: Path) -> None:
    folder(tmp_path / "scans", 1)
    assert "holds 'shade-1' in row 1, the run's labels are 'a', 'b'" in refusal(
        own(tmp_path / "scans", tmp_path, labels=("a", "b"))
    )
    assert "holds 'shade-1'" in refusal(own(tmp_path / "scans" / "shade-1", tmp_path, labels=("a", "b")))


def test_pictures_of_any_size_and_mode_become_the_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (41, 30, 3)).astype(np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (28, 28)).astype(np.uint16))
    clear = Image.fromarray(rng.integers(0, 256, (9, 64, 4)).astype(np.uint8))
    place = tmp_path / "scans" / "shade-0"
    place.mkdir(parents=True)
    for number, picture in enumerate((colour, deep, clear)):
        picture.save(place / f"{number}.png")
    found = pixels(encoded(own(tmp_path / "scans", tmp_path)))
    for number, picture in enumerate((colour, deep, clear)):
        assert np.array_equal(found[number], fitted(picture, READER.form))


def test_a_mode_without_a_range_is_refused_by_its_file(tmp_path: Path) -> None:
    home = folder(tmp_path / "scans")
    (home / LABELS[1] / "001.png").unlink()
    Image.fromarray(np.zeros((28, 28), dtype=np.float32)).save(home / LABELS[1] / "001.tiff")
    said = refusal(own(home, tmp_path))
    assert said.startswith("data: picture ")
    assert "shade-1/001.tiff" in said
    assert "mode F (32 bits a pixel)" in said


def test_a_picture_that_cannot_be_decoded_is_named_to_its_owner_alone(tmp_path: Path) -> None:
    home = folder(tmp_path / "scans")
    (home / LABELS[3] / "007.png").write_bytes(b"no picture")
    assert "shade-3/007.png" in refusal(own(home, tmp_path))
    with pytest.raises(OwnDataRefused, match=r"shade-3/007\.png"):
        read_own(own(home, tmp_path))


def test_a_label_that_the_run_does_not_know_is_refused(tmp_path: Path) -> None:
    said = refusal(own(folder(tmp_path / "scans"), tmp_path, labels=LABELS[:3]))
    assert re.search(
        r"holds 'shade-3' in row [0-9]+, the run's labels are 'shade-0', 'shade-1', 'shade-2'", said
    )


@pytest.mark.parametrize(
    ("write", "keys", "named"),
    [
        (lambda home: None, {}, "cannot be read"),
        (lambda home: (home / "cat").mkdir(), {}, "cannot be read"),
        (folder, {"image_column": "photo"}, "image-column = 'photo': no such column of images"),
        (folder, {"label_column": "animal"}, "label-column = 'animal': no such column"),
        (folder, {"label_column": ""}, "label-column = '': image-classification learns labels"),
        (
            lambda home: (home / "a.jsonl").write_text('{"text": "x", "label": "shade-0"}\n'),
            {},
            "image-column = 'image': no such column of images",
        ),
    ],
    ids=["empty", "no pictures", "no such column", "no such label", "no label", "texts"],
)
def test_what_holds_no_labelled_pictures_is_one_line(
    write: Any, keys: dict[str, Any], named: str, tmp_path: Path
) -> None:
    home = tmp_path / "scans"
    home.mkdir()
    write(home)
    said = refusal(own(home, tmp_path, **keys))
    assert said.partition(" = ")[0] in ("data", "image-column", "label-column")
    assert named in said


def test_pictures_are_no_texts(tmp_path: Path) -> None:
    with pytest.raises(OwnDataRefused, match="text-column = 'text': no such column") as caught:
        own_data(own(folder(tmp_path / "scans"), tmp_path), "tiny", 64)
    assert str(tmp_path) not in caught.value.told


def test_equal_pictures_are_held_out_together(tmp_path: Path) -> None:
    home = folder(folder(tmp_path / "scans", each=5), each=5, seed=1)
    for picture in sorted(home.rglob("*.png")):
        (picture.parent / f"again-{picture.name}").write_bytes(picture.read_bytes())
    table = read_own(own(home, tmp_path, test_fraction=0.25), TASK, READER)
    assert table.test is not None
    assert (len(table.train), len(table.test)) == (30, 10)
    assert not set(table.train["image"].to_pylist()) & set(table.test["image"].to_pylist())


def test_changed_pictures_are_read_anew(tmp_path: Path) -> None:
    home = folder(tmp_path / "scans")
    before = pixels(encoded(own(home, tmp_path))).copy()
    (home / LABELS[0] / "000.png").unlink()
    assert len(encoded(own(home, tmp_path)).train) == len(before) - 1
    Image.new("L", (28, 28), 255).save(home / LABELS[0] / "000.png")
    after = pixels(encoded(own(home, tmp_path)))
    assert [np.array_equal(a, b) for a, b in zip(before, after, strict=True)] == [False] + [True] * 23


def test_a_message_is_carried_out_on_own_pictures_and_declined_without_their_names(tmp_path: Path) -> None:
    server = folder(tmp_path / "server", part="train")
    keys = {"data.partitioner": "iid", "data.num-partitions": 1, "data.name": str(server)}
    private = {"privacy.mode": "example", "privacy.accountant": "rdp"}
    config = tiny_config(**{"task": TASK.name, "model.name": "tiny-vit", **keys, **private})
    home = folder(tmp_path / "secret", 0, 1)
    node = {"data": str(home), "dataset-id": "ward 7"}
    done = reply(config, tmp_path, labels=list(LABELS), **node)
    assert done.status == "ok", done.reason
    assert (tmp_path / "state" / "data").is_dir()
    (home / LABELS[1] / "001.png").write_bytes(b"no picture")
    refused = reply(config, tmp_path, labels=list(LABELS), **node)
    assert (refused.status, refused.reason) == (
        "declined",
        REFUSAL,
    )


def test_check_reports_pictures_and_labels(tmp_path: Path) -> None:
    home = folder(tmp_path / "scans", 1, 2)
    create(tmp_path / "f", 1, data=[str(home)])
    node = tmp_path / "f" / "nodes" / "node-0"

    def check() -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["federation", "check", str(node)])
        return result.exit_code, " ".join(result.output.split())

    code, said = check()
    assert code == 0
    assert "as 'scans', 12 examples" in said
    assert "columns: image, label; image image, label label" in said
    assert "labels: shade-1 (6), shade-2 (6)" in said
    (home / LABELS[1] / "001.png").write_bytes(b"no picture")
    code, said = check()
    assert code == 2
    assert "error: data: picture " in said
