"""Prepared data: the same bytes for the same input, images read back exactly, and training that sees what the raw reader gives."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from rich.console import Console

from msrn_ray.cli.data import Prepare
from msrn_ray.config import DataSettings, ExperimentConfig
from msrn_ray.datasets.prepared import PreparedInfo, index_file, read_info, shard_file
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.registry import read_published
from msrn_ray.datasets.shard_writer import ShardWriter
from msrn_ray.errors import BadImagesError, UserError
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.io.storage import Location
from msrn_ray.ray_data.pipeline import decode_rows
from msrn_ray.ray_data.prepare import prepare
from msrn_ray.types import SampleTable
from tests.datasets.test_containers import save_to_disk, write_tar
from tests.tiny import make_coco, make_photo, make_picture

ROWS = {"train": [[0], [1], [0, 1], [2], [], [0, 2], [1, 2]], "val": [[0], [1], [2]]}


def raw_settings(root: Path, **changes: object) -> DataSettings:
    return DataSettings(dataset="coco", root=str(root), image_size=64).model_copy(update=changes)


def as_sample(photo: bytes, labels: list[str]) -> list[tuple[str, bytes]]:
    return [("jpg", photo), ("json", json.dumps({"labels": labels}).encode())]


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 train images, one without a label, and 3 val images, in COCO's layout."""
    return make_coco(tmp_path_factory.mktemp("raw") / "set", ROWS)


@pytest.fixture(scope="module")
def ready(local_ray: None, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, prepared in shards of two images."""
    out = tmp_path_factory.mktemp("ready") / "out"
    prepare(raw_settings(raw), Location.of(out), rows_per_shard=2, console=Console(file=io.StringIO()))
    return out


@pytest.fixture
def copy(ready: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(ready, tmp_path / "copy"))


@pytest.fixture
def samples(tmp_path: Path) -> SampleTable:
    """Five photographs with unknown labels among their targets."""
    uris = [str(make_photo(tmp_path / f"photos/{row}.jpg", row)) for row in range(5)]
    targets = np.array([[1, 0], [0, 1], [-1, 1], [1, 1], [0, -1]], np.int8)
    return SampleTable.from_columns([f"id{row}" for row in range(5)], uris, targets, ("cat", "dog"), "made")


def writer(root: Path | str, **changes: object) -> ShardWriter:
    fields: dict[str, object] = {"rows_per_shard": 3, "short_side": None, "max_pixels": 10**6, **changes}
    return ShardWriter(Location.of(root), "train", ("cat", "dog"), "plan", **fields)  # type: ignore[arg-type]


# One shard


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_a_shard_gives_each_image_back_to_the_byte(samples: SampleTable, tmp_path: Path, kind: str) -> None:
    root = str(tmp_path / "out") if kind == "path" else f"memory://{tmp_path.name}"
    for number, size in enumerate((3, 2)):
        record = writer(root).finish(samples.table, number)
        assert record.rows == tuple(range(3 * number, 3 * number + size))
        shard = shard_file(Location.of(root), "train", number)
        assert record.size == len(shard.read_bytes())
        for row, offset, length in zip(record.rows, record.offsets, record.lengths, strict=True):
            original = Path(samples.table["uri"][row].as_py()).read_bytes()
            assert read_bytes(f"{shard}#bytes={offset}+{length}") == original


def test_a_shard_is_plain_parquet_that_explains_itself(samples: SampleTable, tmp_path: Path) -> None:
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


def test_images_that_are_equal_or_hold_one_another_are_told_apart(tmp_path: Path) -> None:
    """The place of an image is found by its bytes; the same file thrice, and one with another one's bytes at its end."""
    first = make_photo(tmp_path / "a.jpg", 1)
    (tmp_path / "b.jpg").write_bytes(make_photo(tmp_path / "c.jpg", 2).read_bytes() + first.read_bytes())
    uris = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "a.jpg", "a.jpg")]
    table = SampleTable.from_columns(list("abcd"), uris, np.zeros((4, 2), np.int8), ("cat", "dog"), "made")
    record = writer(tmp_path / "out", rows_per_shard=4).finish(table.table, 0)
    assert len(set(record.offsets)) == 4
    data = (tmp_path / "out/train/train-00000.parquet").read_bytes()
    for uri, offset, length in zip(uris, record.offsets, record.lengths, strict=True):
        assert data[offset : offset + length] == Path(uri).read_bytes()


def test_a_whole_shard_is_not_written_again_and_a_damaged_one_is(samples: SampleTable, tmp_path: Path) -> None:
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
    shutil.copy(tmp_path / "train/train-00001.parquet", path)  # the name of one, the content of another
    assert writer(tmp_path).finish(samples.table, 0) == record


def test_larger_images_are_reduced_and_smaller_ones_kept(tmp_path: Path) -> None:
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


def test_an_image_too_long_for_jpeg_keeps_its_bytes(samples: SampleTable, tmp_path: Path) -> None:
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


def test_bad_images_are_left_out_with_their_reason_and_no_path(shared: Path, tmp_path: Path) -> None:
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


def test_a_bad_image_that_was_mended_is_taken_in(samples: SampleTable, tmp_path: Path) -> None:
    image = Path(samples.table["uri"][1].as_py())
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    assert [row for row, _ in writer(tmp_path / "out").finish(samples.table, 0).bad] == [1]
    image.write_bytes(whole)
    record = writer(tmp_path / "out").finish(samples.table, 0)
    assert (record.rows, record.bad) == ((0, 1, 2), ())
    assert files(tmp_path / "out") != {}
    assert record == writer(tmp_path / "out").finish(samples.table, 0)


def test_an_image_that_may_be_read_another_time_is_not_left_out(samples: SampleTable, tmp_path: Path) -> None:
    (tmp_path / "photos/1.jpg").unlink()
    (tmp_path / "photos/1.jpg").mkdir()  # stands for a disk or a network that fails
    with pytest.raises(UserError, match=r"photos/1\.jpg: cannot be read \("):
        writer(tmp_path / "out").finish(samples.table, 0)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_no_shard(samples: SampleTable, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for a full disk: writing fails half-way
    try:
        with pytest.raises(UserError, match=r"train-00000\.parquet: cannot be written \(.*File too large"):
            writer(tmp_path / "out").finish(samples.table, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out/train").iterdir()) == []


# A whole data set


@pytest.mark.ray
def test_splits_targets_and_tensors_are_those_of_the_raw_reader(raw: Path, ready: Path) -> None:
    for protocol in ("honest", "paper"):
        before, after = (
            load_splits(ExperimentConfig(protocol=protocol, data=raw_settings(root, val_fraction=0.3)))  # type: ignore[arg-type]
            for root in (raw, ready)
        )
        for name in ("train", "val", "test") if protocol == "honest" else ("train", "val"):
            theirs, ours = before.named(name), after.named(name)
            assert ours.label_names == theirs.label_names
            assert ours.source == theirs.source
            assert ours.table.drop_columns("uri").equals(theirs.table.drop_columns("uri"))
            rows = np.arange(len(ours))
            for epoch in (None, 3):
                ours_seen, theirs_seen = (
                    decode_rows(one.table, rows, [epoch] * len(rows), raw_settings(raw), seed=5)
                    for one in (ours, theirs)
                )
                np.testing.assert_array_equal(ours_seen["image"], theirs_seen["image"])
                np.testing.assert_array_equal(ours_seen["target"], theirs_seen["target"])
                assert set(ours_seen["error"]) == {""}
        assert [line for line in after.notes if "prepared shards" not in line] == list(before.notes)
        assert any(line.startswith("read from prepared shards (coco, ") for line in after.notes)


@pytest.mark.ray
@pytest.mark.parametrize("form", ["tar", "arrow", "parquet"])
def test_images_in_other_containers_train_after_prepare(local_ray: None, tmp_path: Path, form: str) -> None:
    photos = [make_photo(tmp_path / f"{row}.jpg", row).read_bytes() for row in range(8)]
    labels = [["dog"], ["cat"], ["cat", "dog"], [], ["dog"], ["cat"], ["dog"], ["cat"]]
    root = tmp_path / "raw"
    if form == "tar":
        samples = {
            f"{row}.{kind}": content for row in range(8) for kind, content in as_sample(photos[row], labels[row])
        }
        write_tar(root / "a.tar", samples)
    else:
        images = pa.array([{"bytes": photo, "path": None} for photo in photos])
        table = pa.table({"image": images, "labels": labels})
        if form == "arrow":
            save_to_disk(root, table)
        else:
            root.mkdir()
            pq.write_table(table, root / "a.parquet", row_group_size=3)
    settings = DataSettings.model_validate(
        {
            "dataset": "webdataset" if form == "tar" else "huggingface",
            "root": str(root),
            "image_size": 64,
            "keep_unlabelled_train": True,
        }
    )
    prepare(settings, Location.of(tmp_path / "out"), rows_per_shard=4, console=Console(file=io.StringIO()))
    before, after = (
        read_published(settings.model_copy(update={"root": str(place)})) for place in (root, tmp_path / "out")
    )
    for theirs, ours in ((before.train, after.train), (before.held_out, after.held_out)):
        assert ours.table.drop_columns("uri").equals(theirs.table.drop_columns("uri"))
        stored = [read_bytes(uri) for uri in ours.table["uri"].to_pylist()]
        assert stored == [read_bytes(uri) for uri in theirs.table["uri"].to_pylist()]
        assert set(stored) <= set(photos)
    assert (len(after.train), len(after.held_out)) == (7, 1)


@pytest.mark.ray
def test_a_preset_reads_it_whatever_its_data_set_is(ready: Path) -> None:
    published = read_published(DataSettings(dataset="voc", root=str(ready)))
    assert published.train.label_names == ("apple", "bench", "cat")
    assert published.val is None
    assert len(published.held_out) == 3


@pytest.mark.ray
def test_dataset_json_tells_what_is_there(raw: Path, ready: Path) -> None:
    info = json.loads((ready / "dataset.json").read_text())
    assert info["dataset"] == "coco"
    assert info["label_names"] == ["apple", "bench", "cat"]
    assert info["label_count"] == [3, 3, 3]
    assert info["cooccurrence"] == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    assert info["settings"]["keep_unlabelled_train"] is False
    assert "root" not in info["settings"]
    assert {name: split["images"] for name, split in info["splits"].items()} == {"train": 6, "test": 3}
    sizes = [path.stat().st_size for path in sorted((ready / "train").iterdir())]
    assert info["splits"]["train"]["shard_bytes"] == sizes
    assert len(sizes) == 3
    assert str(raw) not in json.dumps(info), "the same data elsewhere gives the same bytes"
    assert set(files(ready)) == {
        *("dataset.json", "plan.json", "train.index.parquet", "test.index.parquet"),
        *(f"train/train-0000{number}.parquet" for number in range(3)),
        *(f"test/test-0000{number}.parquet" for number in range(2)),
    }


@pytest.mark.ray
@pytest.mark.slow
def test_the_same_input_elsewhere_gives_the_same_bytes_and_a_second_run_mends(
    raw: Path, ready: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(raw, tmp_path / "moved"))
    out = tmp_path / "out"
    lines = io.StringIO()
    prepare(raw_settings(moved), Location.of(out), rows_per_shard=2, console=Console(file=lines))
    assert files(out) == files(ready)
    assert "9/9 images" in lines.getvalue()

    (out / "train/train-00001.parquet").write_bytes(b"damaged")
    (out / "test/test-00000.parquet").unlink()
    (out / "dataset.json").write_text("damaged")
    untouched = (out / "train/train-00000.parquet").stat().st_mtime_ns
    prepare(raw_settings(moved), Location.of(out), rows_per_shard=2, console=Console(file=io.StringIO()))
    assert files(out) == files(ready)
    assert (out / "train/train-00000.parquet").stat().st_mtime_ns == untouched


@pytest.mark.ray
def test_what_was_fixed_then_is_told(copy: Path, raw: Path) -> None:
    notes = read_published(raw_settings(copy, keep_unlabelled_train=True, image_size=96)).train.notes
    (line,) = [line for line in notes if "has no effect" in line]
    assert line == "data.keep_unlabelled_train was False when the data was prepared and stays so; True has no effect"


def test_splits_of_other_labels_are_refused(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "set", {"train": ROWS["train"]})
    shutil.copytree(
        make_coco(tmp_path / "other", {"val": ROWS["val"]}, ("apple", "bench", "dog")), root, dirs_exist_ok=True
    )
    with pytest.raises(UserError, match=r"test split .*: its labels are not those of train .*: only one has cat, dog;"):
        prepare(raw_settings(root), Location.of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_split_without_an_image_is_refused(tmp_path: Path) -> None:
    make_photo(tmp_path / "set/red_dress/a.jpg", 0)
    one = DataSettings(dataset="apparel", root=str(tmp_path / "set"), image_size=64)
    with pytest.raises(UserError, match=r"test split .*: holds no image; add images"):
        prepare(one, Location.of(tmp_path / "out"))
    unlabelled = raw_settings(make_coco(tmp_path / "coco", {"train": ROWS["train"], "val": [[], []]}))
    with pytest.raises(UserError, match="no image is left to use"):
        prepare(unlabelled.model_copy(update={"keep_unlabelled_eval": False}), Location.of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_few_bad_images_are_listed_and_many_stop_it(local_ray: None, raw: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(raw, tmp_path / "rotten"))
    victims = sorted((root / "train2014").glob("*.jpg"))[1:3]
    victims[0].write_bytes(b"")
    victims[1].write_text("text")
    out, quiet = Location.of(tmp_path / "out"), Console(file=io.StringIO())
    with pytest.raises(BadImagesError, match=r"of 6 train images cannot be decoded.*max_bad_fraction=0\.01") as caught:
        prepare(raw_settings(root), out, rows_per_shard=2, console=quiet)
    assert any(str(victim) in str(caught.value) for victim in victims)
    with pytest.raises(UserError, match="has not finished here; run the same `msrn prepare` again"):
        read_published(raw_settings(tmp_path / "out"))

    info = prepare(raw_settings(root, max_bad_fraction=0.5), out, rows_per_shard=2, console=quiet)
    assert (info.splits["train"].images, info.splits["train"].bad_images) == (4, 2)
    assert (tmp_path / "out/bad_images.csv").read_text().splitlines() == [
        "split,image_id,reason",
        "train,1001,the file is empty",
        "train,1002,not an image of a known format",
    ]
    published = read_published(raw_settings(tmp_path / "out"))
    assert published.train.table["image_id"].to_pylist() == ["1000", "1003", "1005", "1006"]
    assert published.train.notes[1] == "train: 2 images that could not be read are not in the shards (bad_images.csv)"
    assert info.label_count == (2, 1, 3)

    for victim in victims:  # mended: the same command takes them in
        shutil.copyfile(raw / "train2014" / victim.name, victim)
    assert prepare(raw_settings(root), out, rows_per_shard=2, console=quiet).splits["train"].images == 6
    assert not (tmp_path / "out/bad_images.csv").exists()


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(400)
def test_killed_half_way_and_started_again_gives_the_same_bytes(local_ray: None, tmp_path: Path) -> None:
    root = make_coco(tmp_path / "raw", {"train": [[row % 3] for row in range(24)], "val": [[0], [1], [2]]})
    held_up = root / "train2014/train_012.jpg"
    photo = held_up.read_bytes()
    held_up.unlink()
    os.mkfifo(held_up)  # who reads it waits for ever, so the run cannot end
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "msrn_ray", "prepare", "coco2014", "--data.root", str(root)),
            *("--rows-per-shard", "1", "--out", str(killed)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    deadline = time.monotonic() + 240  # a busy machine takes long to start it
    while len(list(killed.glob("train/*.parquet"))) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    done = {path: path.stat().st_mtime_ns for path in killed.glob("train/*.parquet")}
    assert 8 <= len(done) < 24, output
    assert not (killed / "dataset.json").exists()
    with pytest.raises(UserError, match="has not finished here; run the same `msrn prepare` again"):
        read_published(raw_settings(killed))

    held_up.unlink()
    held_up.write_bytes(photo)
    for out in (killed, tmp_path / "whole"):
        prepare(raw_settings(root), Location.of(out), rows_per_shard=1, console=Console(file=io.StringIO()))
    assert files(killed) == files(tmp_path / "whole")
    assert [path.name for path, stamp in done.items() if path.stat().st_mtime_ns != stamp] == [], "not written again"


@pytest.mark.ray
@pytest.mark.parametrize("named", [True, False])
def test_own_images_without_a_test_split(local_ray: None, tmp_path: Path, named: bool) -> None:
    labels = ["dog", "cat", "dog;cat", "cat"] * 5
    lines = [
        f"{make_photo(tmp_path / f'{row:02}.jpg', row).name},{one}" + f",{('train', 'val')[row % 2]}" * named
        for row, one in enumerate(labels)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["image,labels" + ",split" * named, *lines]))
    settings = DataSettings(dataset="manifest", root=str(tmp_path / "labels.csv"), test_fraction=0, image_size=64)
    out = Location.of(tmp_path / "out")
    info = prepare(settings, out, rows_per_shard=8, console=Console(file=io.StringIO()))
    assert {name: split.images for name, split in info.splits.items()} == (
        {"train": 10, "val": 10} if named else {"train": 20}
    )
    before, after = (
        load_splits(ExperimentConfig(data=settings.model_copy(update={"root": str(place)})))
        for place in (settings.root, out)
    )
    assert (before.test, after.test) == (None, None)
    for name in ("train", "val"):
        assert after.named(name).table.drop_columns("uri").equals(before.named(name).table.drop_columns("uri"))
    assert any(line.startswith("there is no test split: ") for line in after.notes)


@pytest.mark.ray
def test_the_command_says_what_is_there_and_how_to_train(
    local_ray: None, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Prepare("coco2014", str(tmp_path / "my out"), rows_per_shard=4, data=raw_settings(raw)).run()
    lines = capsys.readouterr().out.splitlines()
    size = sum(path.stat().st_size for path in (tmp_path / "my out/train").iterdir())
    assert lines[-7].startswith("9/9 images  ")
    assert lines[-6:-3] == [
        "train2014: 6 of 7 images, 1 without a label dropped",
        f"train: 6 images, {size / 1e6:.1f} MB in 2 shards",
        "val2014: 3 images, 0 without a label kept",
    ]
    assert re.fullmatch(r"test: 3 images, 0\.0 MB in 1 shard", lines[-3])
    assert re.fullmatch(r"3 labels, content [0-9a-f]{12}, \d+ s", lines[-2])
    assert lines[-1] == f"train on it with: msrn train coco2014 --data.root '{tmp_path}/my out'"


@pytest.mark.ray
def test_a_terminal_gets_a_bar(local_ray: None, raw: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    prepare(raw_settings(raw), Location.of(tmp_path / "out"), rows_per_shard=2, console=console)
    assert "━" in screen.getvalue()
    assert "9/9 " in screen.getvalue()


# What can be wrong with a prepared folder


@pytest.fixture
def info(copy: Path) -> PreparedInfo:
    found = read_info(Location.of(copy))
    assert found is not None
    return found


@pytest.mark.ray
def test_damage_is_named_with_its_mend(copy: Path, info: PreparedInfo) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            read_published(raw_settings(copy))

    root = Location.of(copy)
    for place, match in (
        (shard_file(root, "train", 1), r"train-00001\.parquet: .*run the same `msrn prepare` again"),
        (index_file(root, "test"), r"test\.index\.parquet: damaged.*run the same `msrn prepare` again"),
    ):
        path = Path(str(place))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        refused(match)
        path.unlink()
        refused(match)
        path.write_bytes(whole)
    shutil.copy(copy / "test.index.parquet", copy / "train.index.parquet")
    refused(r"train\.index\.parquet: does not fit dataset\.json")

    content = json.loads((copy / "dataset.json").read_text())
    for change, match in (
        ({"version": 2}, r"dataset\.json: format version 2, this msrn_ray reads 1; install the one that wrote it"),
        ({"label_names": 3}, r"dataset\.json: damaged \(label_names: .*run the same `msrn prepare` again"),
        ({"splits": {"validation": {}}}, r"dataset\.json: damaged \(splits"),
    ):
        (copy / "dataset.json").write_text(json.dumps(content | change))
        refused(match)
    (copy / "dataset.json").write_text(json.dumps(content)[:200])
    refused(r"dataset\.json: damaged \(.*run the same `msrn prepare` again")
    (copy / "dataset.json").unlink()
    refused("has not finished here")


def test_a_dataset_json_of_others_is_none_of_ours(raw: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(raw, tmp_path / "set"))
    for text in ('{"images": []}', "[1]"):
        (root / "dataset.json").write_text(text)
        assert len(read_published(raw_settings(root)).train) == 6


@pytest.mark.ray
def test_an_out_folder_of_something_else_is_refused(raw: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not empty and no prepared data set; give a new or empty folder"):
        prepare(raw_settings(raw), Location.of(raw))
    before = files(copy)
    for changes in ({"rows_per_shard": 3}, {"rows_per_shard": 2, "short_side": 32}):
        with pytest.raises(UserError, match="holds another data set, or this one with other labels or settings"):
            prepare(raw_settings(raw), Location.of(copy), **changes)
    with pytest.raises(UserError, match="holds another data set"):
        prepare(raw_settings(raw, keep_unlabelled_train=True), Location.of(copy), rows_per_shard=2)
    assert files(copy) == before
    with pytest.raises(UserError, match="is prepared already; give the data set that it was prepared from"):
        prepare(raw_settings(copy), Location.of(tmp_path / "again"))
    (copy / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"plan\.json: damaged \(.*; empty the folder and run"):
        prepare(raw_settings(raw), Location.of(copy), rows_per_shard=2)


def test_a_place_that_cannot_be_written(s3_keys: None, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="is not empty and no prepared data set"):
        prepare(raw_settings(raw), Location.of(tmp_path / "file"))
    for place in (tmp_path / "file" / "out", "/proc/msrn", "s3://bucket/a?endpoint_override=127.0.0.1:9&scheme=http"):
        with pytest.raises(UserError, match=r"plan\.json.*: cannot be (written|reached) \("):
            prepare(raw_settings(raw), Location.of(place))


@pytest.mark.ray
def test_uris_carry_shard_offset_and_length(ready: Path) -> None:
    uris = read_published(raw_settings(ready)).train.table["uri"].to_pylist()
    assert all(re.fullmatch(r".*\.parquet#bytes=\d+\+\d+", uri) for uri in uris)
    assert uris[2].startswith(f"{ready}/train/train-00001.parquet#bytes=")
