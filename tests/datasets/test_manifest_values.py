"""What the cells of a manifest mean: values of label columns, flags by position, lists in text, separators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msrn_ray.datasets.label_values import ValueMeaning
from msrn_ray.datasets.list_texts import parse_list_text
from msrn_ray.datasets.manifest import read_manifest
from msrn_ray.datasets.separators import split_by_recurrence
from msrn_ray.errors import UserError
from tests.datasets.manifest_files import make, present


def table(header: str, *rows: str) -> str:
    """Return a CSV whose images are named 0.jpg, 1.jpg, ... behind a URI."""
    return f"image,{header}\n" + "".join(f"s3://b/{number}.jpg,{row}\n" for number, row in enumerate(rows))


@pytest.mark.parametrize(
    ("rows", "meaning", "targets"),
    [
        (("1,-1", "-1,1"), ValueMeaning(absent=("-1",)), [[1, 0], [0, 1]]),
        (("1,-1", "-1,1"), ValueMeaning(unknown=("-1",)), [[1, -1], [-1, 1]]),
        (("1,", ",1"), ValueMeaning(absent=("",)), [[1, 0], [0, 1]]),
        (("x,", ",x"), ValueMeaning(present=("x",), absent=("",)), [[1, 0], [0, 1]]),
        (("2,0", "u,3"), ValueMeaning(present=("2", "3"), unknown=("u",)), [[1, 0], [-1, 1]]),
        (("yes,No", "NO,Yes"), ValueMeaning(), [[1, 0], [0, 1]]),
        (("1.0,0.0", "-1.0,"), ValueMeaning(), [[1, 0], [-1, -1]]),
        (("1,0", "0,-1"), ValueMeaning(absent=("-1", "0")), [[1, 0], [0, 0]]),
    ],
)
def test_values_mean_what_the_user_says(
    tmp_path: Path, rows: tuple[str, ...], meaning: ValueMeaning, targets: list[list[int]]
) -> None:
    samples = read_manifest(make(tmp_path, table("a,b", *rows)), meaning=meaning).samples
    assert samples.targets.tolist() == targets


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("1,-1", "-1,1"), r"no cell of the 2 label columns is 0, and 2 are -1\. .*--data\.absent-values -1;.*--data\.unknown-values -1"),
        (("1,", ",1"), r'and 2 are empty\. .*--data\.absent-values "";.*--data\.unknown-values ""'),
        (("1,1", "1,1"), r"all cells of the 2 label columns are 1, so no image lacks a label"),
        (('"1,0",0', "0,1"), r"row 1: '1,0' in column 'a'.* decimal comma"),
        (("x,", ",x"), r"row 1: 'x' in column 'a'.*--data\.present-values x.*--data\.absent-values \"\""),
        (("3,0", "0,1"), r"row 1: '3' in column 'a'.*count.*--data\.present-values 1 2 3"),
        (("maybe,0", "0,1"), r"row 1: 'maybe' in column 'a'.*--data\.unknown-values"),
    ],
)  # fmt: skip
def test_values_without_a_certain_meaning_are_refused(tmp_path: Path, rows: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_manifest(make(tmp_path, table("a,b", *rows)))


def test_value_with_two_meanings_is_refused() -> None:
    with pytest.raises(UserError, match=r"'-1' has two meanings"):
        ValueMeaning(absent=("-1",), unknown=("-1.0",))


def test_unknown_cells_are_counted(tmp_path: Path) -> None:
    notes = read_manifest(make(tmp_path, table("a,b", "1,0", "-1,", ",1"))).samples.notes
    assert "labels.csv: 1 of 6 label cells are -1: unknown, not absent (else give --data.absent-values -1)" in notes
    assert any("2 of 6 label cells are empty: unknown" in note for note in notes)


@pytest.mark.parametrize("name", ["label1", "Tag_2", "class 3"])
def test_columns_of_one_label_each_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"seem to hold one label each\. Join them"):
        read_manifest(make(tmp_path, table(f"{name},z", "dog,cat")))


FLAGS = {
    "digits": ("011", "100", "110"),
    "blanks": ("0 1 1", "1 0 0", "1 1 0"),
    "commas": ('"0,1,1"', '"1,0,0"', '"1,1,0"'),
    "brackets": ('"[0, 1, 1]"', '"[1, 0, 0]"', '"[1, 1, 0]"'),
}


@pytest.mark.parametrize("form", FLAGS)
def test_flags_take_names_by_position(tmp_path: Path, form: str) -> None:
    place = make(tmp_path, table("labels", *FLAGS[form]))
    samples = read_manifest(place, label_names=("cup", "car", "dog")).samples
    assert samples.label_names == ("cup", "car", "dog")
    assert samples.targets.tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 0]]
    with pytest.raises(UserError, match=r"only 0 and 1, 3 in each row: a flag per label.*--data\.labels FILE"):
        read_manifest(place)
    with pytest.raises(UserError, match=r"which lists 2\. If"):
        read_manifest(place, label_names=("cup", "car"))


@pytest.mark.parametrize("rows", [("0", "1"), ("0;1", "1"), ("0;1", "")])
def test_labels_0_and_1_are_refused(tmp_path: Path, rows: tuple[str, ...]) -> None:
    place = make(tmp_path, table("labels", *rows))
    with pytest.raises(UserError, match="holds only 0 and 1"):
        read_manifest(place)
    assert present(read_manifest(place, label_names=("0", "1")).samples)["s3://b/0.jpg"] == {*rows[0].split(";")}


def test_numbers_of_two_digits_stay_names(tmp_path: Path) -> None:
    samples = read_manifest(make(tmp_path, table("labels", "10;11", "11;10"))).samples
    assert samples.label_names == ("10", "11")
    place = make(tmp_path, table("labels", "10", "11"))
    assert read_manifest(place, label_names=("10", "11")).samples.targets.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(UserError, match="a flag per label, by position"):
        read_manifest(place)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b c']", ["a", "b c"]),
        ("('a',)", ["a"]),
        ("{'b', 'a'}", ["a", "b"]),
        ("['a' 'b']", ["a", "b"]),
        ("['a'\n 'b']", ["a", "b"]),
        ('{"choices": ["a", "b"]}', ["a", "b"]),
        ("set()", []),
        ("[]", []),
        ("[1, 2]", [1, 2]),
        ("['a' 'b', 'c']", None),  # Python would join a and b
        ("[a, b]", None),
        ("['a', 1]", None),
        ("{'a': 1}", None),
        ("__import__('os')", None),
        ("[" * 200_000, None),
        ("[" * 5_000, None),
    ],
)
def test_list_texts(text: str, labels: list[str] | None) -> None:
    assert parse_list_text(text) == labels


def test_labels_keep_no_brackets_and_quotes(tmp_path: Path) -> None:
    place = make(tmp_path, table("labels", "\"['a', 'b']\"", "['b']", ""))
    assert read_manifest(place).samples.label_names == ("a", "b")
    with pytest.raises(UserError, match=r"row 1: .* is a list in text; leave out --data\.label-separator ','"):
        read_manifest(place, label_separator=",")
    with pytest.raises(UserError, match=r"the label 'a' in column 'labels' is in quotes"):
        read_manifest(make(tmp_path, table("labels", "\"'a','b'\"", "b")))


def test_line_breaks_separate_labels(tmp_path: Path) -> None:
    samples = read_manifest(make(tmp_path, table("labels", '"a\nb c"', "a"))).samples
    assert samples.label_names == ("a", "b c")
    assert samples.targets.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("cells", "separator"),
    [
        (["cup car", "car", "cup", "dog cup", "dog car cup", "dog"], " "),
        (["cup/car", "car", "cup", "dog/cup", "dog/car/cup", "dog"], "/"),
        (["cup + car", "car", "cup", "dog + cup", "dog + car + cup", "dog"], "+"),
        (["dining table", "cup", "person", "traffic light"], None),
        (["red car", "blue car", "green car", "red bus", "blue bus", "green bus"], None),
        (["animals/dog", "animals/cat", "things/cup"], None),
        (["cup", "car"], None),
    ],
)
def test_recurrence_decides_on_unusual_separators(cells: list[str], separator: str | None) -> None:
    assert split_by_recurrence(cells)[0] == separator


def test_decision_on_a_separator_is_said(tmp_path: Path) -> None:
    rows = ("cup car", "car", "cup", "dog cup", "dog car cup", "dog")
    (note, *_) = read_manifest(make(tmp_path, table("labels", *rows))).samples.notes
    assert note.startswith(
        "labels.csv: 6 images, 3 labels (labels separated by ' ': 3 labels if ' ' separates them, 6 if not;"
    )


@pytest.mark.parametrize(
    ("column", "words", "split", "note"),
    [
        ("subset", ("train", "TEST", "valid"), [0, 2, 1], "'subset' is the split"),
        ("Set", ("train", "dev", "train"), [0, 1, 0], "'Set' is the split"),
        ("partition", ("0", "1", "2"), [0, 1, 2], "0 is train, 1 is val, 2 is test"),
        ("is_valid", ("False", "True", "false"), [0, 1, 0], "0 or false is train, 1 or true is val"),
        ("is_valid", ("0", "1", "0"), [0, 1, 0], "0 or false is train, 1 or true is val"),
        ("fold", ("0", "1", "2"), None, "'fold' is not used as split, for it holds '0', '1', '2'"),
        ("dataset", ("coco", "voc", "coco"), None, "'dataset' is not used as split, for it holds 'coco', 'voc'"),
    ],
)
def test_splits_as_people_name_them(
    tmp_path: Path, column: str, words: tuple[str, ...], split: list[int] | None, note: str
) -> None:
    for header, rows in ((f"dog,cat,{column}", ("1,0", "0,1", "1,0")), (f"labels,{column}", ("dog", "cat", "dog"))):
        text = table(header, *(f"{row},{word}" for row, word in zip(rows, words, strict=True)))
        images = read_manifest(make(tmp_path, text))
        assert images.samples.label_names == ("cat", "dog")
        assert (None if images.split is None else images.split.tolist()) == split
        assert any(note in line for line in images.samples.notes)
        np.testing.assert_array_equal(images.samples.targets, [[0, 1], [1, 0], [0, 1]])
