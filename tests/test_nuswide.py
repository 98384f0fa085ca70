"""The NUS-WIDE reader: official lists with backslashes, a file of labels per concept."""

from __future__ import annotations

import csv
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.datasets.nuswide import NUSWIDE_LABELS, read_nuswide
from msrn_ray.errors import UserError


def write(root: Path, concepts: tuple[str, ...] = ("sky", "animal", "tree")) -> Path:
    """Three Train images; image k has concept k, the last one none."""
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
    samples = read_nuswide(write(tmp_path), "Train")
    assert samples.label_names == ("sky", "animal", "tree")
    assert samples.table["image_id"].to_pylist() == ["zoo/2.jpg", "art/1.jpg", "zoo/3.jpg"]
    assert samples.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert samples.table["uri"].to_pylist()[1] == str(tmp_path / "Flickr/art/1.jpg")
    assert samples.notes == ("Train: 3 images, 1 without a label kept",)


def test_the_81_concepts_take_the_order_of_the_authors(tmp_path: Path) -> None:
    concepts = tuple(sorted(NUSWIDE_LABELS))
    samples = read_nuswide(write(tmp_path, concepts), "Train")
    assert samples.label_names == NUSWIDE_LABELS != concepts
    assert samples.targets[0, NUSWIDE_LABELS.index(concepts[0])] == 1
    assert samples.targets.sum() == 2


def test_constant_is_the_authors_list(shared: Path) -> None:
    assert list(NUSWIDE_LABELS) == np.load(shared / "word_vectors/nuswide.npz")["names"].tolist()


@pytest.mark.parametrize(
    ("split", "in_csv", "images", "unlabelled", "mean"),
    [("Train", "train", 178, 29, 1.49), ("Test", "val", 114, 13, 1.64)],
)
def test_agrees_with_the_csv(shared: Path, split: str, in_csv: str, images: int, unlabelled: int, mean: float) -> None:
    root = shared / "data/nuswide_mini"
    samples = read_nuswide(root, split)
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
    seen = [read_nuswide(shared / "data/nuswide_mini", split).targets.any(0) for split in ("Train", "Test")]
    assert np.count_nonzero(seen[0] | seen[1]) == 22
    assert np.count_nonzero(seen[0] & seen[1]) == 20


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'train'; choose from: Train, Test"):
        read_nuswide(write(tmp_path), "train")


@pytest.mark.parametrize(
    "file", ["Concepts81.txt", "ImageList/TrainImagelist.txt", "Groundtruth/TrainTestLabels/Labels_animal_Train.txt"]
)
def test_missing_file(tmp_path: Path, file: str) -> None:
    (write(tmp_path) / file).unlink()
    with pytest.raises(UserError, match=r"no such file; give the folder that holds ImageList/") as error:
        read_nuswide(tmp_path, "Train")
    assert str(tmp_path / file) in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Concepts81.txt", "", r"Concepts81\.txt: is empty; write one concept a line"),
        ("Concepts81.txt", "sky\nsky\n", r"Concepts81\.txt: names a concept twice; write one"),
        ("ImageList/TrainImagelist.txt", "", r"TrainImagelist\.txt: is empty; download"),
        ("ImageList/TrainImagelist.txt", "zoo\\2.jpg\nzoo\\2.jpg\n", r"TrainImagelist\.txt: lists an image twice"),
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
def test_damaged_file(tmp_path: Path, file: str, text: str, message: str) -> None:
    (write(tmp_path) / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_nuswide(tmp_path, "Train")


def test_images_not_on_disk(tmp_path: Path) -> None:
    (write(tmp_path) / "Flickr/art/1.jpg").unlink()
    with pytest.raises(UserError, match=r"Flickr: 1 of the 3 images listed in .* \(art/1\.jpg\); finish"):
        read_nuswide(tmp_path, "Train")
    (tmp_path / "Flickr/art").rmdir()
    with pytest.raises(UserError, match=r"Flickr: 1 of the 3 images listed in .* \(art/1\.jpg\); finish"):
        read_nuswide(tmp_path, "Train")
