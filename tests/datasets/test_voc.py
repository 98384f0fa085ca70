"""The VOC reader: lists of 1, -1 and 0, against the counts of the photographs and damaged lists."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from msrn_ray.datasets.voc import VOC_LABELS, find_voc, read_voc
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.types import ABSENT, PRESENT, UNKNOWN

# Photos with at least one object that is not difficult, in the order of the labels.
TRAINVAL = (5, 10, 2, 3, 10, 4, 7, 6, 13, 1, 17, 9, 1, 5, 80, 14, 0, 5, 4, 5)
TEST = (3, 4, 4, 4, 3, 9, 9, 7, 8, 2, 9, 1, 0, 2, 51, 4, 2, 4, 4, 8)


def write(root: Path) -> Path:
    """Write three images: a cat in 000005, a difficult cat and a dog in 000002, nothing in 000009. Return VOC2007."""
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
def test_difficult_objects_follow_the_policy(
    tmp_path: Path, difficult: Literal["ignore", "positive", "negative"], value: int
) -> None:
    base = write(tmp_path)
    samples = read_voc(Location.of(tmp_path), "train", difficult=difficult)
    expected = np.zeros((3, 20), np.int8)
    expected[0, VOC_LABELS.index("cat")], expected[0, VOC_LABELS.index("dog")] = value, 1
    expected[1, VOC_LABELS.index("cat")] = 1
    np.testing.assert_array_equal(samples.targets, expected)
    assert samples.table["image_id"].to_pylist() == ["000002", "000005", "000009"]
    assert samples.table["uri"].to_pylist()[1] == str(base / "JPEGImages/000005.jpg")
    assert samples.notes[-1].startswith("train: 3 images, 1 labels seen only in difficult objects are taken as ")


def test_unknown_is_the_default(tmp_path: Path) -> None:
    write(tmp_path)
    assert (read_voc(Location.of(tmp_path), "train").targets == -1).sum() == 1


@pytest.mark.parametrize("level", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_root_may_be_any_of_three_levels(tmp_path: Path, level: str) -> None:
    write(tmp_path)
    assert len(read_voc(Location.of(tmp_path / level), "train")) == 3


@pytest.mark.parametrize(("split", "images", "positives"), [("trainval", 137, TRAINVAL), ("test", 87, TEST)])
def test_positives_match_the_photographs(shared: Path, split: str, images: int, positives: tuple[int, ...]) -> None:
    samples = read_voc(Location.of(shared / "data/voc_mini"), split)
    assert len(samples) == images
    assert samples.label_names == VOC_LABELS == tuple(sorted(VOC_LABELS))
    assert tuple((samples.targets == 1).sum(0).tolist()) == positives


def test_unknown_labels(shared: Path) -> None:
    targets = np.concatenate(
        [read_voc(Location.of(shared / "data/voc_mini"), split).targets for split in ("train", "val", "test")]
    )
    assert len(targets) == 224
    assert (targets == -1).any(1).sum() == 39
    assert ((targets == -1).any(1) & ~(targets == 1).any(1)).sum() == 12


def test_agrees_with_the_annotations(shared: Path) -> None:
    samples = read_voc(Location.of(shared / "data/voc_mini"), "trainval")
    for row in samples.table.to_pylist():
        path = shared / f"data/voc_mini/VOCdevkit/VOC2007/Annotations/{row['image_id']}.xml"
        easy: dict[str, bool] = {}
        for entry in ET.parse(path).iter("object"):
            name = str(entry.findtext("name"))
            easy[name] = easy.get(name, False) or entry.findtext("difficult") == "0"
        expected = [0 if label not in easy else 1 if easy[label] else -1 for label in VOC_LABELS]
        assert row["target"] == expected
        assert Path(row["uri"]).is_file()


def test_label_order_matches_the_authors(shared: Path) -> None:
    assert list(VOC_LABELS) == np.load(shared / "word_vectors/voc.npz")["names"].tolist()


def test_folder_without_voc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"no ImageSets/Main in it, in VOC2007/, .* or in VOCdevkit/VOC2012/; give the folder of VOC2007$",
    ):
        read_voc(Location.of(tmp_path), "train")


def test_missing_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=r"aeroplane_test\.txt: no such file; unpack .* or choose from: train$"):
        read_voc(Location.of(tmp_path), "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000002 -1\n000005 2\n", r"cat_train\.txt, line 2: '000005 2' is not an image id and 1, 0 or -1; correct"),
        ("000002\n", r"cat_train\.txt, line 1: '000002' is not"),
        ("", r"cat_train\.txt: is empty; unpack"),
        (
            "000002 -1\n000002 -1\n",
            r"cat_train\.txt: 1 values of image id occur more than once \(000002\); make them unique",
        ),
        (
            "000002 -1\n000005 -1\n",
            r"cat_train\.txt: lists other images, or in another order, than aeroplane_train\.txt",
        ),
        ("000005 -1\n000002 -1\n000009 -1\n", r"cat_train\.txt: lists other images, or in another order"),
    ],
)
def test_damaged_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (write(tmp_path) / "ImageSets/Main/cat_train.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_voc(Location.of(tmp_path), "train")


@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbf000002 -1\r\n000005  1\r\n000009 -1\r\n\r\n", b"000002 -1\r000005 1\r000009 -1"]
)
def test_byte_order_mark_and_line_ends(tmp_path: Path, data: bytes) -> None:
    (write(tmp_path) / "ImageSets/Main/cat_train.txt").write_bytes(data)
    assert read_voc(Location.of(tmp_path), "train").targets[:, VOC_LABELS.index("cat")].tolist() == [0, 1, 0]


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "ImageSets/Main/cat_train.txt").write_bytes("000002 -1\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"cat_train\.txt: is UTF-16; save the whole file as UTF-8"):
        read_voc(Location.of(tmp_path), "train")


def write_xml(base: Path, image_id: str, *objects: tuple[str, str]) -> None:
    (base / "Annotations").mkdir(exist_ok=True)
    entries = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><part><name>head</name></part></object>"
        for name, difficult in objects
    )
    (base / f"Annotations/{image_id}.xml").write_text(f"<annotation>{entries}</annotation>")


def write_agreeing(base: Path) -> Path:
    """Write XML files that agree with the lists of `write`."""
    write_xml(base, "000002", ("cat", "1"), ("dog", "0"), ("dog", "1"))
    write_xml(base, "000005", ("cat", "1"), ("cat", "0"))
    write_xml(base, "000009")
    return base


def test_agreeing_xml_adds_no_note(tmp_path: Path) -> None:
    base = write(tmp_path)
    samples = read_voc(Location.of(tmp_path), "train")
    (note, _) = samples.notes
    assert note == "train: 3 of 3 images have no XML to compare the class files with"
    write_agreeing(base)
    compared = read_voc(Location.of(tmp_path), "train")
    assert compared.table.equals(samples.table)
    assert len(compared.notes) == 1


@pytest.mark.parametrize(
    ("image_id", "objects", "message"),
    [
        (
            "000005",
            [],
            r"cat_train\.txt: image 000005 has cat, but no cat in .*Annotations/000005\.xml; 1 such",
        ),
        (
            "000009",
            [("bus", "0")],
            r"bus_train\.txt: image 000009 has no bus, but bus in .*Annotations/000009\.xml; 1 such",
        ),
        (
            "000009",
            [("bus", "0"), ("car", "0"), ("cow", "1")],
            r"bus_train\.txt: .*; 2 such contradictions: correct the wrong",
        ),
        ("000009", [("unicorn", "0")], r"000009\.xml: has an object with the name 'unicorn', no VOC class; correct it"),
        ("000009", [("cat", "yes")], r"000009\.xml: has an object with difficult='yes', not 0 or 1; correct it"),
    ],
)
def test_contradicting_xml_is_refused(
    tmp_path: Path, image_id: str, objects: list[tuple[str, str]], message: str
) -> None:
    base = write_agreeing(write(tmp_path))
    write_xml(base, image_id, *objects)
    with pytest.raises(UserError, match=message):
        read_voc(Location.of(tmp_path), "train")


def test_a_note_counts_differences_on_difficult(tmp_path: Path) -> None:
    base = write(tmp_path)
    samples = read_voc(Location.of(tmp_path), "train")
    write_agreeing(base)
    write_xml(base, "000002", ("cat", "0"), ("dog", "1"))
    write_xml(base, "000009", ("sheep", "1"))
    compared = read_voc(Location.of(tmp_path), "train")
    assert compared.table.equals(samples.table), "the class files are used"
    assert compared.notes[0] == (
        "train: class files and XML differ in 3 labels on what is difficult; the class files are used (1 absent / difficult,"
        " 1 difficult / present, 1 present / difficult; 000002 cat, 000002 dog, 000009 sheep)"
    )


def test_damaged_xml_is_refused(tmp_path: Path) -> None:
    base = write_agreeing(write(tmp_path))
    (base / "Annotations/000005.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match=r"000005\.xml: not an XML file \(.*\); unpack it again"):
        read_voc(Location.of(tmp_path), "train")


@pytest.mark.parametrize("encoding", ["gb2312", "nothing-known"])
def test_xml_with_unknown_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    base = write_agreeing(write(tmp_path))
    path = base / "Annotations/000005.xml"
    path.write_text(f'<?xml version="1.0" encoding="{encoding}"?><annotation/>')
    with pytest.raises(UserError, match=r"000005\.xml: not an XML file \(.*encoding.*\); unpack it again"):
        read_voc(Location.of(tmp_path), "train")


def test_malicious_xml_is_refused(tmp_path: Path) -> None:
    base = write_agreeing(write(tmp_path))
    tens = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))
    for entities, name in ((f'<!ENTITY a0 "0123456789">{tens}', "a9"), ('<!ENTITY e SYSTEM "/etc/passwd">', "e")):
        text = f"<!DOCTYPE annotation [{entities}]><annotation><object><name>&{name};</name></object></annotation>"
        (base / "Annotations/000005.xml").write_text(text)
        with pytest.raises(UserError, match=r"000005\.xml: not an XML file"):
            read_voc(Location.of(tmp_path), "train")


def test_years(tmp_path: Path) -> None:
    base = write(tmp_path)
    later = shutil.copytree(base, base.parent / "VOC2012")
    assert read_voc(Location.of(tmp_path), "train").source == "VOC2007 train"
    assert read_voc(Location.of(tmp_path), "train", year=2012).source == "VOC2012 train"
    assert read_voc(Location.of(later), "train").source == "VOC2012 train"
    with pytest.raises(
        UserError, match=r"VOC2007: no ImageSets/Main in .*; give the folder of VOC2012 \(did you mean .*kit\?\)"
    ):
        read_voc(Location.of(base), "train", year=2012)
    with pytest.raises(UserError, match=r"data\.year 2014: VOC has 2007 and 2012; choose one"):
        read_voc(Location.of(base), "train", year=2014)
    shutil.rmtree(base)
    assert read_voc(Location.of(tmp_path), "train").source == "VOC2012 train"


@pytest.mark.parametrize("level", ["JPEGImages", "ImageSets", "ImageSets/Main"])
def test_wrong_folder_level_gets_a_suggestion(tmp_path: Path, level: str) -> None:
    base = write(tmp_path / "set")
    with pytest.raises(UserError, match=rf"did you mean {base}\?"):
        read_voc(Location.of(base / level), "train")
    with pytest.raises(UserError, match=rf"did you mean {tmp_path}/set\?"):
        read_voc(Location.of(tmp_path), "train")


def test_image_ids_cannot_leave_the_folder(tmp_path: Path) -> None:
    base = write(tmp_path)
    for path in (base / "ImageSets/Main").iterdir():
        path.write_text(path.read_text().replace("000005", "../../x"))
    with pytest.raises(UserError, match=r"aeroplane_train\.txt: the file name '\.\./\.\./x\.jpg' leads out of"):
        read_voc(Location.of(tmp_path), "train")


def test_missing_images_are_refused(tmp_path: Path) -> None:
    base = write(tmp_path)
    (base / "JPEGImages/000005.jpg").unlink()
    with pytest.raises(
        UserError, match=r"aeroplane_train\.txt: 1 of its 3 images are missing \(\S*JPEGImages/000005\.jpg\); finish"
    ):
        read_voc(Location.of(tmp_path), "train")
    shutil.rmtree(base / "JPEGImages")
    with pytest.raises(UserError, match=r"JPEGImages: no such folder"):
        read_voc(Location.of(tmp_path), "train")


def test_xml_beside_images_is_explained(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.xml").write_text("<annotation/>")
    with pytest.raises(UserError, match=r"1 \.xml in train/: .*write a manifest"):
        find_voc(Location.of(tmp_path), None)
