"""Writes tars, Arrow and Parquet files, for the tests of their readers."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from msrn_ray.io.byte_ranges import read_bytes
from msrn_ray.types import SampleTable
from tests.tiny import make_picture

NAMES = ("cat", "dog", "owl")


LABELS = [["dog"], [], ["cat", "owl"], ["owl"], ["dog", "cat"]]


TARGETS = [[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0]]


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    make_picture(seed).save(file, "JPEG")
    return file.getvalue()


def targets_and_images(table: SampleTable) -> tuple[list[list[int]], list[bytes]]:
    return table.targets.tolist(), [read_bytes(uri) for uri in table.table["uri"].to_pylist()]


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def as_json(value: object, name: str = "labels") -> bytes:
    return json.dumps({name: value, "width": 48}).encode()


CLASSES = {"feature": {"names": ["owl", "cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}


def arrow_table(
    labels: Any, features: Mapping[str, Any] | None, rows: Sequence[int] = range(5), **more: Any
) -> pa.Table:
    images = pa.array(
        [{"bytes": picture(row), "path": None} for row in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({"image": images, "labels": labels, **more})
    if features is None:
        return table
    metadata = {"info": {"features": {"image": {"_type": "Image"}, "labels": features}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(metadata)})


def numbers(rows: Sequence[int] = range(5)) -> pa.Array:
    return pa.array([[["owl", "cat", "dog"].index(name) for name in LABELS[row]] for row in rows], pa.list_(pa.int64()))


def save_to_disk(folder: Path, table: pa.Table, batch: int = 2, files: int = 1) -> Path:
    """Write one split as `datasets` does."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    step = -(-len(table) // files)
    for number, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.slice(number * step, step), max_chunksize=batch)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train"})
    )
    return folder


def save_dictionary(root: Path, **splits: pa.Table) -> Path:
    for name, table in splits.items():
        save_to_disk(root / name, table, files=2)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return root
