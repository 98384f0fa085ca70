"""A prepared folder that is damaged, or holds something else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msrn_ray.datasets import prepared
from msrn_ray.datasets.prepared import PreparedInfo, index_file, read_info, shard_file
from msrn_ray.datasets.registry import read_published
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.ray_data.prepare import prepare

from .prepared_example import files, raw_settings


@pytest.fixture
def info(copy: Path) -> PreparedInfo:
    found = read_info(Location.of(copy))
    assert found is not None
    return found


@pytest.mark.ray
def test_damage_is_named_with_its_fix(copy: Path, info: PreparedInfo) -> None:
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
        ({"version": 2}, r"dataset\.json: format version 2, this msrn_ray reads 1; install the msrn_ray that wrote it"),
        ({"label_names": 3}, r"dataset\.json: damaged \(label_names: .*run the same `msrn prepare` again"),
        ({"splits": {"validation": {}}}, r"dataset\.json: damaged \(splits"),
    ):
        (copy / "dataset.json").write_text(json.dumps(content | change))
        refused(match)
    (copy / "dataset.json").write_text(json.dumps(content)[:200])
    refused(r"dataset\.json: damaged \(.*run the same `msrn prepare` again")
    (copy / "dataset.json").unlink()
    refused("has not finished here")


def test_dataset_json_of_other_tools_is_ignored(raw: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(raw, tmp_path / "set"))
    for text in ('{"images": []}', "[1]"):
        (root / "dataset.json").write_text(text)
        assert len(read_published(raw_settings(root)).train) == 6


@pytest.mark.ray
def test_out_folder_with_other_content_is_refused(raw: Path, copy: Path, tmp_path: Path) -> None:
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


def test_out_folder_that_cannot_be_written(s3_keys: None, raw: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("length", "fits"), [(5, True), (6, False)])
def test_index_past_the_end_of_a_shard_is_refused(tmp_path: Path, length: int, fits: bool) -> None:
    root = Location.of(tmp_path)
    prepared.shard_file(root, "train", 0).write_bytes(b"0123456789")
    columns = {"image_id": ["x"], "shard": pa.array([0], pa.int32()), "offset": [5], "length": [length]}
    index = pa.table({**columns, "target": pa.array([[1]], pa.list_(pa.int8(), 1))})
    pq.write_table(index, tmp_path / "train.index.parquet")
    info = prepared.PreparedInfo(
        format=prepared.FORMAT,
        version=prepared.VERSION,
        dataset="coco",
        settings={},
        short_side=None,
        rows_per_shard=1,
        label_names=("a",),
        label_count=(1,),
        cooccurrence=((0,),),
        splits={
            "train": prepared.PreparedSplit(source="s", notes=(), images=1, bad_images=0, shard_bytes=(10,)),
        },
        plan="",
        content="",
    )
    if fits:
        assert len(prepared.read_prepared(root, info)["train"]) == 1
    else:
        with pytest.raises(UserError, match="does not fit"):
            prepared.read_prepared(root, info)
