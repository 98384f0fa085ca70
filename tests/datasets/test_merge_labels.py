"""Labels of several names are joined as a file says, and wrong files are refused with their line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msrn_ray.datasets.merge_labels import none_notes, plan_merge, plan_none
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable
from tests.datasets.manifest_files import make, present, splits_of

NAMES = ("Person", "car", "cars", "cup", "person")
TARGETS = np.array([[1, 0, 0, 0, 0], [0, 0, 1, -1, 0], [-1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [-1, 0, -1, 0, 1]], np.int8)


def merged(path: Path, text: str) -> SampleTable:
    path.write_text(text, encoding="utf-8")
    ids = [f"{row}.jpg" for row in range(len(TARGETS))]
    return plan_merge(Location.of(path), NAMES).apply(
        SampleTable.from_columns(ids, ids, TARGETS, NAMES, "x", ("a note",))
    )


@pytest.mark.parametrize(
    "text", ["person\tPerson\ncar\tcars\n", "person,Person\r\n\r\ncar, cars", '"person","Person"\ncar\tcars']
)
def test_present_beats_unknown_beats_absent(tmp_path: Path, text: str) -> None:
    table = merged(tmp_path / "merge.txt", text)
    assert table.label_names == ("car", "cup", "person")
    assert table.targets.tolist() == [[0, 0, 1], [1, -1, 0], [1, 0, -1], [0, 1, 1], [-1, 0, 1]]
    assert table.table["image_id"].to_pylist() == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert (table.source, table.notes) == ("x", ("a note",))


def test_kept_name_may_be_new(tmp_path: Path) -> None:
    table = merged(tmp_path / "merge.txt", "vehicle,cars,car")
    assert table.label_names == ("Person", "vehicle", "cup", "person")
    assert table.targets[:, table.label_names.index("vehicle")].tolist() == [0, 1, 1, 0, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("car,cars\ncup,mug", r"merge\.txt, line 2: 'mug' is no label of the data set; its labels are"),
        ("car,carss", r"line 1: 'carss' is no label of the data set; its labels are 'cars', 'car'; correct"),
        ("car", r"line 1: 'car' stands alone and replaces no label; write one line per group"),
        ("car,cars\nvehicle,cars", "line 2: 'cars' is in line 1 already"),
        ("car,car", "line 1: 'car' is in line 1 already"),
        ("\n , \n", r"merge\.txt: is empty; write one line per group"),
    ],
)
def test_wrong_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merged(tmp_path / "merge.txt", text)


def test_setting_joins_labels_of_all_splits(tmp_path: Path) -> None:
    rows = ["image,labels,split", "a.jpg,car;cup,train", "b.jpg,cars,train", "c.jpg,Car,val", "d.jpg,cars;cup,test"]
    place = make(tmp_path, "\n".join(rows))
    (tmp_path / "merge.txt").write_text("car\tcars\tCar")
    splits = splits_of(place, merge_labels=str(tmp_path / "merge.txt"))
    assert splits.train.label_names == ("car", "cup")
    assert present(splits.train) == {"a.jpg": {"car", "cup"}, "b.jpg": {"car"}}
    assert present(splits.val) == {"c.jpg": {"car"}}
    assert splits.test is not None
    assert present(splits.test) == {"d.jpg": {"car", "cup"}}
    assert "merge.txt: 4 labels joined to 2 (car <- cars, Car)" in splits.notes


def test_missing_file_names_the_setting(tmp_path: Path) -> None:
    place = make(tmp_path, "image,labels\na.jpg,car\nb.jpg,cup")
    with pytest.raises(UserError, match=r"none\.txt: no such file; data\.merge_labels: write one line per group"):
        splits_of(place, merge_labels=str(tmp_path / "none.txt"))


def test_words_for_none_are_left_out() -> None:
    ids = [f"{row}.jpg" for row in range(len(TARGETS))]
    table = plan_none(("cars", "cup"), NAMES).apply(SampleTable.from_columns(ids, ids, TARGETS, NAMES, "x"))
    assert table.label_names == ("Person", "car", "person")
    assert table.targets.tolist() == TARGETS[:, [0, 1, 4]].tolist()
    with pytest.raises(UserError, match=r"'Cup' is none of the 5 labels; did you mean 'cup'\?"):
        plan_none(("Cup",), NAMES)
    with pytest.raises(UserError, match="names all labels"):
        plan_none(NAMES, NAMES)


def test_words_for_none_are_said() -> None:
    notes = none_notes(("No Finding", "nan", "healthy", "cup"))
    assert [note.split(" is a word")[0] for note in notes] == ["the label 'No Finding'", "the label 'nan'"]
    assert notes[0].endswith("give --data.none-values 'No Finding'")
