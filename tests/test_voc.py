"""The VOC reader: lists of 1, -1 and 0, against the counts of the photographs and damaged lists."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from msrn_ray.datasets.voc import VOC_LABELS, read_voc
from msrn_ray.errors import UserError
from msrn_ray.types import ABSENT, PRESENT, UNKNOWN

# Photos with at least one object that is not difficult, in the order of the labels.
TRAINVAL = (5, 10, 2, 3, 10, 4, 7, 6, 13, 1, 17, 9, 1, 5, 80, 14, 0, 5, 4, 5)
TEST = (3, 4, 4, 4, 3, 9, 9, 7, 8, 2, 9, 1, 0, 2, 51, 4, 2, 4, 4, 8)


def write(root: Path) -> Path:
    """Three images: a cat in 000005, a difficult cat and a dog in 000002, nothing in 000009; returns VOC2007."""
    base = root / "VOCdevkit" / "VOC2007"
    (base / "ImageSets/Main").mkdir(parents=True)
    (base / "JPEGImages").mkdir()
    values = {"cat": ("0", "1", "-1"), "dog": ("1", "-1", "-1")}
    for label in VOC_LABELS:
        rows = zip(("000002", "000005", "000009"), values.get(label, ("-1", "-1", "-1")), strict=True)
        text = "".join(f"{image_id} {value:>2}\n" for image_id, value in rows)
        (base / f"ImageSets/Main/{label}_train.txt").write_text(text)
    for image_id in ("000002", "000005", "000009"):
        (base / f"JPEGImages/{image_id}.jpg").touch()
    return base


@pytest.mark.parametrize(("difficult", "value"), [("ignore", UNKNOWN), ("positive", PRESENT), ("negative", ABSENT)])
def test_values(tmp_path: Path, difficult: Literal["ignore", "positive", "negative"], value: int) -> None:
    base = write(tmp_path)
    samples = read_voc(tmp_path, "train", difficult=difficult)
    expected = np.zeros((3, 20), np.int8)
    expected[0, VOC_LABELS.index("cat")], expected[0, VOC_LABELS.index("dog")] = value, 1
    expected[1, VOC_LABELS.index("cat")] = 1
    np.testing.assert_array_equal(samples.targets, expected)
    assert samples.table["image_id"].to_pylist() == ["000002", "000005", "000009"]
    assert samples.table["uri"].to_pylist()[1] == str(base / "JPEGImages/000005.jpg")
    assert samples.notes[0].startswith("train: 3 images, 1 labels seen only in difficult objects taken as ")


def test_unknown_is_the_default(tmp_path: Path) -> None:
    write(tmp_path)
    assert (read_voc(tmp_path, "train").targets == -1).sum() == 1


@pytest.mark.parametrize("level", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_root_may_be_any_of_three_levels(tmp_path: Path, level: str) -> None:
    write(tmp_path)
    assert len(read_voc(tmp_path / level, "train")) == 3


@pytest.mark.parametrize(("split", "images", "positives"), [("trainval", 137, TRAINVAL), ("test", 87, TEST)])
def test_counts(shared: Path, split: str, images: int, positives: tuple[int, ...]) -> None:
    samples = read_voc(shared / "data/voc_mini", split)
    assert len(samples) == images
    assert samples.label_names == VOC_LABELS == tuple(sorted(VOC_LABELS))
    assert tuple((samples.targets == 1).sum(0).tolist()) == positives


def test_unknown_labels(shared: Path) -> None:
    targets = np.concatenate([read_voc(shared / "data/voc_mini", split).targets for split in ("train", "val", "test")])
    assert len(targets) == 224
    assert (targets == -1).any(1).sum() == 39
    assert ((targets == -1).any(1) & ~(targets == 1).any(1)).sum() == 12


def test_agrees_with_the_annotations(shared: Path) -> None:
    samples = read_voc(shared / "data/voc_mini", "trainval")
    for row in samples.table.to_pylist():
        path = shared / f"data/voc_mini/VOCdevkit/VOC2007/Annotations/{row['image_id']}.xml"
        easy: dict[str, bool] = {}
        for entry in ET.parse(path).iter("object"):
            name = str(entry.findtext("name"))
            easy[name] = easy.get(name, False) or entry.findtext("difficult") == "0"
        expected = [0 if label not in easy else 1 if easy[label] else -1 for label in VOC_LABELS]
        assert row["target"] == expected
        assert Path(row["uri"]).is_file()


def test_label_order_is_that_of_the_authors(shared: Path) -> None:
    assert list(VOC_LABELS) == np.load(shared / "word_vectors/voc.npz")["names"].tolist()


def test_not_voc(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no ImageSets/Main in it, in VOC2007/ or in VOCdevkit/VOC2007/; give the folder"
    ):
        read_voc(tmp_path, "train")


def test_no_such_split(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"aeroplane_test\.txt: no such file; unpack .* or choose from: train$"):
        read_voc(tmp_path, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000002 -1\n000005 2\n", r"cat_train\.txt, line 2: '000005 2' is not an image id and 1, 0 or -1; correct"),
        ("000002\n", r"cat_train\.txt, line 1: '000002' is not"),
        ("", r"cat_train\.txt: is empty; unpack"),
        ("000002 -1\n000002 -1\n", r"cat_train\.txt: lists an image twice; unpack"),
        (
            "000002 -1\n000005 -1\n",
            r"cat_train\.txt: lists other images, or in another order, than aeroplane_train\.txt",
        ),
        ("000005 -1\n000002 -1\n000009 -1\n", r"cat_train\.txt: lists other images, or in another order"),
    ],
)
def test_damaged_list(tmp_path: Path, text: str, message: str) -> None:
    (write(tmp_path) / "ImageSets/Main/cat_train.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_voc(tmp_path, "train")


def test_images_not_on_disk(tmp_path: Path) -> None:
    base = write(tmp_path)
    (base / "JPEGImages/000005.jpg").unlink()
    with pytest.raises(UserError, match=r"JPEGImages: 1 of the 3 images listed in .* \(000005\.jpg\); finish"):
        read_voc(tmp_path, "train")
    shutil.rmtree(base / "JPEGImages")
    with pytest.raises(UserError, match=r"JPEGImages: no such folder"):
        read_voc(tmp_path, "train")
