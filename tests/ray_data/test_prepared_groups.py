"""Prepared shards keep the groups of their images, so that val is drawn by group from them too. Written here without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from msrn_ray.config import ExperimentConfig
from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets import prepared
from msrn_ray.datasets.protocol import load_splits
from msrn_ray.datasets.registry import read_published, reader_settings
from msrn_ray.datasets.shard_writer import ShardWriter
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location
from msrn_ray.ray_data.prepare import _describe, _write_index, _WrittenSplit
from tests.tiny import make_photo


def write_shards(settings: DataSettings, out: Location) -> None:
    """Do as `prepare` does, without Ray, in one shard per split."""
    tables, written = read_published(settings).tables, {}
    for name, table in tables.items():
        record = ShardWriter(out, name, table.label_names, "plan", 1000, None, 10**6).finish(table.table, 0)
        places = np.array([record.rows, [0] * len(record.rows), record.offsets, record.lengths], np.int64).T
        written[name] = _WrittenSplit(places, (), (record.size,), (record.content,))
        _write_index(out, name, table, written[name])
    request = {"version": prepared.VERSION, "dataset": "manifest", "settings": reader_settings(settings)}
    info = _describe(request | {"short_side": None, "rows_per_shard": 1000, "plan": "plan"}, tables, written)
    (out / prepared.INFO_FILE).write_bytes(json.dumps(info.model_dump(mode="json")).encode())


@pytest.fixture
def manifest(tmp_path: Path) -> DataSettings:
    """40 images of 10 patients."""
    lines = ["image,labels,patient"]
    for row in range(40):
        make_photo(tmp_path / f"{row}.jpg", row)
        lines.append(f"{row}.jpg,{('cat', 'dog', 'cat;dog')[row % 3]},p{row // 4}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return DataSettings(dataset="manifest", root=str(tmp_path / "labels.csv"), test_fraction=0.2, val_fraction=0.25)


@pytest.mark.parametrize("requested", ["patient", None])
def test_val_is_drawn_by_group_from_shards(manifest: DataSettings, tmp_path: Path, requested: str | None) -> None:
    grouped = manifest.model_copy(update={"group_column": "patient"})
    write_shards(grouped, Location.of(tmp_path / "shards"))
    again = grouped.model_copy(update={"root": str(tmp_path / "shards"), "group_column": requested})
    before, after = (load_splits(ExperimentConfig(data=settings)) for settings in (grouped, again))
    assert list(after.tables) == ["train", "val", "test"]
    for ours, theirs in zip(after.tables.values(), before.tables.values(), strict=True):
        assert ours.table.drop_columns("uri").equals(theirs.table.drop_columns("uri"))
    groups = [set(table.table["group"].to_pylist()) for table in after.tables.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 10


def test_shards_without_groups_are_refused(manifest: DataSettings, tmp_path: Path) -> None:
    write_shards(manifest, Location.of(tmp_path / "shards"))
    asked = manifest.model_copy(update={"root": str(tmp_path / "shards"), "group_column": "patient"})
    with pytest.raises(UserError, match=r"data\.group_column 'patient': .*`msrn prepare` keeps the groups"):
        read_published(asked)
