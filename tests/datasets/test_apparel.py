"""The Apparel reader: labels from the names of folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.datasets.apparel import APPAREL_LABELS, read_apparel
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location


def fill(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def test_apparel_mini(shared: Path) -> None:
    samples = read_apparel(Location.of(shared / "data/apparel_mini"))
    assert list(samples.label_names) == np.load(shared / "word_vectors/apparel.npz")["names"].tolist()
    assert dict(zip(samples.label_names, samples.targets.sum(0).tolist(), strict=True)) == {
        **{"black": 171, "blue": 221, "brown": 10, "green": 29, "red": 33, "white": 57},
        **{"dress": 89, "pants": 215, "shirt": 78, "shoes": 69, "shorts": 70},
    }
    assert len(samples) == 521
    assert samples.notes == ()
    for row in samples.table.to_pylist():
        present = {name for name, value in zip(samples.label_names, row["target"], strict=True) if value}
        assert present == set(row["image_id"].split("/")[0].split("_"))
        assert row["uri"] == str(shared / "data/apparel_mini" / row["image_id"])
    assert all(Path(uri).is_file() for uri in samples.table["uri"].to_pylist())


def test_known_labels_keep_the_authors_order_and_number(tmp_path: Path) -> None:
    samples = read_apparel(Location.of(fill(tmp_path, "white_dress/b.jpg", "white_dress/a.jpg", "blue_shoes/c.jpg")))
    assert samples.label_names == APPAREL_LABELS
    assert samples.table["image_id"].to_pylist() == ["blue_shoes/c.jpg", "white_dress/a.jpg", "white_dress/b.jpg"]
    assert np.argwhere(samples.targets).tolist() == [[0, 1], [0, 9], [1, 5], [1, 6], [2, 5], [2, 6]]


def test_other_labels_are_sorted_and_may_be_three(tmp_path: Path) -> None:
    samples = read_apparel(Location.of(fill(tmp_path, "white_dress/a.jpg", "red_coat_long/b.jpg")))
    assert samples.label_names == ("coat", "dress", "long", "red", "white")
    assert samples.targets.tolist() == [[1, 0, 1, 1, 0], [0, 1, 0, 0, 1]]


def test_suffix_case_is_ignored_and_other_files_counted(tmp_path: Path) -> None:
    images = ("a.JPG", "b.jpeg", "c.Png", "d.webp", "e.gif", "f.BMP")
    files = (*images, "Thumbs.db", "notes.txt", ".ipynb_checkpoints/g.jpg")
    samples = read_apparel(
        Location.of(fill(tmp_path, *(f"red_dress/{file}" for file in files), "blue_dress/readme", "top.jpg"))
    )
    assert samples.table["image_id"].to_pylist() == [f"red_dress/{image}" for image in images]
    assert samples.notes[0] == "blue_dress: no image in this folder"
    assert samples.notes[1].startswith(f"{tmp_path.name}: 3 files skipped that are not images")
    assert len(samples.notes) == 2


def test_folders_without_label_names_are_skipped(tmp_path: Path) -> None:
    root = fill(tmp_path, "red_dress/a.jpg", ".ipynb_checkpoints/b.jpg", "__pycache__/c.jpg", "train/d.jpg")
    assert read_apparel(Location.of(root)).table["image_id"].to_pylist() == ["red_dress/a.jpg"]


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nowhere: no such folder; give the folder that holds folders named <label>_<label>"
    ):
        read_apparel(Location.of(tmp_path / "nowhere"))


def test_root_without_label_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"holds no folders named <label>_<label>, such as black_dress/, with images inside; give"
    ):
        read_apparel(Location.of(fill(tmp_path, "red/a.jpg", "b.jpg")))


@pytest.mark.parametrize("beside", [(), ("my_notes/readme.txt",)])
def test_parent_folder_suggests_the_folder_below(tmp_path: Path, beside: tuple[str, ...]) -> None:
    fill(tmp_path, "images/red_dress/a.jpg", *beside)
    with pytest.raises(UserError, match=r"did you mean .*/images\?"):
        read_apparel(Location.of(tmp_path))


def test_label_folder_suggests_the_folder_above(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", "red_dress/a.jpg")
    with pytest.raises(UserError, match=rf"did you mean {root}\?"):
        read_apparel(Location.of(root / "red_dress"))


def test_single_labels_on_request(tmp_path: Path) -> None:
    root = fill(tmp_path, "red_dress/a.jpg", "hat/b.jpg", "long_red_coat/c.jpg", "__pycache__/d.jpg")
    samples = read_apparel(Location.of(root), single_labels=True)
    assert samples.label_names == ("coat", "dress", "hat", "long", "red")
    assert samples.table["image_id"].to_pylist() == ["hat/b.jpg", "long_red_coat/c.jpg", "red_dress/a.jpg"]
    assert samples.targets.tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 1, 1], [0, 1, 0, 0, 1]]
    with pytest.raises(UserError, match=r"holds no folders named <label>, such as dress/"):
        read_apparel(Location.of(root / "hat"), single_labels=True)


def test_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "red_dress/a.jpg")
    (tmp_path / "red_dress" / os.fsdecode(b"caf\xe9.jpg")).touch()
    with pytest.raises(UserError, match=r"'red_dress/caf\\udce9\.jpg'.* is not UTF-8; rename"):
        read_apparel(Location.of(tmp_path))


def test_folders_without_any_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image in its 1 folders; add files with \.jpg"):
        read_apparel(Location.of(fill(tmp_path, "red_dress/a.txt")))


def test_a_note_names_the_folders_left_out(tmp_path: Path) -> None:
    samples = read_apparel(Location.of(fill(tmp_path, "red_hat/a.jpg", "hats/b.jpg", ".cache/c.jpg")))
    assert samples.table["image_id"].to_pylist() == ["red_hat/a.jpg"]
    (note,) = [note for note in samples.notes if "left out" in note]
    assert note.endswith(": hats")
