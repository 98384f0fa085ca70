"""The NUS-WIDE reader: official lists with backslashes and a file of labels per concept, and the csv."""

from __future__ import annotations

import csv
import shutil
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.datasets.nuswide import NUSWIDE_LABELS, read_nuswide
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location


def write(root: Path, concepts: tuple[str, ...] = ("sky", "animal", "tree")) -> Path:
    """Write three Train images; image k has concept k, the last image has none."""
    names = ("zoo\\2.jpg", "art\\1.jpg", "zoo\\3.jpg")
    (root / "ImageList").mkdir(parents=True)
    (root / "Groundtruth/TrainTestLabels").mkdir(parents=True)
    (root / "Concepts81.txt").write_text("\n".join(concepts) + "\n")
    (root / "ImageList/TrainImagelist.txt").write_bytes("\r\n".join(names).encode())
    for number, concept in enumerate(concepts):
        text = "".join(f"{int(row == number < 2)}\n" for row in range(3))
        (root / f"Groundtruth/TrainTestLabels/Labels_{concept}_Train.txt").write_text(text)
    for name in names:
        file = root / "Flickr" / name.replace("\\", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def test_other_concepts_keep_the_order_of_their_file(tmp_path: Path) -> None:
    samples = read_nuswide(Location.of(write(tmp_path)), "Train")
    assert samples.label_names == ("sky", "animal", "tree")
    assert samples.table["image_id"].to_pylist() == ["zoo/2.jpg", "art/1.jpg", "zoo/3.jpg"]
    assert samples.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert samples.table["uri"].to_pylist()[1] == str(tmp_path / "Flickr/art/1.jpg")
    assert samples.notes == ("Train: 3 images, 1 without a label kept",)


def test_the_81_concepts_follow_the_authors_order(tmp_path: Path) -> None:
    concepts = tuple(sorted(NUSWIDE_LABELS))
    samples = read_nuswide(Location.of(write(tmp_path, concepts)), "Train")
    assert samples.label_names == NUSWIDE_LABELS != concepts
    assert samples.targets[0, NUSWIDE_LABELS.index(concepts[0])] == 1
    assert samples.targets.sum() == 2


def test_labels_are_the_authors_list(shared: Path) -> None:
    assert list(NUSWIDE_LABELS) == np.load(shared / "word_vectors/nuswide.npz")["names"].tolist()


@pytest.mark.parametrize(
    ("split", "in_csv", "images", "unlabelled", "mean"),
    [("Train", "train", 178, 29, 1.49), ("Test", "val", 114, 13, 1.64)],
)
def test_agrees_with_the_csv(shared: Path, split: str, in_csv: str, images: int, unlabelled: int, mean: float) -> None:
    root = shared / "data/nuswide_mini"
    samples = read_nuswide(Location.of(root), split)
    with (root / "nus_wid_data.csv").open() as lines:
        expected = {
            str(root / row["filepath"]): set(literal_eval(row["label"]))
            for row in csv.DictReader(lines)
            if row["split_name"] == in_csv
        }
    found = {
        uri: {name for name, value in zip(samples.label_names, row, strict=True) if value == 1}
        for uri, row in zip(samples.table["uri"].to_pylist(), samples.targets, strict=True)
    }
    assert found == expected
    assert len(samples) == images
    assert np.count_nonzero(~samples.targets.any(1)) == unlabelled
    assert round(float(samples.targets.sum(1).mean()), 2) == mean
    assert samples.notes == (f"{split}: {images} images, {unlabelled} without a label kept",)


def test_concepts_with_positives(shared: Path) -> None:
    seen = [
        read_nuswide(Location.of(shared / "data/nuswide_mini"), split).targets.any(0) for split in ("Train", "Test")
    ]
    assert np.count_nonzero(seen[0] | seen[1]) == 22
    assert np.count_nonzero(seen[0] & seen[1]) == 20


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'train'; choose from: Train, Test"):
        read_nuswide(Location.of(write(tmp_path)), "train")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "ImageList/TrainImagelist.txt",
            r"/ImageList/TrainImagelist\.txt: no such file; give the folder that holds ImageList/",
        ),
        (
            "Groundtruth/TrainTestLabels/Labels_animal_Train.txt",
            r"Concepts81\.txt: the concept 'animal' has no Groundtruth/TrainTestLabels/Labels_animal_Train\.txt; unpack it",
        ),
    ],
)
def test_missing_file_is_refused(tmp_path: Path, file: str, message: str) -> None:
    (write(tmp_path) / file).unlink()
    with pytest.raises(UserError, match=message):
        read_nuswide(Location.of(tmp_path), "Train")


def test_concept_without_test_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "ImageList/TrainImagelist.txt").rename(tmp_path / "ImageList/TestImagelist.txt")
    with pytest.raises(UserError, match=r"the concept 'sky' has no .*Labels_sky_Test\.txt"):
        read_nuswide(Location.of(tmp_path), "Test")


def test_any_subset_of_concepts(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "Concepts2.txt").write_text("tree\nsky\n")
    assert read_nuswide(Location.of(root), "Train").label_names == ("sky", "animal", "tree"), (
        "Concepts81.txt comes first"
    )
    samples = read_nuswide(Location.of(root), "Train", concepts="Concepts2.txt")
    assert samples.label_names == ("tree", "sky")
    assert samples.targets.tolist() == [[0, 1], [0, 0], [0, 0]]
    (root / "Concepts81.txt").unlink()
    assert read_nuswide(Location.of(root), "Train").label_names == ("tree", "sky"), "the only list"
    (root / "Concepts1.txt").write_text("sky\n")
    with pytest.raises(UserError, match=r"has Concepts1\.txt and Concepts2\.txt; choose one with --data\.concepts"):
        read_nuswide(Location.of(root), "Train")
    for name in ("Concepts1.txt", "Concepts2.txt"):
        (root / name).unlink()
    assert read_nuswide(Location.of(root), "Train").label_names == ("animal", "sky", "tree"), (
        "those with a file of labels"
    )
    with pytest.raises(UserError, match=r"Concepts9\.txt: no such file; name a file in the folder"):
        read_nuswide(Location.of(root), "Train", concepts="Concepts9.txt")


def test_unknown_concept_gets_a_suggestion(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "Concepts81.txt").write_text("sky\nanimals\n")
    with pytest.raises(UserError, match=r"Concepts81\.txt: the concept 'animals' has no .* \(did you mean animal\?\)"):
        read_nuswide(Location.of(root), "Train")


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends(tmp_path: Path, ends: str) -> None:
    root = write(tmp_path)
    expected = read_nuswide(Location.of(root), "Train")
    for path in root.rglob("*.txt"):
        text = "\n".join(path.read_text().splitlines())
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ends).encode())
    found = read_nuswide(Location.of(root), "Train")
    assert found.table.equals(expected.table)
    assert found.label_names == expected.label_names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"zoo\\2.jpg\nart\\1.jpg\nz\xf4o\\3.jpg\n", r"TrainImagelist\.txt, line 3: byte 0xf4 is not UTF-8; save"),
        ("zoo\\2.jpg\n".encode("utf-16"), r"TrainImagelist\.txt: is UTF-16; save the whole file as UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (write(tmp_path) / "ImageList/TrainImagelist.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_nuswide(Location.of(tmp_path), "Train")


@pytest.mark.parametrize("level", ["ImageList", "Flickr/zoo", ".."])
@pytest.mark.parametrize("form", ["official", "csv"])
def test_wrong_folder_level_gets_a_suggestion(tmp_path: Path, level: str, form: str) -> None:
    root = write(tmp_path / "set")
    if form == "csv":
        write_csv(root, CSV_ROWS)
        shutil.rmtree(root / "ImageList")
        level = level.replace("ImageList", "Groundtruth")
    with pytest.raises(
        UserError, match=rf"neither ImageList/ nor nus_wid_data\.csv; give .* \(did you mean {root}\?\)"
    ):
        read_nuswide(Location.of(tmp_path if level == ".." else root / level), "Train")
    with pytest.raises(UserError, match=r"nowhere: no such folder with ImageList/"):
        read_nuswide(Location.of(tmp_path / "nowhere"), "Train")


CSV_ROWS = ("zoo/3.jpg,[],val", """zoo/2.jpg,"['sky', 'sun']",train""", "art/1.jpg,['tree'],train")


def write_csv(root: Path, rows: Sequence[str], header: str = "filepath,label,split_name") -> Path:
    (root / "nus_wid_data.csv").write_text("\n".join([header, *(f"Flickr/{row}" for row in rows)]))
    return root


def test_csv(tmp_path: Path) -> None:
    root = write_csv(write(tmp_path), CSV_ROWS)
    samples = read_nuswide(Location.of(root), "Train", form="csv")
    assert samples.label_names == NUSWIDE_LABELS
    assert samples.table["image_id"].to_pylist() == ["zoo/2.jpg", "art/1.jpg"]
    assert samples.table["uri"].to_pylist()[0] == str(root / "Flickr/zoo/2.jpg")
    labels = [[NUSWIDE_LABELS[column] for column in np.flatnonzero(row)] for row in samples.targets]
    assert labels == [["sky", "sun"], ["tree"]]
    assert samples.source == "nus_wid_data.csv train"
    assert read_nuswide(Location.of(root), "Train").source == "TrainImagelist.txt", "the official lists come first"
    assert len(read_nuswide(Location.of(root), "Test", form="csv")) == 1
    assert len(read_nuswide(Location.of(root), "Test", form="csv", keep_unlabelled=False)) == 0
    (root / "nus_wid_data.csv").write_bytes(
        b"\xef\xbb\xbf" + (root / "nus_wid_data.csv").read_bytes().replace(b"\n", b"\r\n").replace(b"/", b"\\")
    )
    assert read_nuswide(Location.of(root), "Train", form="csv").table.equals(samples.table)


def test_csv_of_other_concepts(tmp_path: Path) -> None:
    root = write_csv(write(tmp_path), [*CSV_ROWS[:2], "art/1.jpg,['unicorn'],train"])
    with pytest.raises(UserError, match=r"csv, row 3: 'unicorn' is no concept of NUS-WIDE; correct it, or name a file"):
        read_nuswide(Location.of(root), "Train", form="csv")
    (root / "mine.txt").write_text("unicorn\nsun\n")
    samples = read_nuswide(Location.of(root), "Train", form="csv", concepts="mine.txt")
    assert samples.label_names == ("unicorn", "sun")
    assert samples.targets.tolist() == [[0, 1], [1, 0]]
    (root / "mine.txt").write_text("unicorns\nunicorn\n")
    with pytest.raises(UserError, match=r"no row has the concept 'unicorns'; correct its name in the file of --data"):
        read_nuswide(Location.of(root), "Train", form="csv", concepts="mine.txt")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "art/1.jpg,['sk'],train",
            r"row 2: 'sk' is no concept of NUS-WIDE; correct it \(did you mean sky\?\), or name",
        ),
        ("art/1.jpg,sky,train", r"row 2: the label 'sky' is not a list such as \['sky', 'sun'\]; correct it"),
        ("art/1.jpg,\"['sky', 3]\",train", r"row 2: the label .* is not a list such as"),
        ("art/1.jpg,('sky'),train", r"row 2: the label .* is not a list such as"),
        ("art/1.jpg,[__import__('os').getcwd()],train", r"row 2: the label .* is not a list such as"),
        ("art/1.jpg,,train", r"row 2: the label '' is not a list such as"),
        ("art/1.jpg,['sky'],dev", r"row 2: split_name is 'dev', not train or val; correct it"),
        (
            "art/1.jpg,['sky']",
            r"cannot be read as CSV with the columns filepath, label, split_name \(.*Expected 3 columns, got 2",
        ),
        ("zoo/2.jpg,['sky'],val", r"1 values of filepath occur more than once \(zoo/2\.jpg\); make them unique"),
        ("../../1.jpg,['sky'],train", r"file name 'Flickr/\.\./\.\./1\.jpg' leads out of"),
    ],
)
def test_damaged_csv_is_refused(tmp_path: Path, row: str, message: str) -> None:
    root = write_csv(write(tmp_path), [CSV_ROWS[1], row])
    with pytest.raises(UserError, match=message) as error:
        read_nuswide(Location.of(root), "Train", form="csv")
    assert "nus_wid_data.csv" in str(error.value)


def test_csv_without_a_column_or_split_is_refused(tmp_path: Path) -> None:
    root = write_csv(write(tmp_path), CSV_ROWS, "filepath,labels,split_name")
    with pytest.raises(UserError, match=r"with the columns filepath, label, split_name \(.*'label'"):
        read_nuswide(Location.of(root), "Train", form="csv")
    write_csv(root, CSV_ROWS[1:])
    with pytest.raises(UserError, match=r"csv: no row of split Test"):
        read_nuswide(Location.of(root), "Test", form="csv")
    (root / "nus_wid_data.csv").unlink()
    with pytest.raises(UserError, match=r"nus_wid_data\.csv: no such file; give the folder that holds nus_wid"):
        read_nuswide(Location.of(root), "Train", form="csv")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Concepts81.txt", "", r"Concepts81\.txt: is empty; write each label once"),
        ("Concepts81.txt", "sky\nsky\n", r"Concepts81\.txt: names 'sky' more than once; write each"),
        ("ImageList/TrainImagelist.txt", "", r"TrainImagelist\.txt: is empty; download"),
        (
            "ImageList/TrainImagelist.txt",
            "zoo\\2.jpg\nzoo\\2.jpg\n",
            r"TrainImagelist\.txt: 1 values of the list of images occur more than",
        ),
        (
            "ImageList/TrainImagelist.txt",
            "..\\2.jpg\na\nb\n",
            r"file name '\.\./2\.jpg' leads out of .*Flickr; make it",
        ),
        (
            "Groundtruth/TrainTestLabels/Labels_sky_Train.txt",
            "0\n1\n",
            r"Labels_sky_Train\.txt: 2 labels for the 3 images",
        ),
        (
            "Groundtruth/TrainTestLabels/Labels_sky_Train.txt",
            "0\n2\n1\n",
            r"sky_Train\.txt, line 2: '2' is not 0 or 1; cor",
        ),
        ("Groundtruth/TrainTestLabels/Labels_sky_Train.txt", "0\n1\n-1\n", r"line 3: '-1' is not 0 or 1"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    (write(tmp_path) / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_nuswide(Location.of(tmp_path), "Train")


def test_missing_images_are_refused(tmp_path: Path) -> None:
    (write(tmp_path) / "Flickr/art/1.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of its 3 images are missing \(\S*Flickr/art/1\.jpg\); finish"):
        read_nuswide(Location.of(tmp_path), "Train")
    (tmp_path / "Flickr/art").rmdir()
    with pytest.raises(UserError, match=r"1 of its 3 images are missing \(\S*Flickr/art/1\.jpg\); finish"):
        read_nuswide(Location.of(tmp_path), "Train")
