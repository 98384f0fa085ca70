"""The guess of a data set's format from its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from msrn_ray.datasets.recognise import recognise
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location


def touch(folder: Path, *names: str) -> Location:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return Location.of(folder)


@pytest.mark.parametrize(
    ("names", "preset", "below"),
    [
        (["VOCdevkit/VOC2007/ImageSets/Main/train.txt"], "voc2007", ""),
        (["ImageSets/Main/a.txt", "JPEGImages/a.jpg"], "voc2007", ""),
        (["annotations/instances_train2014.json", "train2014/a.jpg"], "coco2014", ""),
        (["ImageList/TrainImagelist.txt"], "nuswide", ""),
        (["train-000.tar", "val-000.tar"], "webdataset", ""),
        (["train/0.tar"], "webdataset", ""),
        (["dataset_dict.json", "train/data.arrow"], "huggingface", ""),
        (["train/metadata.jsonl", "train/a.jpg", "test/metadata.jsonl"], "huggingface", ""),
        (["train-00000-of-00001.parquet"], "huggingface", ""),
        (["labels.csv", "images/a.jpg", "images/b.jpg"], "manifest", "/labels.csv"),
        (["labels.json", "data/a.jpg"], "manifest", "/labels.json"),
        (["train-labels.csv", "class-descriptions.csv"], "manifest", "/train-labels.csv"),
        (["cat/a.jpg", "dog/b.jpg"], "folders", ""),
        (["train/cat/a.jpg", "test/cat/b.jpg"], "folders", ""),
    ],
)
def test_folder_is_recognised_by_its_files(tmp_path: Path, names: list[str], preset: str, below: str) -> None:
    found = recognise(touch(tmp_path, *names))
    assert (found.preset, str(found.root)) == (preset, f"{tmp_path}{below}")


def test_label_file_is_a_manifest(tmp_path: Path) -> None:
    root = touch(tmp_path, "labels.csv", "other.csv")
    assert recognise(root / "other.csv").root == root / "other.csv"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.csv", "b.csv"], r"holds 2 label files \(a\.csv, b\.csv\); name the one to read"),
        (["notes.md"], r"no known format; it holds notes\.md"),
        ([], "it holds nothing"),
    ],
)
def test_unclear_folder_is_refused(tmp_path: Path, names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        recognise(touch(tmp_path, *names))


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no preset .* no such file or folder"):
        recognise(Location.of(tmp_path / "nowhere"))
