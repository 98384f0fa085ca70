"""Images that a label file names without their folder or suffix."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from msrn_ray.datasets.image_lookup import locate_images
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location


def locate(folder: Path, *names: str) -> tuple[list[str], tuple[str, ...]]:
    uris, notes = locate_images(Location.of(folder / "labels.csv"), pa.chunked_array([[*names]], pa.string()))
    return [str(Path(uri).relative_to(folder)) for uri in uris.to_pylist()], notes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in ("train/1.jpg", "train/2.PNG", "more/d/3.jpg", "more/xd/4.jpg", "5.jpg", "notes/6.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_names_are_found_below_the_folder(folder: Path) -> None:
    found = ["train/1.jpg", "train/2.PNG", "more/d/3.jpg"]
    assert locate(folder, "1", "2", "d/3") == (found, ("labels.csv: 3 images found by name in more/d, train",))
    assert locate(folder, "1.jpg", "2.PNG", "3.jpg")[0] == found


def test_paths_that_exist_stay_as_written(folder: Path) -> None:
    assert locate(folder, "5.jpg", "1") == (["5.jpg", "1"], ())


def test_other_files_are_not_taken(folder: Path) -> None:
    assert locate(folder, "6", "d/4", "2.jpg", "rain/1") == (["6", "d/4", "2.jpg", "rain/1"], ())


def test_name_of_two_files_is_refused(folder: Path) -> None:
    (folder / "more/1.jpg").touch()
    with pytest.raises(UserError, match=r"the image '1' may be more/1\.jpg, train/1\.jpg; write its path"):
        locate(folder, "1")
    assert locate(folder, "train/1")[0] == ["train/1.jpg"]
