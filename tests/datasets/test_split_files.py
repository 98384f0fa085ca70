"""Splits of a manifest in other files beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.registry import PublishedSplits, read_published
from msrn_ray.errors import UserError


def save(folder: Path, files: dict[str, str]) -> Path:
    """Write files and the images that they name."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        for line in text.splitlines():
            image = path.parent / line.split(",")[0]
            if image.suffix == ".jpg":
                image.touch()
    return folder


def read(root: Path) -> PublishedSplits:
    return read_published(DataSettings(dataset="manifest", root=str(root), test_fraction=0.5))


def images_of(published: PublishedSplits) -> dict[str, list[str]]:
    return {
        name: [Path(uri).name for uri in table.table["uri"].to_pylist()] for name, table in published.tables.items()
    }


HEAD = "image,labels\n"


def test_manifests_beside_train_are_its_other_splits(tmp_path: Path) -> None:
    files = {
        "labels_train.csv": HEAD + "a.jpg,dog\n",
        "labels_valid.csv": HEAD + "b.jpg,cat\n",
        "labels_test.csv": HEAD + "c.jpg,dog\n",
    }
    published = read(save(tmp_path, files) / "labels_train.csv")
    assert images_of(published) == {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    assert [table.label_names for table in published.tables.values()] == [("cat", "dog")] * 3
    assert published.train.targets.tolist() == [[0, 1]]
    assert published.tables["val"].targets.tolist() == [[1, 0]]


def test_folders_of_splits_hold_a_manifest_each(tmp_path: Path) -> None:
    files = {f"{split}/_classes.csv": f"filename, dog, cat\n{split}.jpg,1,0\n" for split in ("train", "valid", "test")}
    published = read(save(tmp_path, files) / "train" / "_classes.csv")
    assert images_of(published) == {"train": ["train.jpg"], "val": ["valid.jpg"], "test": ["test.jpg"]}


def test_test_file_without_labels_is_said(tmp_path: Path) -> None:
    files = {"train.csv": HEAD + "a.jpg,dog\nb.jpg,cat\n", "test.csv": "image\nc.jpg\n"}
    published = read(save(tmp_path, files) / "train.csv")
    assert sorted(images_of(published)["train"] + images_of(published)["test"]) == ["a.jpg", "b.jpg"]
    assert any(
        "test.csv: not read as test, for it lacks the columns 'labels'" in note for note in published.train.notes
    )


def test_image_in_two_split_files_is_refused(tmp_path: Path) -> None:
    files = {"train.csv": HEAD + "a.jpg,dog\nb.jpg,cat\n", "test.csv": HEAD + "b.jpg,cat\n"}
    with pytest.raises(UserError, match=r"test\.csv: 1 of its images are in train\.csv too \(.*b\.jpg\)"):
        read(save(tmp_path, files) / "train.csv")


def test_column_of_splits_wins_over_files(tmp_path: Path) -> None:
    head = "image,labels,split\n"
    files = {"train.csv": head + "a.jpg,dog,train\nb.jpg,cat,test\n", "test.csv": head + "c.jpg,cat,test\n"}
    published = read(save(tmp_path, files) / "train.csv")
    assert images_of(published) == {"train": ["a.jpg"], "test": ["b.jpg"]}
    assert any("test.csv: not read, for train.csv has a column of splits" in note for note in published.train.notes)


def test_file_called_test_is_said(tmp_path: Path) -> None:
    published = read(save(tmp_path, {"test.csv": HEAD + "a.jpg,dog\nb.jpg,cat\n"}) / "test.csv")
    assert "test.csv: is called after test, and is read as images to train on" in published.train.notes


def test_lists_of_names_give_the_splits(tmp_path: Path) -> None:
    files = {
        "data.csv": HEAD + "a.jpg,dog\nb.jpg,cat\nc.jpg,dog\n",
        "train_val_list.txt": "a.jpg\nc.jpg\n",
        "test_list.txt": "b.jpg\n",
    }
    root = save(tmp_path, files) / "data.csv"
    published = read(root)
    assert images_of(published) == {"train": ["a.jpg", "c.jpg"], "test": ["b.jpg"]}
    assert "data.csv: the splits are those of test_list.txt, train_val_list.txt" in published.train.notes
    save(tmp_path, {"train_val_list.txt": "a.jpg\n"})
    assert any("they name 2 of 3 images" in note for note in read(root).train.notes)
    save(tmp_path, {"train_val_list.txt": "a.jpg\nb.jpg\nc.jpg\n"})
    assert any("not used as splits, for 'b.jpg' is in two" in note for note in read(root).train.notes)
