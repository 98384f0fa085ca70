"""The facts about each image, read from its file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from msrn_ray.datasets.protocol import load_splits
from msrn_ray.doctor.diagnosis import FACTS, all_samples
from msrn_ray.ray_data import inspect_images as inspection
from msrn_ray.ray_data.inspect_images import inspect_images, inspect_rows
from tests.doctor.coco_set import config, photo
from tests.tiny import make_photo


def test_file_deleted_after_listing(root: Path) -> None:
    samples = all_samples(load_splits(config(root)))
    photo(root, "train", 2).unlink()
    facts = inspect_rows(samples, 0, 5, 10**6)
    assert facts.schema == FACTS
    assert facts["digest"].is_null().to_pylist() == [False, False, True, False, False]
    assert "No such file" in facts["error"][2].as_py()
    assert facts["row"].to_pylist() == [0, 1, 2, 3, 4]
    assert facts["width"].to_pylist() == [48, 48, 0, 48, 48]


@pytest.mark.ray
def test_stream_yields_each_image_once(local_ray: None, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_MIN_ROWS", 16)
    photo(root, "train", 5).write_bytes(b"")
    samples = all_samples(load_splits(config(root)))
    blocks = list(inspect_images(samples, 10**6))
    assert len(blocks) > 1
    facts = pa.concat_tables(blocks)
    assert facts["row"].to_pylist() == list(range(31))
    assert facts.equals(inspect_rows(samples, 0, 31, 10**6))


def test_hostile_files_are_unreadable(shared: Path, tmp_path: Path) -> None:
    """Exactly the files that training cannot read have an error."""
    for path in (shared / "data/hostile").iterdir():
        if path.suffix != ".csv":
            shutil.copy(path, tmp_path / path.name)
    uris = sorted(str(path) for path in tmp_path.iterdir())
    facts = inspect_rows(pa.table({"uri": uris}), 0, len(uris), 10**8)
    bad = {Path(uris[row]).name for row in range(len(uris)) if facts["error"][row].as_py()}
    assert bad == {
        "truncated.jpg",
        "header_only.jpg",
        "zero_byte.jpg",
        "text_named.jpg",
        "truncated.png",
        "huge_20000x20000.png",
    }
    turned = uris.index(str(tmp_path / "exif_orientation6.jpg"))
    with Image.open(uris[turned]) as unrotated:
        assert (facts["height"][turned].as_py(), facts["width"][turned].as_py()) == unrotated.size


def test_size_of_each_image_format(tmp_path: Path) -> None:
    uris = [str(make_photo(tmp_path / f"a{suffix}", 1)) for suffix in (".jpg", ".png", ".webp", ".bmp")]
    facts = inspect_rows(pa.table({"uri": uris}), 0, 9, 10**6)
    assert facts["width"].to_pylist() == [48] * 4
    assert facts["height"].to_pylist() == [40] * 4
    assert len(set(facts["digest"].to_pylist())) == 4
