"""The same photographs, read in four ways from this machine and from S3, give the same data set."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from rich.console import Console

from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.protocol import fingerprint
from msrn_ray.datasets.registry import PublishedSplits, read_published
from msrn_ray.io.filesystems import filesystem_of
from msrn_ray.io.storage import Location
from msrn_ray.ray_data.pipeline import decode_rows
from msrn_ray.ray_data.prepare import prepare

NUM_IMAGES = 12  # per split


def copy_some(source: Path, target: Path) -> Path:
    """Copy the first photographs of both splits of COCO, and their labels."""
    (target / "annotations").mkdir(parents=True)
    for split in ("train2014", "val2014"):
        content = json.loads((source / f"annotations/instances_{split}.json").read_text())
        content["images"] = content["images"][:NUM_IMAGES]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
        (target / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        (target / split).mkdir()
        for image in content["images"]:
            shutil.copy(source / split / image["file_name"], target / split)
    return target


def write_manifest(published: PublishedSplits, folder: Path) -> DataSettings:
    """Write a CSV with the images of both splits, and the file of all labels in their order."""
    names = published.train.label_names
    (folder / "names.txt").write_text("\n".join(names), encoding="utf-8")
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "image", "labels", "split"])
        assert published.held_out is not None
        for split, table in (("train", published.train), ("test", published.held_out)):
            ids, uris = (table.table[column].to_pylist() for column in ("image_id", "uri"))
            for image_id, uri, target in zip(ids, uris, table.targets, strict=True):
                labels = [name for name, value in zip(names, target, strict=True) if value == 1]
                rows.writerow([image_id, uri, ";".join(labels), split])
    return DataSettings(dataset="manifest", root=str(folder / "labels.csv"), labels=str(folder / "names.txt"))


def content_of(place: Location) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in place.names(recursive=True) if not name.endswith("/")}


@pytest.mark.ray
@pytest.mark.slow
def test_all_forms_give_equal_tensors_and_targets(
    local_ray: None, s3_bucket: Location, shared: Path, tmp_path: Path
) -> None:
    local = copy_some(shared / "data/coco_mini", tmp_path / "coco")
    remote = s3_bucket / "same/coco"
    filesystem, path = filesystem_of(str(remote))
    pafs.copy_files(str(local), path, pafs.LocalFileSystem(), filesystem)
    kept = {"keep_unlabelled_train": True, "image_size": 64}
    raw = DataSettings(dataset="coco", root=str(local)).model_copy(update=kept)
    on_s3 = raw.model_copy(update={"root": str(remote)})
    expected = read_published(raw)

    prepared = {"local": Location.of(tmp_path / "prepared"), "s3": s3_bucket / "same/prepared"}
    for settings, out in zip((raw, on_s3), prepared.values(), strict=True):  # from S3 to S3
        prepare(settings, out, rows_per_shard=5, console=Console(file=io.StringIO()))
    shards = content_of(prepared["local"])
    assert len(shards) == 2 * (3 + 1) + 2, "three shards and an index of each split, plan.json and dataset.json"
    assert content_of(prepared["s3"]) == shards, "the location does not change the bytes"

    forms = {
        "manifest": write_manifest(expected, tmp_path).model_copy(update=kept),
        "raw on S3": on_s3,
        "prepared": raw.model_copy(update={"root": str(prepared["local"])}),
        "prepared on S3": raw.model_copy(update={"root": str(prepared["s3"])}),
    }
    rows = np.arange(NUM_IMAGES)
    for form, settings in forms.items():
        found = read_published(settings)
        for reference, table in ((expected.train, found.train), (expected.held_out, found.held_out)):
            assert reference is not None
            assert table is not None, form
            assert len(table) == NUM_IMAGES
            assert fingerprint(table) == fingerprint(reference), form  # label names, ids, targets
            for epoch in (None, 1):
                seen = [decode_rows(part.table, rows, [epoch] * len(rows), raw, seed=3) for part in (reference, table)]
                assert set(seen[1]["error"]) == {""}, form
                np.testing.assert_array_equal(seen[1]["image"], seen[0]["image"], err_msg=form)
                np.testing.assert_array_equal(seen[1]["target"], seen[0]["target"], err_msg=form)
