"""A group of images, such as those of one patient, is never in two splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msrn_ray.config import ExperimentConfig
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.manifest import NamedColumns, read_manifest
from msrn_ray.datasets.protocol import Splits, load_splits
from msrn_ray.datasets.registry import read_published
from msrn_ray.datasets.stratify import grouped_split
from msrn_ray.errors import UserError
from tests.datasets.container_files import save_to_disk
from tests.datasets.manifest_files import make, splits_of
from tests.tiny import make_photo

TARGETS = hnp.arrays(np.int8, st.tuples(st.integers(0, 40), st.integers(1, 6)), elements=st.sampled_from([1, 0, 0, -1]))


def names_of(codes: npt.NDArray[Any]) -> pa.ChunkedArray:
    return pa.chunked_array([[f"p{code}" for code in codes]], pa.string())


@given(TARGETS, st.integers(1, 12), st.floats(0.01, 0.99), st.integers(0, 99))
def test_grouped_split_is_a_reproducible_partition(
    targets: npt.NDArray[np.int8], num_groups: int, fraction: float, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, num_groups, len(targets))
    rest, part = grouped_split(targets, names_of(codes), fraction, seed)
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(targets)))
    assert not {*codes[rest]} & {*codes[part]}
    assert len(part) or len({*codes}) < 2
    again = grouped_split(targets, names_of(codes), fraction, seed)
    np.testing.assert_array_equal(part, again[1])
    assert (np.diff(part) > 0).all()


def test_labels_keep_their_shares_over_groups() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 600, 6000)
    likely = rng.random((600, 12)) * np.geomspace(0.6, 0.01, 12)  # images of a group have similar labels
    targets = (rng.random((6000, 12)) < likely[codes]).astype(np.int8)
    _, part = grouped_split(targets, names_of(codes), 0.2, 0)
    assert abs(len(part) - 1200) <= 10
    share = targets[part].sum(0) / targets.sum(0)
    assert share.min() > 0.15
    assert share.max() < 0.25


def test_groups_of_one_image_give_the_exact_size() -> None:
    targets = (np.random.default_rng(0).random((1000, 5)) < 0.2).astype(np.int8)
    _, part = grouped_split(targets, names_of(np.arange(1000)), 0.15, 0)
    assert len(part) == 150
    assert abs(targets[part].sum(0) / targets.sum(0) - 0.15).max() < 0.03


def test_one_large_group_stays_in_train() -> None:
    codes = np.array([0] * 500 + [*range(1, 501)])
    _, part = grouped_split(np.ones((1000, 1), np.int8), names_of(codes), 0.1, 0)
    assert len(part) == 100
    assert (part >= 500).all()


def patients_of(splits: Splits) -> dict[str, set[str]]:
    found = {}
    for name, table in splits.tables.items():
        assert table.groups is not None
        found[name] = set(table.groups.to_pylist())
    return found


def write_patients(folder: Path, form: str) -> Path:
    """Write 60 rows of 20 patients, with a column of lists or a column per label."""
    lines = ["image,labels,patient_id" if form == "lists" else "image,cat,dog,patient_id"]
    for row in range(60):
        labels = "cat;dog" if form == "lists" else "1,0"
        lines.append(f"{row}.jpg,{labels if row % 2 else 'dog' if form == 'lists' else '0,1'},{row * 7 % 20}")
    return Path(str(make(folder, "\n".join(lines), images=[f"{row}" for row in range(60)])))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["lists", "columns"])
def test_test_and_val_are_drawn_by_group(tmp_path: Path, form: str) -> None:
    splits = splits_of(write_patients(tmp_path, form), group_column="patient_id", test_fraction=0.2, val_fraction=0.25)
    assert splits.train.label_names == ("cat", "dog")
    patients = patients_of(splits)
    assert [len(patients[name]) for name in ("train", "val", "test")] == [12, 4, 4]
    assert len(set.union(*patients.values())) == 20
    assert any("12 of 60 images in whole groups of 'patient_id'" in note for note in splits.notes)
    assert any(note.endswith("no group is in two splits") for note in splits.notes)
    again = splits_of(tmp_path / "labels.csv", group_column="patient_id", test_fraction=0.2, val_fraction=0.25)
    assert patients_of(again) == patients


def test_named_splits_that_cut_a_group_are_refused(tmp_path: Path) -> None:
    rows = [
        "image,labels,split,patient",
        "a.jpg,cat,train,p1",
        "b.jpg,dog,train,p2",
        "c.jpg,cat,test,p2 ",
        "d.jpg,dog,val,p3",
    ]
    place = make(tmp_path, "\n".join(rows))
    with pytest.raises(UserError) as error:
        splits_of(place, group_column="patient")
    assert "the group 'p2' is in the splits train (image 'b.jpg') and test (image 'c.jpg')" in str(error.value)
    assert "groups in several splits: 1" in str(error.value)
    (tmp_path / "labels.csv").write_text("\n".join(rows).replace("p2 ", "p4"))
    assert patients_of(splits_of(place, group_column="patient")) == {
        "train": {"p1", "p2"},
        "val": {"p3"},
        "test": {"p4"},
    }


def test_val_of_named_train_is_drawn_by_group(tmp_path: Path) -> None:
    rows = ["image,labels,split,patient"]
    rows += [
        f"{name}.jpg,cat;dog,{'test' if name == 'd' else 'train'},p{number // 2}" for number, name in enumerate("abcd")
    ]
    rows[4] = rows[4].replace("p1", "p9")
    splits = splits_of(make(tmp_path, "\n".join(rows)), group_column="patient", val_fraction=0.4)
    assert patients_of(splits) == {"train": {"p0"}, "val": {"p1"}, "test": {"p9"}}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("person", r"there is no column 'person' \(data\.group_column\)"),
        ("patient", "row 2: column 'patient' is empty"),
    ],
)
def test_missing_groups_are_refused(tmp_path: Path, column: str, message: str) -> None:
    place = make(tmp_path, "image,labels,patient\na.jpg,cat,p1\nb.jpg,dog, ")
    with pytest.raises(UserError, match=message):
        read_manifest(place, named=NamedColumns(group=column))


def test_a_single_group_cannot_be_split(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels,patient\na.jpg,cat,p1\nb.jpg,dog,p1\nc.jpg,dog,p1\nd.jpg,dog,p1")
    with pytest.raises(UserError, match=r"is no whole group: all are in one group of data\.group_column"):
        splits_of(place, group_column="patient", test_fraction=0.5, val_fraction=0.5)


def test_reader_without_groups_is_refused(shared: Path) -> None:
    settings = DataSettings(dataset="coco", root=str(shared / "data/coco_mini"), group_column="patient")
    with pytest.raises(UserError, match=r"data\.group_column 'patient': .* was read without groups"):
        read_published(settings)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_huggingface_columns_hold_groups(tmp_path: Path, form: str) -> None:
    photo = make_photo(tmp_path / "a.jpg").read_bytes()
    root = tmp_path / "set"
    columns = {
        "image": pa.array([{"bytes": photo, "path": None}] * 40),
        "labels": [["cat"], ["dog"]] * 20,
        "patient": pa.array([row // 4 for row in range(40)]),
    }
    if form == "arrow":
        save_to_disk(root, pa.table(columns))
    else:
        root.mkdir()
        pq.write_table(pa.table(columns), root / "data.parquet", row_group_size=7)
    settings = {"data.dataset": "huggingface", "data.root": str(root), "data.test_fraction": 0.2}
    config = ExperimentConfig().with_overrides(settings)
    splits = load_splits(config.with_overrides({"data.group_column": "patient"}))
    patients = patients_of(splits)
    assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == 10
    assert len(splits.train) + len(splits.val) + 8 == 40
    with pytest.raises(UserError, match=r"no column 'person' \(data\.group_column\); name one of"):
        load_splits(config.with_overrides({"data.group_column": "person"}))
