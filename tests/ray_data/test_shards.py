"""One shard of prepared data: the same bytes for the same input, and each image read back exactly."""

from __future__ import annotations

import io
import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from msrn_ray.datasets.prepared import shard_file
from msrn_ray.datasets.shard_writer import ShardWriter, _content_hash
from msrn_ray.errors import UserError
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable
from tests.tiny import make_photo, make_picture

from .prepared_example import files


@pytest.fixture
def samples(tmp_path: Path) -> SampleTable:
    """Five photographs with unknown labels among their targets."""
    uris = [str(make_photo(tmp_path / f"photos/{row}.jpg", row)) for row in range(5)]
    targets = np.array([[1, 0], [0, 1], [-1, 1], [1, 1], [0, -1]], np.int8)
    return SampleTable.from_columns([f"id{row}" for row in range(5)], uris, targets, ("cat", "dog"), "made")


def writer(root: Path | str, **changes: object) -> ShardWriter:
    fields: dict[str, object] = {"rows_per_shard": 3, "short_side": None, "max_pixels": 10**6, **changes}
    return ShardWriter(Location.of(root), "train", ("cat", "dog"), "plan", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_shard_returns_each_image_byte_for_byte(samples: SampleTable, tmp_path: Path, kind: str) -> None:
    root = str(tmp_path / "out") if kind == "path" else f"memory://{tmp_path.name}"
    for number, size in enumerate((3, 2)):
        record = writer(root).finish(samples.table, number)
        assert record.rows == tuple(range(3 * number, 3 * number + size))
        shard = shard_file(Location.of(root), "train", number)
        assert record.size == len(shard.read_bytes())
        for row, offset, length in zip(record.rows, record.offsets, record.lengths, strict=True):
            original = Path(samples.table["uri"][row].as_py()).read_bytes()
            assert read_bytes(f"{shard}#bytes={offset}+{length}") == original


def test_shard_is_plain_parquet_that_explains_itself(samples: SampleTable, tmp_path: Path) -> None:
    writer(tmp_path).finish(samples.table, 0)
    table = pq.read_table(tmp_path / "train" / "train-00000.parquet")
    assert table.column_names == ["image", "image_id", "split", "labels", "target"]
    assert table["image_id"].to_pylist() == ["id0", "id1", "id2"]
    assert table["split"].to_pylist() == ["train"] * 3
    assert table["labels"].to_pylist() == [["cat"], ["dog"], ["dog"]]
    assert table["target"].to_pylist() == [[1, 0], [0, 1], [-1, 1]]
    assert Image.open(io.BytesIO(table["image"][2].as_py())).size == (48, 40)
    assert json.loads(pq.read_metadata(tmp_path / "train/train-00000.parquet").metadata[b"label_names"]) == [
        "cat",
        "dog",
    ]


def test_equal_and_nested_images_get_separate_offsets(tmp_path: Path) -> None:
    """The writer finds an image by its bytes: the same file three times, and a file that ends with the bytes of another."""
    first = make_photo(tmp_path / "a.jpg", 1)
    (tmp_path / "b.jpg").write_bytes(make_photo(tmp_path / "c.jpg", 2).read_bytes() + first.read_bytes())
    uris = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "a.jpg", "a.jpg")]
    table = SampleTable.from_columns(list("abcd"), uris, np.zeros((4, 2), np.int8), ("cat", "dog"), "made")
    record = writer(tmp_path / "out", rows_per_shard=4).finish(table.table, 0)
    assert len(set(record.offsets)) == 4
    data = (tmp_path / "out/train/train-00000.parquet").read_bytes()
    for uri, offset, length in zip(uris, record.offsets, record.lengths, strict=True):
        assert data[offset : offset + length] == Path(uri).read_bytes()


def test_only_a_damaged_shard_is_written_again(samples: SampleTable, tmp_path: Path) -> None:
    record = writer(tmp_path).finish(samples.table, 0)
    path = tmp_path / "train/train-00000.parquet"
    before, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert writer(tmp_path).finish(samples.table, 0) == record
    assert path.stat().st_mtime_ns == stamp
    for damage in (before[:-1], before[: len(before) // 2], b"", b"no parquet"):
        path.write_bytes(damage)
        assert writer(tmp_path).finish(samples.table, 0) == record
        assert path.read_bytes() == before
    path.write_bytes((tmp_path / "train/train-00000.parquet").read_bytes())
    other = writer(tmp_path)
    assert other.finish(samples.table, 1).rows == (3, 4)
    shutil.copy(tmp_path / "train/train-00001.parquet", path)  # the name of shard 0, the content of shard 1
    assert writer(tmp_path).finish(samples.table, 0) == record


def test_only_larger_images_are_reduced(tmp_path: Path) -> None:
    sizes = {"wide.png": (300, 100), "tall.jpg": (90, 200), "small.jpg": (50, 64), "even.jpg": (64, 64)}
    for seed, (name, size) in enumerate(sizes.items()):
        make_picture(seed, *size).save(tmp_path / name)
    uris = [str(tmp_path / name) for name in sizes]
    table = SampleTable.from_columns(list(sizes), uris, np.zeros((4, 2), np.int8), ("cat", "dog"), "made")
    writer(tmp_path / "out", rows_per_shard=4, short_side=64).finish(table.table, 0)
    images = pq.read_table(tmp_path / "out/train/train-00000.parquet")["image"].to_pylist()
    assert [Image.open(io.BytesIO(image)).size for image in images] == [(192, 64), (64, 142), (50, 64), (64, 64)]
    assert [Image.open(io.BytesIO(image)).format for image in images] == ["JPEG"] * 4
    assert [image == Path(uri).read_bytes() for image, uri in zip(images, uris, strict=True)] == [
        False,
        False,
        True,
        True,
    ]
    exact = np.asarray(Image.open(uris[1]).convert("RGB").resize((64, 142), Image.Resampling.BILINEAR), np.float64)
    assert np.abs(np.asarray(Image.open(io.BytesIO(images[1])), np.float64) - exact).mean() < 8, (
        "of 255; another picture is 80 away"
    )


def test_image_too_long_for_jpeg_keeps_its_bytes(samples: SampleTable, tmp_path: Path) -> None:
    path = Path(samples.table["uri"][0].as_py())
    Image.new("L", (90_000, 4)).save(path, "PNG")
    out = writer(tmp_path / "out", short_side=3, rows_per_shard=1)
    record = out.finish(samples.table, 0)
    assert (record.rows, record.lengths) == ((0,), (path.stat().st_size,))
    Image.new("L", (60_000, 4)).save(path, "PNG")
    assert (
        writer(tmp_path / "less", short_side=3, rows_per_shard=1).finish(samples.table, 0).lengths[0]
        != path.stat().st_size
    )


def test_bad_images_are_left_out_with_reason(shared: Path, tmp_path: Path) -> None:
    hostile = shared / "data/hostile"
    names = ["zero_byte.jpg", "truncated.jpg", "png_named.jpg", "gone.jpg", "text_named.jpg", "photo.webp"]
    uris = [str(hostile / name) for name in names]
    table = SampleTable.from_columns(names, uris, np.zeros((6, 2), np.int8), ("cat", "dog"), "made")
    record = writer(tmp_path, rows_per_shard=6, max_pixels=10**7).finish(table.table, 0)
    assert record.rows == (2, 5)
    assert record.bad == (
        (0, "the file is empty"),
        (1, "the image data is broken or cut off"),
        (3, "No such file or directory"),
        (4, "not an image of a known format"),
    )
    every = writer(tmp_path / "none", rows_per_shard=2, max_pixels=10**7).finish(table.table, 0)
    assert (every.rows, len(every.bad)) == ((), 2)
    assert pq.read_table(tmp_path / "none/train/train-00000.parquet").num_rows == 0


def test_fixed_image_enters_the_shard(samples: SampleTable, tmp_path: Path) -> None:
    image = Path(samples.table["uri"][1].as_py())
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    assert [row for row, _ in writer(tmp_path / "out").finish(samples.table, 0).bad] == [1]
    image.write_bytes(whole)
    record = writer(tmp_path / "out").finish(samples.table, 0)
    assert (record.rows, record.bad) == ((0, 1, 2), ())
    assert files(tmp_path / "out") != {}
    assert record == writer(tmp_path / "out").finish(samples.table, 0)


def test_unreachable_image_is_an_error(samples: SampleTable, tmp_path: Path) -> None:
    (tmp_path / "photos/1.jpg").unlink()
    (tmp_path / "photos/1.jpg").mkdir()  # stands for a disk or a network that fails
    with pytest.raises(UserError, match=r"photos/1\.jpg: cannot be read \("):
        writer(tmp_path / "out").finish(samples.table, 0)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_shard(samples: SampleTable, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for a full disk: writing fails half-way
    try:
        with pytest.raises(UserError, match=r"train-00000\.parquet: cannot be written \(.*File too large"):
            writer(tmp_path / "out").finish(samples.table, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out/train").iterdir()) == []


def test_content_covers_the_labels() -> None:
    first, second = (_content_hash(["a"], np.array([target], np.int8), [b"x"]) for target in ([1, 0], [0, 1]))
    assert first != second
