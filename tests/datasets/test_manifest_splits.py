"""The splits of a manifest, named in it or drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from tests.datasets.manifest_files import (
    ids,
    make,
    splits_of,
)


def hundred(folder: Path, splits: Sequence[str] = ()) -> Location:
    """Write 100 images, 50 dogs, 25 cats, 25 without a label, in turn in the splits."""
    lines = [
        f"s3://b/{row}.jpg,{('dog', 'cat', 'dog', '')[row % 4]}"
        + (f",{splits[row // 4 % len(splits)]}" if splits else "")
        for row in range(100)
    ]
    return make(folder, "\n".join(["image,labels" + (",split_name" if splits else ""), *lines]))


def test_missing_splits_are_drawn_by_seed(tmp_path: Path) -> None:
    place = hundred(tmp_path)
    splits = splits_of(place, test_fraction=0.2, val_fraction=0.25, keep_unlabelled_train=True)
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts if part is not None] == [60, 20, 20]
    assert sorted(image for part in parts for image in ids(part)) == sorted(f"s3://b/{row}.jpg" for row in range(100))
    assert splits.test is not None
    assert splits.test.targets.sum(0).tolist() == [5, 10], "a fifth of 25 cats and 50 dogs"
    assert splits.notes == (
        "labels.csv: 100 images, 2 labels (one label per row)",
        "no splits are named: test is drawn (data.test_fraction=0.2, data.split_seed=0)",
        "train: 80 images, 20 without a label kept",
        "test: 20 images, 5 without a label kept",
        "protocol honest: 20 of 80 train images are val (data.val_fraction=0.25), test of labels.csv is test",
    )
    again = splits_of(place, test_fraction=0.2, val_fraction=0.25, keep_unlabelled_train=True)
    assert ids(again.test) == ids(splits.test)
    assert ids(splits_of(place, test_fraction=0.2, split_seed=1).test) != ids(splits.test)
    none = splits_of(place, test_fraction=0, keep_unlabelled_train=True)
    assert none.test is None
    assert (len(none.train), len(none.val)) == (90, 10)
    assert any(note.startswith("there is no test split") for note in none.notes)
    with pytest.raises(UserError, match="there is no test split"):
        none.named("test")


def test_named_splits_are_kept(tmp_path: Path) -> None:
    splits = splits_of(hundred(tmp_path, ("TRAIN", " train", "dev", "test")))
    assert len(splits.named("train")) == 39, "13 of 52 have no label"
    assert (len(splits.named("val")), len(splits.named("test"))) == (24, 24)
    assert splits.notes == (
        "labels.csv: 100 images, 2 labels (one label per row)",
        "train: 39 of 52 images, 13 without a label dropped",
        "val: 24 images, 6 without a label kept",
        "test: 24 images, 6 without a label kept",
    )
    two = splits_of(hundred(tmp_path, ("train", "test")), keep_unlabelled_eval=False)
    assert len(two.named("train")) + len(two.named("val")) == 39
    assert len(two.named("test")) == 36
    config = ExperimentConfig().with_overrides(
        {"data.dataset": "manifest", "data.root": str(hundred(tmp_path, ("train", "val", "test"))), "protocol": "paper"}
    )
    paper = load_splits(config)
    assert (len(paper.train), ids(paper.val)[0], paper.test) == (27, "s3://b/8.jpg", None)
    assert paper.notes[-1].startswith("protocol paper: the best epoch is chosen on the test split (test of labels.csv)")


def test_unusable_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"labels\.csv: no image is in the split train; put the images to train on in it"
    ):
        splits_of(hundred(tmp_path, ("val", "test")))
    config = ExperimentConfig().with_overrides(
        {"data.dataset": "manifest", "data.root": str(hundred(tmp_path, ("train", "val"))), "protocol": "paper"}
    )
    with pytest.raises(UserError, match=r"there is no test split, which protocol=paper scores; use protocol=honest"):
        load_splits(config)
    everything = splits_of(hundred(tmp_path, ("train",)), keep_unlabelled_train=True)
    assert [len(everything.named(name)) for name in ("train", "val", "test")] == [81, 9, 10]


def test_too_few_images_for_val_are_refused(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,dog\nb.jpg,cat\nc.jpg,dog\n")
    with pytest.raises(
        UserError, match=r"data\.val_fraction=0\.1 of its 3 train images is no image; add images, raise"
    ):
        splits_of(place)
    assert len(splits_of(place, val_fraction=0.4).val) == 1


def test_root_is_required() -> None:
    with pytest.raises(UserError, match=r"data\.root is needed: the file of the manifest \(--data\.root FILE\)"):
        load_splits(ExperimentConfig().with_overrides({"data.dataset": "manifest"}))


def test_too_few_images_for_test_are_refused(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,dog\n")
    with pytest.raises(UserError, match=r"data\.test_fraction=0\.9 of 1 images leaves none to train on"):
        splits_of(place, test_fraction=0.9)
