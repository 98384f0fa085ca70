"""The COCO reader against an independent reading of the JSON, and against damaged layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msrn_ray.datasets.coco import has_split, read_coco
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location

Json = dict[str, Any]


def small_json() -> Json:
    """Return four images; category ids and names have opposite orders; image 7 has only a crowd, image 9 no label."""
    return {
        "images": [{"id": number, "file_name": f"{number:03}.jpg"} for number in (20, 3, 9, 7)],
        "categories": [{"id": 1, "name": "zebra"}, {"id": 5, "name": "apple"}, {"id": 90, "name": "kite"}],
        "annotations": [
            {"id": 1, "image_id": 20, "category_id": 1, "iscrowd": 0},
            {"id": 2, "image_id": 20, "category_id": 1, "iscrowd": 0},
            {"id": 3, "image_id": 3, "category_id": 5, "iscrowd": 0},
            {"id": 4, "image_id": 3, "category_id": 1, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 90, "iscrowd": 1},
        ],
    }


def write(root: Path, content: Json, year: int = 2014) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / f"train{year}").mkdir()
    (root / f"annotations/instances_train{year}.json").write_text(json.dumps(content))
    for number in (20, 3, 9, 7):
        (root / f"train{year}/{number:03}.jpg").touch()
    return root


@pytest.mark.parametrize("year", [2014, 2017])
def test_reads_labels_alphabetically_and_rows_by_id(tmp_path: Path, year: int) -> None:
    samples = read_coco(Location.of(write(tmp_path, small_json(), year)), "train", keep_unlabelled=True)
    assert samples.label_names == ("apple", "kite", "zebra")
    assert samples.table["image_id"].to_pylist() == ["3", "7", "9", "20"]
    assert samples.targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert samples.table["uri"].to_pylist()[0] == str(tmp_path / f"train{year}" / "003.jpg")
    assert samples.source == f"instances_train{year}.json"
    assert samples.notes == (f"train{year}: 4 images, 1 without a label kept",)


def test_drops_unlabelled(tmp_path: Path) -> None:
    samples = read_coco(Location.of(write(tmp_path, small_json())), "train", keep_unlabelled=False)
    assert samples.table["image_id"].to_pylist() == ["3", "7", "20"]
    assert samples.table["uri"].to_pylist()[2].endswith("020.jpg")
    assert samples.notes == ("train2014: 3 of 4 images, 1 without a label dropped",)


def test_crowds_can_be_left_out(tmp_path: Path) -> None:
    samples = read_coco(Location.of(write(tmp_path, small_json())), "train", keep_unlabelled=False, crowd=False)
    assert samples.table["image_id"].to_pylist() == ["3", "20"]
    assert samples.notes == ("train2014: 2 of 4 images, 2 without a label dropped",)


def test_uri_is_absolute_for_a_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", small_json())
    monkeypatch.chdir(tmp_path)
    samples = read_coco(Location.of(Path("data")), "train", keep_unlabelled=True)
    assert samples.table["uri"].to_pylist()[0] == str(tmp_path / "data/train2014/003.jpg")


def test_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_coco(Location.of(write(tmp_path, small_json())), "train", keep_unlabelled=True)
    assert capsys.readouterr() == ("", "")


def test_2014_comes_before_2017(tmp_path: Path) -> None:
    write(tmp_path, small_json())
    shutil.copytree(tmp_path / "train2014", tmp_path / "train2017")
    other = small_json() | {"annotations": []}
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(other))
    assert read_coco(Location.of(tmp_path), "train", keep_unlabelled=True).source == "instances_train2014.json"
    assert (
        read_coco(Location.of(tmp_path), "train", keep_unlabelled=True, year=2017).source == "instances_train2017.json"
    )


def test_missing_years_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, small_json())
    with pytest.raises(UserError, match=r"looked for annotations/instances_train2017\.json, found only annotations, "):
        read_coco(Location.of(root), "train", keep_unlabelled=True, year=2017)
    with pytest.raises(UserError, match=r"data\.year 2012: COCO has 2014 and 2017; choose one"):
        read_coco(Location.of(root), "train", keep_unlabelled=True, year=2012)


def test_has_split(tmp_path: Path) -> None:
    root = Location.of(write(tmp_path / "data", small_json(), 2017))
    assert has_split(root, "train", 2017)
    assert not has_split(root, "train", 2014)
    assert not has_split(root, "val", 2017)
    assert not has_split(root / "nothing", "train", 2017)


@pytest.mark.parametrize(
    ("split", "images", "unlabelled", "classes", "mean"), [("train", 178, 3, 76, 3.18), ("val", 114, 2, 69, 2.78)]
)
def test_agrees_with_an_independent_reading(
    shared: Path, split: str, images: int, unlabelled: int, classes: int, mean: float
) -> None:
    root = shared / "data/coco_mini"
    samples = read_coco(Location.of(root), split, keep_unlabelled=True)
    content = json.loads((root / f"annotations/instances_{split}2014.json").read_text())
    name_of = {category["id"]: category["name"] for category in content["categories"]}
    expected: dict[str, set[str]] = {str(image["id"]): set() for image in content["images"]}
    for annotation in content["annotations"]:
        expected[str(annotation["image_id"])].add(name_of[annotation["category_id"]])
    found = {
        image_id: {name for name, value in zip(samples.label_names, row, strict=True) if value == 1}
        for image_id, row in zip(samples.table["image_id"].to_pylist(), samples.targets, strict=True)
    }
    assert found == expected
    assert len(samples) == images
    assert samples.label_names[:4] == ("airplane", "apple", "backpack", "banana")
    assert set(np.unique(samples.targets)) == {0, 1}
    assert np.count_nonzero(samples.targets.any(0)) == classes
    assert round(float(samples.targets.sum(1).mean()), 2) == mean
    assert len(read_coco(Location.of(root), split, keep_unlabelled=False)) == images - unlabelled
    file_of = {str(image["id"]): image["file_name"] for image in content["images"]}
    for row in samples.table.to_pylist():
        assert Path(row["uri"]).name == file_of[row["image_id"]]
        assert Path(row["uri"]).is_file()


def test_label_order_matches_the_authors(shared: Path) -> None:
    names = np.load(shared / "word_vectors/coco.npz")["names"].tolist()
    assert list(read_coco(Location.of(shared / "data/coco_mini"), "val", keep_unlabelled=False).label_names) == names


def test_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nowhere: no such folder; give the folder that holds annotations/ and train2014/"
    ):
        read_coco(Location.of(tmp_path / "nowhere"), "train", keep_unlabelled=True)


def test_empty_root_names_the_expected_files(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"instances_train2014\.json or annotations/instances_train2017\.json, found nothing; give"
    ):
        read_coco(Location.of(tmp_path), "train", keep_unlabelled=True)


def test_outlines_do_not_change_targets(tmp_path: Path) -> None:
    plain = read_coco(Location.of(write(tmp_path / "plain", small_json())), "train", keep_unlabelled=True)
    content = small_json()
    shapes = ([[1.5, 2, 3, 4]], {"counts": [1, 2], "size": [5, 6]}, {"counts": "aZ", "size": [5, 6]}, [], None)
    for annotation, outline in zip(content["annotations"], shapes, strict=True):
        annotation |= {"segmentation": outline, "bbox": [0, 0, 1.5, 2], "area": 3.0}
    assert (
        read_coco(Location.of(write(tmp_path / "full", content)), "train", keep_unlabelled=True).targets.tolist()
        == plain.targets.tolist()
    )


def test_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, small_json()) / "annotations/instances_train2014.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_coco(Location.of(tmp_path), "train", keep_unlabelled=True)) == 4


@pytest.mark.parametrize("level", ["annotations", "train2014", ".."])
def test_wrong_folder_level_gets_a_suggestion(tmp_path: Path, level: str) -> None:
    root = write(tmp_path / "data", small_json())
    given = tmp_path if level == ".." else root / level
    with pytest.raises(UserError) as error:
        read_coco(Location.of(given), "train", keep_unlabelled=True)
    assert f"did you mean {root}?" in str(error.value)


def test_missing_image_folder_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, small_json())
    shutil.rmtree(root / "train2014")
    with pytest.raises(
        UserError, match=r"train2014: no such folder, but .*instances_train2014\.json lists 4 images in it; put"
    ):
        read_coco(Location.of(root), "train", keep_unlabelled=True)


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    root = write(tmp_path, small_json())
    for number in (20, 3, 9, 7):
        (root / f"train2014/{number:03}.jpg").unlink()
    with pytest.raises(
        UserError, match=r"4 of its 4 images are missing \(\S*/003\.jpg, \S*/007\.jpg, \S*/009\.jpg, \.\.\.\); finish"
    ):
        read_coco(Location.of(root), "train", keep_unlabelled=True)
    for number in (20, 3, 7):
        (root / f"train2014/{number:03}.jpg").touch()
    with pytest.raises(UserError, match=r"1 of its 4 images .* \(\S*/train2014/009\.jpg\)"):
        read_coco(Location.of(root), "train", keep_unlabelled=True)


def test_images_in_sub_folders(tmp_path: Path) -> None:
    content = small_json()
    content["images"][1]["file_name"] = "inner/003.jpg"
    root = write(tmp_path, content)
    with pytest.raises(UserError, match=r"1 of its 4 images .* \(\S*/inner/003\.jpg\)"):
        read_coco(Location.of(root), "train", keep_unlabelled=True)
    (root / "train2014/inner").mkdir()
    (root / "train2014/inner/003.jpg").touch()
    assert len(read_coco(Location.of(root), "train", keep_unlabelled=True)) == 4


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "\udcff\udcfe"])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, small_json())
    (root / "annotations/instances_train2014.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"instances_train2014\.json: not a JSON file .*download or unpack it again"):
        read_coco(Location.of(root), "train", keep_unlabelled=True)


def change(edit: Callable[[Json], object]) -> Json:
    content = small_json()
    edit(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r'has no list "images"; give an "instances" file'),
        (change(lambda c: c.pop("images")), r'has no list "images"'),
        (change(lambda c: c.pop("annotations")), r'has no list "annotations"'),
        (change(lambda c: c.update(categories={})), r'has no list "categories"'),
        (
            change(lambda c: c["images"][2].pop("file_name")),
            r'entry 2 of "images" needs a field "file_name" with a text; cor',
        ),
        (
            change(lambda c: c["images"][1].update(id="3")),
            r'entry 1 of "images" needs a field "id" with a whole number',
        ),
        (change(lambda c: c["images"].append(5)), r'entry 4 of "images" needs a field "id"'),
        (change(lambda c: c["categories"][0].pop("name")), r'entry 0 of "categories" needs a field "name" with a text'),
        (change(lambda c: c["annotations"][3].pop("image_id")), r'entry 3 of "annotations" needs a field "image_id"'),
        (
            change(lambda c: c["annotations"][3].pop("category_id")),
            r'entry 3 of "annotations" needs a field "category_id"',
        ),
        (
            change(lambda c: c["annotations"][1].update(image_id=[3])),
            r'entry 1 of "annotations" needs a field "image_id"',
        ),
        (change(lambda c: c["annotations"].append(None)), r'entry 5 of "annotations" needs a field "id"'),
        (
            change(lambda c: c["annotations"][0].update(category_id=2)),
            r'"annotations" have 1 values of "category_id" that "categories" lacks \(2\); add them there or remove',
        ),
        (
            change(lambda c: c["annotations"][0].update(image_id=999)),
            r'"annotations" have 1 values of "image_id" that "images" lacks \(999\); add',
        ),
        (
            change(lambda c: c["images"][0].update(id=3)),
            r'1 values of "id" in "images" occur more than once \(3\); make',
        ),
        (change(lambda c: c["categories"][0].update(id=5)), r'"id" in "categories" occur more than once \(5\)'),
        (
            change(lambda c: c["categories"][0].update(name="kite")),
            r'"name" in "categories" occur more than once \(kite\)',
        ),
        (
            change(lambda c: c["images"][0].update(file_name="../020.jpg")),
            r"file name '\.\./020\.jpg' leads out of .*; make",
        ),
        (change(lambda c: c["images"][0].update(file_name="a/../../x")), r"leads out of"),
        (change(lambda c: c["images"][0].update(file_name="/etc/passwd")), r"file name '/etc/passwd' leads out of"),
        (change(lambda c: c.update(images=[], annotations=[])), r"no image is left to use"),
    ],
)
@pytest.mark.parametrize("crowd", [True, False])
def test_damaged_json_names_entry_and_field(tmp_path: Path, content: Json, message: str, crowd: bool) -> None:
    root = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        read_coco(Location.of(root), "train", keep_unlabelled=True, crowd=crowd)
    assert "instances_train2014.json" in str(error.value)


def test_file_without_categories_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, small_json() | {"categories": [], "annotations": []})
    with pytest.raises(UserError, match=r'instances_train2014\.json: "categories" is empty; give an "instances" file'):
        read_coco(Location.of(root), "train", keep_unlabelled=True)


def test_file_without_any_label_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, change(lambda c: c.update(annotations=[])))
    with pytest.raises(
        UserError, match=r"no image is left to use \(train2014: 0 of 4 images, 4 without a label dropped\)"
    ):
        read_coco(Location.of(root), "train", keep_unlabelled=False)
    assert len(read_coco(Location.of(root), "train", keep_unlabelled=True)) == 4


def test_file_uri_cannot_leave_its_folder(tmp_path: Path) -> None:
    content = small_json()
    content["images"][0]["file_name"] = "%2e%2e/secret.jpg"
    root = write(tmp_path, content)
    (tmp_path / "secret.jpg").touch()
    with pytest.raises(UserError, match=r"1 of its 4 images are missing \(.*train2014/%2e%2e/secret\.jpg\)"):
        read_coco(Location.of(f"file://{root}"), "train", keep_unlabelled=True)


def test_impossible_file_names_count_as_missing(tmp_path: Path) -> None:
    content = small_json()
    content["images"][0]["file_name"] = "a\0b/c.jpg"
    with pytest.raises(UserError, match="1 of its 4 images are missing"):
        read_coco(Location.of(write(tmp_path, content)), "train", keep_unlabelled=True)


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path, small_json())
    (root / "annotations/instances_train2014.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"instances_train2014\.json: not a JSON file \(maximum recursion depth"):
        read_coco(Location.of(root), "train", keep_unlabelled=True)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("images", "file_name", "\ud800.jpg"), ("categories", "name", "\ud800"), ("images", "id", 2**70)],
)
def test_invalid_characters_and_numbers_are_refused(tmp_path: Path, section: str, field: str, value: object) -> None:
    content = small_json()
    content[section][0][field] = value
    with pytest.raises(UserError, match=f'entry 0 of "{section}" needs a field "{field}" with'):
        read_coco(Location.of(write(tmp_path, content)), "train", keep_unlabelled=True)


def test_windows_paths_are_named(tmp_path: Path) -> None:
    content = small_json()
    for image in content["images"]:
        image["file_name"] = f"C:\\data\\{image['id']}.jpg"
    with pytest.raises(UserError, match=r"4 of 4 .* absolute Windows paths"):
        read_coco(Location.of(write(tmp_path, content)), "train", keep_unlabelled=True)
