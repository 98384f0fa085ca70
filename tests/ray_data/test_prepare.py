"""`msrn prepare`: the same data as the raw reader, the same bytes after an interruption, bad images listed."""

from __future__ import annotations

import io
import json
import os
import re
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
from rich.console import Console

from msrn_ray.cli.data import Prepare
from msrn_ray.config import ExperimentConfig
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.registry import read_published
from msrn_ray.errors import BadImagesError, UserError
from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.io.storage import Location
from msrn_ray.ray_data.pipeline import decode_rows
from msrn_ray.ray_data.prepare import prepare
from tests.datasets.container_files import save_to_disk, write_tar
from tests.tiny import make_coco, make_photo

from .prepared_example import ROWS, files, raw_settings


@pytest.mark.ray
def test_prepared_data_equals_the_raw_data(raw: Path, ready: Path) -> None:
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
                    decode_rows(table.table, rows, [epoch] * len(rows), raw_settings(raw), seed=5)
                    for table in (ours, theirs)
                )
                np.testing.assert_array_equal(ours_seen["image"], theirs_seen["image"])
                np.testing.assert_array_equal(ours_seen["target"], theirs_seen["target"])
                assert set(ours_seen["error"]) == {""}
        assert [line for line in after.notes if "prepared shards" not in line] == list(before.notes)
        assert any(line.startswith("read from prepared shards (coco, ") for line in after.notes)


@pytest.mark.ray
@pytest.mark.parametrize("form", ["tar", "arrow", "parquet"])
def test_images_from_other_containers_are_prepared(local_ray: None, tmp_path: Path, form: str) -> None:
    photos = [make_photo(tmp_path / f"{row}.jpg", row).read_bytes() for row in range(8)]
    labels = [["dog"], ["cat"], ["cat", "dog"], [], ["dog"], ["cat"], ["dog"], ["cat"]]
    root = tmp_path / "raw"
    if form == "tar":
        samples = {}
        for row, (photo, names) in enumerate(zip(photos, labels, strict=True)):
            samples |= {f"{row}.jpg": photo, f"{row}.json": json.dumps({"labels": names}).encode()}
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
def test_any_preset_reads_prepared_data(ready: Path) -> None:
    published = read_published(DataSettings(dataset="voc", root=str(ready)))
    assert published.train.label_names == ("apple", "bench", "cat")
    assert published.val is None
    assert len(published.held_out) == 3


@pytest.mark.ray
def test_dataset_json_describes_the_content(raw: Path, ready: Path) -> None:
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
def test_same_bytes_elsewhere_and_after_damage(raw: Path, ready: Path, tmp_path: Path) -> None:
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
def test_setting_without_effect_is_reported(copy: Path, raw: Path) -> None:
    notes = read_published(raw_settings(copy, keep_unlabelled_train=True, image_size=96)).train.notes
    (line,) = [line for line in notes if "has no effect" in line]
    assert line == "data.keep_unlabelled_train was False when the data was prepared and stays so; True has no effect"


def test_splits_with_different_labels_are_refused(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "set", {"train": ROWS["train"]})
    shutil.copytree(
        make_coco(tmp_path / "other", {"val": ROWS["val"]}, ("apple", "bench", "dog")), root, dirs_exist_ok=True
    )
    with pytest.raises(
        UserError, match=r"test split .*: its labels differ from those of train .*: only one of them has cat, dog;"
    ):
        prepare(raw_settings(root), Location.of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_split_without_an_image_is_refused(tmp_path: Path) -> None:
    make_photo(tmp_path / "set/red_dress/a.jpg", 0)
    settings = DataSettings(dataset="apparel", root=str(tmp_path / "set"), image_size=64)
    with pytest.raises(UserError, match=r"test split .*: holds no image; add images"):
        prepare(settings, Location.of(tmp_path / "out"))
    unlabelled = raw_settings(make_coco(tmp_path / "coco", {"train": ROWS["train"], "val": [[], []]}))
    with pytest.raises(UserError, match="no image is left to use"):
        prepare(unlabelled.model_copy(update={"keep_unlabelled_eval": False}), Location.of(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_few_bad_images_are_listed_many_refused(local_ray: None, raw: Path, tmp_path: Path) -> None:
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

    for victim in victims:  # once they are fixed, the same command includes them
        shutil.copyfile(raw / "train2014" / victim.name, victim)
    assert prepare(raw_settings(root), out, rows_per_shard=2, console=quiet).splits["train"].images == 6
    assert not (tmp_path / "out/bad_images.csv").exists()


@pytest.mark.ray
@pytest.mark.faults
@pytest.mark.timeout(400)
def test_resume_after_sigkill_gives_the_same_bytes(local_ray: None, tmp_path: Path) -> None:
    root = make_coco(tmp_path / "raw", {"train": [[row % 3] for row in range(24)], "val": [[0], [1], [2]]})
    held_up = root / "train2014/train_012.jpg"
    photo = held_up.read_bytes()
    held_up.unlink()
    os.mkfifo(held_up)  # a reader of the pipe waits forever, so the run cannot end
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
    deadline = time.monotonic() + 240  # a busy machine starts it slowly
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
def test_custom_images_without_a_test_split(local_ray: None, tmp_path: Path, named: bool) -> None:
    labels = ["dog", "cat", "dog;cat", "cat"] * 5
    lines = [
        f"{make_photo(tmp_path / f'{row:02}.jpg', row).name},{names}" + f",{('train', 'val')[row % 2]}" * named
        for row, names in enumerate(labels)
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
def test_command_prints_content_and_train_command(
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
def test_terminal_shows_a_progress_bar(local_ray: None, raw: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    prepare(raw_settings(raw), Location.of(tmp_path / "out"), rows_per_shard=2, console=console)
    assert "━" in screen.getvalue()
    assert "9/9 " in screen.getvalue()
