"""The splits under each protocol."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import fingerprint, load_splits
from msrn_ray.datasets.registry import default_scenes_root
from msrn_ray.errors import UserError
from msrn_ray.types import SampleTable
from tests.tiny import make_coco, make_photo

TRAIN = [[0], [0, 1], [1], [0, 1], [2], [], [0], [0, 2], [1], [0]] * 4  # 40 images, 4 without a label


HELD_OUT = [[2], [1, 2], [], [0]]


THIRD = [[0, 1, 2], [2]]


def config(root: Path | None, **overrides: object) -> ExperimentConfig:
    base = {"data.dataset": "coco", "data.root": None if root is None else str(root), "model.pretrained": None}
    return ExperimentConfig().with_overrides(base | {key.replace("__", "."): value for key, value in overrides.items()})


def ids(table: SampleTable | None) -> list[str]:
    assert table is not None
    column: list[str] = table.table["image_id"].to_pylist()
    return column


@pytest.fixture
def two_splits(tmp_path: Path) -> Path:
    """A data set with the splits that COCO publishes."""
    return make_coco(tmp_path / "two", {"train": TRAIN, "val": HELD_OUT})


@pytest.fixture
def three_splits(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "three", {"train": TRAIN, "val": HELD_OUT, "test": THIRD})


def test_honest_with_two_published_splits(two_splits: Path) -> None:
    splits = load_splits(config(two_splits, data__val_fraction=0.25))
    labelled = [str(1000 + row) for row, labels in enumerate(TRAIN) if labels]
    assert len(splits.train) == 27
    assert len(splits.val) == 9, "round(0.25 * 36)"
    assert sorted(ids(splits.train) + ids(splits.val)) == labelled, "each train image once, in one of the two"
    assert ids(splits.test) == ["2000", "2001", "2002", "2003"]
    assert (splits.val.targets == 1).sum(0).tolist() == [6, 4, 2], "a quarter of 24, 16 and 8"
    assert any("9 of 36 train images are val (data.val_fraction=0.25)" in note for note in splits.notes)
    assert any("instances_val2014.json is test" in note for note in splits.notes)
    for table in (splits.train, splits.val):  # rows keep their image and labels
        for image, uri, target in zip(
            *(table.table[name].to_pylist() for name in table.table.column_names), strict=True
        ):
            row = int(image) - 1000
            assert uri == str(two_splits / f"train2014/train_{row:03}.jpg")
            assert [label for label in range(3) if target[label] == 1] == TRAIN[row]


def test_unlabelled_images_are_kept_on_request(two_splits: Path) -> None:
    splits = load_splits(config(two_splits, data__keep_unlabelled_train=True, data__keep_unlabelled_eval=False))
    assert len(splits.train) + len(splits.val) == 40
    assert ids(splits.test) == ["2000", "2001", "2003"]
    paper = load_splits(config(two_splits, protocol="paper"))
    assert (len(paper.train), len(paper.val)) == (36, 4)


def test_the_seed_decides_the_split(two_splits: Path) -> None:
    first, again = load_splits(config(two_splits)), load_splits(config(two_splits))
    assert ids(first.val) == ids(again.val)
    assert ids(first.train) == ids(again.train)
    other = load_splits(config(two_splits, data__split_seed=1))
    assert ids(first.val) != ids(other.val)
    assert len(first.val) == len(other.val)
    assert ids(first.test) == ids(other.test)


def test_honest_with_three_published_splits(three_splits: Path) -> None:
    splits = load_splits(config(three_splits))
    assert len(splits.train) == 36
    assert ids(splits.val) == ["2000", "2001", "2002", "2003"]
    assert ids(splits.test) == ["3000", "3001"]
    assert [splits.named(name) for name in ("train", "val", "test")] == [splits.train, splits.val, splits.test]


def test_paper_protocol_chooses_on_the_test_split(two_splits: Path, three_splits: Path) -> None:
    splits = load_splits(config(two_splits, protocol="paper"))
    assert len(splits.train) == 36, "all train images are trained on"
    assert ids(splits.val) == ["2000", "2001", "2002", "2003"]
    assert splits.test is None
    assert any("chosen on the test split (instances_val2014.json)" in note for note in splits.notes)
    with pytest.raises(UserError, match="protocol=paper val is the published test split"):
        splits.named("test")
    splits = load_splits(config(three_splits, protocol="paper"))
    assert ids(splits.val) == ["3000", "3001"]
    assert splits.test is None


@pytest.mark.parametrize("empty", ["train", "val", "test"])
def test_a_split_without_any_label_is_refused(tmp_path: Path, empty: str) -> None:
    rows = {"train": TRAIN, "val": HELD_OUT, "test": THIRD} | {empty: [[], []]}
    make_coco(tmp_path / "set", rows)
    with pytest.raises(UserError, match=rf"{empty} split .*instances_{empty}2014\.json.*no image has a label"):
        load_splits(config(tmp_path / "set", data__keep_unlabelled_train=True))


@pytest.mark.parametrize("dataset", ["coco", "voc", "nuswide", "apparel"])
def test_a_benchmark_needs_its_folder(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match=rf"data\.root is needed: the folder of the {dataset} data set"):
        load_splits(config(None, data__dataset=dataset))
    with pytest.raises(UserError, match="nowhere"):
        load_splits(config(tmp_path / "nowhere", data__dataset=dataset))


def test_scenes_are_stored_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_scenes_root() == tmp_path / "cache" / "msrn_ray" / "scenes"
    for unset in ("", None):
        monkeypatch.delenv("XDG_CACHE_HOME") if unset is None else monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_scenes_root() == tmp_path / ".cache" / "msrn_ray" / "scenes"
    assert list(tmp_path.iterdir()) == []


def table(targets: npt.ArrayLike, names: tuple[str, ...] = ("a", "b"), uri: str = "/x", first: int = 0) -> SampleTable:
    values = np.array(targets, np.int8)
    numbers = range(first, first + len(values))
    return SampleTable.from_columns([str(n) for n in numbers], [f"{uri}/{n}.jpg" for n in numbers], values, names, "s")


def test_fingerprint_ignores_the_location() -> None:
    original = fingerprint(table([[1, 0], [0, -1]]))
    assert original == fingerprint(table([[1, 0], [0, -1]], uri="s3://elsewhere"))
    assert len(original) == 64
    others = [
        table([[1, 0], [0, 0]]),
        table([[1, 0], [0, 1]]),
        table([[0, -1], [1, 0]]),
        table([[1, 0]]),
        table([[1, 0], [0, -1]], names=("a", "c")),
        table([[1, 0], [0, -1]], names=("b", "a")),
        table([[1, 0], [0, -1]], first=1),
    ]
    prints = {original, *map(fingerprint, others)}
    assert len(prints) == len(others) + 1
    assert fingerprint(table([[1, 0], [0, -1]]).take(np.array([1, 0]))) not in prints


def test_apparel_is_split_by_seed(shared: Path) -> None:
    options = {"data__dataset": "apparel", "data__val_fraction": 0.2}
    splits = load_splits(config(shared / "data/apparel_mini", **options))
    sizes = [len(part) for part in (splits.train, splits.val, splits.test) if part is not None]
    assert sizes == [313, 78, 130], "a quarter of 521 is test, a fifth of the rest val"
    every = ids(splits.train) + ids(splits.val) + ids(splits.test)
    assert len(set(every)) == 521
    assert any("130 images by seed 0 is test" in note for note in splits.notes)
    for part in (splits.train, splits.val, splits.test):
        assert part is not None
        assert (part.targets == 1).sum(1).tolist() == [2] * len(part)
    other = load_splits(config(shared / "data/apparel_mini", data__split_seed=1, **options))
    assert set(ids(other.test)) != set(ids(splits.test)), "a seed for the whole split"
    paper = load_splits(config(shared / "data/apparel_mini", protocol="paper", **options))
    assert (len(paper.train), len(paper.val)) == (391, 130)


def test_voc_difficult_objects_follow_the_policy(shared: Path) -> None:
    root = shared / "data/voc_mini"
    splits = load_splits(config(root, data__dataset="voc", protocol="paper"))
    assert (len(splits.train), len(splits.val), splits.test) == (137, 87, None)
    unknown = (splits.train.targets == -1).sum()
    assert unknown > 0
    positive = load_splits(config(root, data__dataset="voc", protocol="paper", data__voc_difficult="positive"))
    assert (positive.train.targets == 1).sum() - (splits.train.targets == 1).sum() == unknown
    negative = load_splits(config(root, data__dataset="voc", protocol="paper", data__voc_difficult="negative"))
    assert (negative.train.targets == 1).sum() == (splits.train.targets == 1).sum()
    assert (negative.train.targets == -1).sum() == 0
    honest = load_splits(config(root, data__dataset="voc"))
    assert [len(part) for part in (honest.train, honest.val, honest.test) if part is not None] == [123, 14, 87]


def test_voc_reference_policy_differs_between_splits(shared: Path) -> None:
    root = shared / "data/voc_mini"
    reference = load_splits(config(root, data__dataset="voc", protocol="paper", data__voc_difficult="reference"))
    positive = load_splits(config(root, data__dataset="voc", protocol="paper", data__voc_difficult="positive"))
    ignore = load_splits(config(root, data__dataset="voc", protocol="paper"))
    np.testing.assert_array_equal(reference.train.targets, positive.train.targets)
    np.testing.assert_array_equal(reference.val.targets, ignore.val.targets)


def test_voc2012_holds_val_out(shared: Path, tmp_path: Path) -> None:
    base = shutil.copytree(shared / "data/voc_mini/VOCdevkit/VOC2007", tmp_path / "VOC2012")
    for path in (base / "ImageSets/Main").glob("*_test.txt"):
        path.unlink()
    splits = load_splits(config(tmp_path, data__dataset="voc", protocol="paper"))
    assert (splits.train.source, splits.val.source) == ("VOC2012 train", "VOC2012 val")
    assert (len(splits.train), len(splits.val)) == (69, 68)


def test_crowds_are_left_out_on_request(two_splits: Path) -> None:
    path = two_splits / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    with_crowds, without = (
        load_splits(config(two_splits, data__crowd=crowd, protocol="paper")) for crowd in (True, False)
    )
    assert np.argwhere(with_crowds.val.targets != without.val.targets).tolist() == [[0, 2]]


def test_years_are_not_mixed(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "set", {"train": TRAIN, "val": HELD_OUT})
    for path in (root / "annotations/instances_train2014.json", root / "train2014"):
        path.rename(path.with_name(path.name.replace("2014", "2017")))
    with pytest.raises(UserError, match=r"looked for annotations/instances_val2017\.json, found only annotations, "):
        load_splits(config(root))
    with pytest.raises(UserError, match=r"looked for annotations/instances_train2014\.json"):
        load_splits(config(root, data__year=2014))
    for path in (root / "annotations/instances_val2014.json", root / "val2014"):
        path.rename(path.with_name(path.name.replace("2014", "2017")))
    assert load_splits(config(root)).train.source == "instances_train2017.json"


def test_splits_with_different_labels_are_refused(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "set", {"train": TRAIN})
    make_coco(tmp_path / "other", {"val": HELD_OUT}, ("apple", "bench", "dog"))
    shutil.copytree(tmp_path / "other", root, dirs_exist_ok=True)
    with pytest.raises(
        UserError,
        match=r"instances_val2014\.json\): its labels differ from those of train .*: only one of them has cat, dog;",
    ):
        load_splits(config(root, protocol="paper"))


def test_scenes_are_generated_on_this_machine() -> None:
    with pytest.raises(
        UserError, match=r"data\.root memory://bucket/scenes: scenes are generated into a folder on this machine"
    ):
        load_splits(config(None, data__dataset="scenes", data__root="memory://bucket/scenes"))


def test_apparel_test_fraction_can_be_set(shared: Path) -> None:
    options = {"data__dataset": "apparel", "data__apparel_test_fraction": 0.5, "protocol": "paper"}
    splits = load_splits(config(shared / "data/apparel_mini", **options))
    assert (len(splits.train), len(splits.val)) == (261, 260)


def test_apparel_single_labels_can_be_set(tmp_path: Path) -> None:
    for folder in ("hat", "red_dress"):
        for number in range(8):
            make_photo(tmp_path / folder / f"{number}.jpg", number)
    options = {"data__dataset": "apparel", "protocol": "paper"}
    assert load_splits(config(tmp_path, **options)).train.label_names[:2] == ("black", "blue")
    splits = load_splits(config(tmp_path, data__apparel_single_labels=True, **options))
    assert splits.train.label_names == ("dress", "hat", "red")
    assert len(splits.train) + len(splits.val) == 16


def test_nuswide_and_its_unlabelled_images(shared: Path) -> None:
    root = shared / "data/nuswide_mini"
    splits = load_splits(config(root, data__dataset="nuswide", protocol="paper"))
    assert (len(splits.train), len(splits.val)) == (178 - 29, 114)
    assert (splits.train.targets == 1).any(1).all()
    options = {"data__keep_unlabelled_train": True, "data__keep_unlabelled_eval": False}
    kept = load_splits(config(root, data__dataset="nuswide", protocol="paper", **options))
    assert (len(kept.train), len(kept.val)) == (178, 114 - 13)


def test_nuswide_notes_count_unlabelled_images(shared: Path) -> None:
    notes = load_splits(config(shared / "data/nuswide_mini", data__dataset="nuswide")).notes
    assert "Train: 149 of 178 images, 29 without a label dropped" in notes
    assert "Test: 114 images, 13 without a label kept" in notes


def test_fingerprint_ignores_the_chunks_of_a_table() -> None:
    ids = [f"image {row}" for row in range(70_000)]
    targets = np.ones((len(ids), 1), np.int8)
    whole = SampleTable.from_columns(ids, ids, targets, ("dog",), "x")
    parts = pa.chunked_array([ids[:3], [], ids[3:]], pa.string())
    known = hashlib.sha256(b"dog" + "\n".join(ids).encode() + targets.tobytes()).hexdigest()
    assert fingerprint(whole) == fingerprint(SampleTable.from_columns(parts, parts, targets, ("dog",), "x")) == known
