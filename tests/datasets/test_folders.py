"""Folders of images, one per label, with and without folders of splits around them."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.apparel import read_apparel
from msrn_ray.datasets.folders import read_folders
from msrn_ray.datasets.protocol import Splits, load_splits
from msrn_ray.errors import UserError
from msrn_ray.inference.predict_files import expand_images
from msrn_ray.io.storage import Location


def fill(root: Path, *files: str) -> Location:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return Location.of(root)


def splits_of(root: Location, **data: object) -> Splits:
    overrides = {"data.dataset": "folders", "data.root": str(root)}
    return load_splits(ExperimentConfig().with_overrides(overrides | {f"data.{key}": data[key] for key in data}))


def test_each_folder_is_a_label(tmp_path: Path) -> None:
    root = fill(
        tmp_path, "dog/b.jpg", "dog/a.PNG", "cat/a.jpg", "traffic light/more/inside/ü c.webp", "cat/.hidden.jpg"
    )
    samples, split = read_folders(root)
    assert split is None
    assert samples.label_names == ("cat", "dog", "traffic light")
    ids = ["cat/a.jpg", "dog/a.PNG", "dog/b.jpg", "traffic light/more/inside/ü c.webp"]
    assert samples.table["image_id"].to_pylist() == ids
    assert samples.table["uri"].to_pylist() == [f"{tmp_path}/{image}" for image in ids]
    assert samples.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert samples.notes == (f"{tmp_path.name}: 4 images, 3 labels (one folder per label)",)


def test_folders_of_splits(tmp_path: Path) -> None:
    files = [f"{split}/{label}/{n}.jpg" for split in ("train", "valid", "Test") for label in "ab" for n in range(3)]
    root = fill(tmp_path, *files, "train/c/only.jpg")
    samples, split = read_folders(root)
    assert split is not None
    assert samples.label_names == ("a", "b", "c")
    assert split.tolist() == [0] * 7 + [1] * 6 + [2] * 6
    splits = splits_of(root)
    for name, folder in (("train", "train"), ("val", "valid"), ("test", "Test")):
        table = splits.named(name)
        assert all(image.startswith(f"{folder}/") for image in table.table["image_id"].to_pylist())
        assert table.targets.sum(0).tolist() == [3, 3, int(name == "train")]
    assert splits.notes == (
        f"{tmp_path.name}: 19 images, 3 labels (one folder per label)",
        "train: 7 of 7 images, 0 without a label dropped",
        "val: 6 images, 0 without a label kept",
        "test: 6 images, 0 without a label kept",
    )


def test_a_label_may_be_called_train(tmp_path: Path) -> None:
    samples, split = read_folders(fill(tmp_path, "train/a.jpg", "bus/b.jpg"))
    assert samples.label_names == ("bus", "train")
    assert split is None


def test_missing_splits_are_drawn_by_seed(shared: Path) -> None:
    root = Location.of(shared / "data/apparel_mini")
    splits = splits_of(root, test_fraction=0.2)
    sizes = [len(splits.named(name)) for name in ("train", "val", "test")]
    assert sizes == [375, 42, 104]
    images = [image for name in ("train", "val", "test") for image in splits.named(name).table["image_id"].to_pylist()]
    assert sorted(images) == read_apparel(Location.of(shared / "data/apparel_mini")).table["image_id"].to_pylist()


def test_behind_a_uri(tmp_path: Path) -> None:
    for name in ("dog/a.jpg", "cat/b c.jpg"):
        with fsspec.open(f"memory://{tmp_path.name}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"x")
    samples, _ = read_folders(Location.of(f"memory://{tmp_path.name}"))
    assert samples.table["uri"].to_pylist() == [
        f"memory://{tmp_path.name}/{name}" for name in ("cat/b c.jpg", "dog/a.jpg")
    ]


def test_labels_from_a_file(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", "dog/a.jpg", "cat/b.jpg")
    (tmp_path / "names.txt").write_text("horse\ndog\ncat\n")
    train = splits_of(root, labels=str(tmp_path / "names.txt"), test_fraction=0, val_fraction=0.5).train
    assert train.label_names == ("horse", "dog", "cat")
    (tmp_path / "names.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"folder 'cat' is not among the labels of data\.labels; rename it or add it"):
        splits_of(root, labels=str(tmp_path / "names.txt"))


def test_notes_count_what_is_left_out(tmp_path: Path) -> None:
    root = fill(tmp_path, "dog/a.jpg", "dog/Thumbs.db", "cat/b.jpg", "stray.jpg", "readme.txt", "notes/list.txt")
    samples, _ = read_folders(root)
    assert len(samples) == 2
    assert samples.notes[1] == f"{tmp_path.name}: 1 images left out that are in no label's folder"
    assert samples.notes[2] == "notes: no image in this folder"
    assert samples.notes[3].startswith(f"{tmp_path.name}: 2 files skipped that are not images (.jpg")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), r"holds no folder of images; give the folder that holds folders named after labels \(dog/, cat/\)"),
        (("a.jpg",), r"holds no folder of images; give"),
        (("dog/a.jpg",), r"holds one folder of images only \(dog/\); give"),
        (("images/dog/a.jpg", "images/cat/b.jpg"), r"holds one folder of images only \(images/\).*\(did you mean .*/images\?\)"),
        (("train/a.jpg", "val/b.jpg"), r"holds no folder of images; give .* or folders train/, val/, test/ around them"),
        (("train/dog/a.jpg", "val/dog/b.jpg", "old/c.jpg"), r"holds train/, val/ beside old/, so it is not clear .*; keep only"),
        (("val/dog/a.jpg", "test/cat/b.jpg"), r"no image is in the split train; put"),
    ],
)  # fmt: skip
def test_other_layouts_are_refused(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        splits_of(fill(tmp_path, *files))
    assert tmp_path.name in str(error.value)


def test_training_and_predict_find_the_same_files(tmp_path: Path) -> None:
    root = fill(tmp_path, *(f"{label}/one{suffix}" for label in ("cat", "dog") for suffix in (".tif", ".TIFF", ".txt")))
    read = read_folders(root).samples.table["uri"].to_pylist()
    assert read == expand_images([str(tmp_path)])
    assert len(read) == 4


def test_folder_of_one_label_suggests_its_parent(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", "cat/a.jpg", "dog/b.jpg")
    with pytest.raises(UserError, match=rf"holds no folder of images; give .*\(did you mean {tmp_path}/set\?\)$"):
        read_folders(root / "cat")


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; give the folder that holds folders named"):
        read_folders(Location.of(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data\.root is needed: the folder that holds one folder per label"):
        load_splits(ExperimentConfig().with_overrides({"data.dataset": "folders"}))


@settings(max_examples=40, deadline=None)  # writing files is slow
@given(
    st.dictionaries(
        st.text("abcü _", min_size=1, max_size=5).filter(lambda name: name == name.strip()),
        st.sets(st.integers(0, 9), min_size=1),
        min_size=2,
        max_size=5,
    )
)
def test_written_folders_are_read_back(images: dict[str, set[int]]) -> None:
    with TemporaryDirectory() as folder:
        samples, _ = read_folders(fill(Path(folder), *(f"{label}/{n}.jpg" for label in images for n in images[label])))
    labels = sorted(images)
    assert samples.label_names == tuple(labels)
    assert samples.table["image_id"].to_pylist() == [
        f"{label}/{n}.jpg" for label in labels for n in sorted(images[label])
    ]
    np.testing.assert_array_equal(
        samples.targets, np.repeat(np.eye(len(labels)), [len(images[label]) for label in labels], 0)
    )


def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", "dog/a.jpg", "cat/b.jpg")
    fill(tmp_path / "elsewhere", "c.jpg", "deep/d.jpg")
    (tmp_path / "set/dog/loop").symlink_to(tmp_path / "set/dog")
    (tmp_path / "set/dog/up").symlink_to("..")
    (tmp_path / "set/cat/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cat/gone").symlink_to(tmp_path / "nothing")
    samples, _ = read_folders(root)
    ids = samples.table["image_id"].to_pylist()
    assert [image_id for image_id in ids if image_id.startswith("cat")] == [
        "cat/b.jpg",
        "cat/more/c.jpg",
        "cat/more/deep/d.jpg",
    ]
    assert not [image_id for image_id in ids if "loop" in image_id]
    assert len(ids) < 10


def test_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path, "dog/a.jpg", "cat/b.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path / "dog") + b"/\xff.jpg")).touch()
    with pytest.raises(UserError, match=r"'dog/\\udcff\.jpg': the name is not UTF-8; rename the file"):
        read_folders(root)


def test_combined_folder_names_are_split(tmp_path: Path) -> None:
    root = fill(tmp_path, "car+person/a.jpg", "car/b.jpg", "person/c.jpg", "person+dog/d.jpg")
    samples, _ = read_folders(root)
    assert samples.label_names == ("car", "dog", "person")
    assert samples.targets.tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 1, 1]]
    assert "2 folders have several labels" in samples.notes[1]


def test_plus_without_recurring_parts_is_kept(tmp_path: Path) -> None:
    samples, _ = read_folders(fill(tmp_path, "salt+pepper/a.jpg", "C++/b.jpg", "dog/c.jpg"))
    assert samples.label_names == ("C++", "dog", "salt+pepper")
    assert "2 folders with '+' in the name are one label each" in samples.notes[1]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (("images/a.jpg", "masks/a.png"), "images and their annotations"),
        (("train/images/a.jpg", "train/labels/a.txt", "data.yaml"), "are a YOLO data set"),
    ],
)
def test_folders_of_other_layouts_are_refused(tmp_path: Path, files: tuple[str, ...], match: str) -> None:
    with pytest.raises(UserError, match=match):
        read_folders(fill(tmp_path, *files))


def test_copies_in_label_folders_join_their_labels(tmp_path: Path) -> None:
    contents = {"car/a.jpg": b"both", "person/b.jpg": b"both", "person/c.jpg": b"else", "person/d.jpg": b"both"}
    root = fill(tmp_path, *contents)
    for path, content in contents.items():
        (tmp_path / path).write_bytes(content)
    samples, _ = read_folders(root)
    assert samples.table["image_id"].to_pylist() == ["car/a.jpg", "person/c.jpg"]
    assert samples.targets.tolist() == [[1, 1], [0, 1]]
    assert "2 copies are left out" in samples.notes[1]


def test_copies_in_two_splits_are_kept(tmp_path: Path) -> None:
    files = ("train/car/a.jpg", "test/person/a.jpg", "train/person/b.jpg")
    root = fill(tmp_path, *files)
    for path in files[:2]:
        (tmp_path / path).write_bytes(b"same")
    samples, _ = read_folders(root)
    assert len(samples) == 3
