"""Writes manifests in every form, for the tests of their reader."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msrn_ray.config import ExperimentConfig
from msrn_ray.datasets.protocol import Splits, load_splits
from msrn_ray.io.storage import Location
from msrn_ray.types import SampleTable

Rows = Sequence[Mapping[str, Any]]


def write_csv(path: Path, rows: Rows, delimiter: str = ",") -> Path:
    """Write with the standard library, independent of the reader; lists become text with `;`."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(
            {key: ";".join(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
        )
    return path


def write_json_csv(path: Path, rows: Rows) -> Path:
    texts = [
        {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
    ]
    return write_csv(path, texts)


def write_jsonl(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=50)
    return path


FORMS: dict[str, tuple[str, Callable[[Path, Rows], Path]]] = {
    "csv": ("labels.csv", write_csv),
    "tsv": ("labels.tsv", lambda path, rows: write_csv(path, rows, "\t")),
    "semicolons": ("labels.CSV", lambda path, rows: write_csv(path, as_columns(rows), ";")),
    "columns": ("labels.csv", lambda path, rows: write_csv(path, as_columns(rows))),
    "json in csv": ("labels.csv", write_json_csv),
    "jsonl": ("labels.jsonl", write_jsonl),
    "jsonl columns": ("labels.ndjson", lambda path, rows: write_jsonl(path, as_columns(rows))),
    "parquet": ("labels.parquet", write_parquet),
    "parquet columns": ("labels.pq", lambda path, rows: write_parquet(path, as_columns(rows))),
}


def as_columns(rows: Rows) -> list[dict[str, Any]]:
    """Turn the lists in `labels` into one column of 1 and 0 per label."""
    names = {name: None for row in rows for name in row["labels"]}
    others = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    return [
        other | {name: int(name in row["labels"]) for name in names} for other, row in zip(others, rows, strict=True)
    ]


def make(folder: Path, text: str | bytes, name: str = "labels.csv", images: str = "abcd") -> Location:
    """Write a manifest unchanged, and the images a.jpg, b.jpg, ... beside it."""
    for image in images:
        (folder / f"{image}.jpg").touch()
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Location.of(folder / name)


def present(samples: SampleTable) -> dict[str, set[str]]:
    """Return the labels of each image id."""
    return {
        image: {name for name, value in zip(samples.label_names, row, strict=True) if value == 1}
        for image, row in zip(samples.table["image_id"].to_pylist(), samples.targets, strict=True)
    }


def splits_of(place: Location, **data: Any) -> Splits:
    overrides = {"data.dataset": "manifest", "data.root": str(place)}
    return load_splits(ExperimentConfig().with_overrides(overrides | {f"data.{key}": data[key] for key in data}))


def ids(table: SampleTable | None) -> list[str]:
    assert table is not None
    column: list[str] = table.table["image_id"].to_pylist()
    return column
