"""Time and peak memory of reading a manifest of a million rows, form by form.

    python -m tests.benchmarks.manifest [--rows N] [--folder DIR]

A new process reads each form. Memory is the largest resident size of the whole process, including imports (the first row of the table).
`splits` has no column of splits, so that test and val are drawn too, and reads as training does. `files` names empty files on this disk,
1,000 per folder, which the reader looks for.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

NUM_LABELS, MEAN_LABELS = 80, 2.9  # as COCO
BLOCK = 50_000
FORMS = ("import", "csv", "json in csv", "columns", "jsonl", "parquet", "parquet columns", "splits", "files")


def blocks(num_rows: int, prefix: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield paths, and targets [BLOCK, C] that are the same in every run."""
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, BLOCK):
        rows = range(start, min(start + BLOCK, num_rows))
        yield (
            [f"{prefix}{row // 1000:06}/photograph_{row:012}.jpg" for row in rows],
            (rng.random((len(rows), NUM_LABELS)) < MEAN_LABELS / NUM_LABELS).astype(np.int8),
        )


def write(form: str, folder: Path, num_rows: int) -> Path:
    """Write the manifest of a form; return its path."""
    names = np.array([f"label {number:02}" for number in range(NUM_LABELS)])
    if form.endswith("columns"):
        path = folder / ("labels.parquet" if "parquet" in form else "labels.csv")
    else:
        path = folder / {"jsonl": "labels.jsonl", "parquet": "labels.parquet"}.get(form, "labels.csv")
    prefix = "images/" if form == "files" else "s3://bucket/images/"
    writer = None
    with path.open("wb") as file:
        for paths, targets in blocks(num_rows, prefix):
            if form == "files":
                for path_in_folder in paths:
                    (folder / path_in_folder).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path_in_folder).touch()
            if form.endswith("columns"):
                table = pa.table({"image": paths} | dict(zip(names, targets.T, strict=True)))
            else:
                lists = [names[row.astype(bool)].tolist() for row in targets]
                text = {"csv": ";".join, "splits": ";".join, "files": ";".join}.get(form, _json)
                table = pa.table(
                    {"image": paths, "labels": lists if form == "parquet" else [text(labels) for labels in lists]}
                )
            if form not in ("splits", "files"):
                table = table.append_column(
                    "split", pa.array([("train", "val", "test", "train")[n % 4] for n in range(len(paths))])
                )
            if form == "jsonl":
                file.writelines(
                    f'{{"image": "{image}", "labels": {labels}, "split": "{split}"}}\n'.encode()
                    for image, labels, split in zip(
                        *(table[name].to_pylist() for name in table.column_names), strict=True
                    )
                )
                continue
            if writer is None:
                writer = (
                    pq.ParquetWriter(file, table.schema)
                    if path.suffix == ".parquet"
                    else pa_csv.CSVWriter(file, table.schema)
                )
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return path


def _json(labels: list[str]) -> str:
    return "[" + ", ".join(f'"{label}"' for label in labels) + "]"


def measure(form: str, place: str) -> None:
    """Read in this process; print time and memory."""
    from msrn_ray.config import ExperimentConfig
    from msrn_ray.datasets.manifest import read_manifest
    from msrn_ray.datasets.protocol import load_splits
    from msrn_ray.io.storage import Location

    start, start_cpu = time.perf_counter(), time.process_time()
    if form == "splits":
        overrides = {"data.dataset": "manifest", "data.root": place, "data.keep_unlabelled_train": True}
        splits = load_splits(ExperimentConfig().with_overrides(overrides))
        num_rows = sum(len(splits.named(name)) for name in ("train", "val", "test"))
    else:
        num_rows = len(read_manifest(Location.of(place)).samples) if form != "import" else 0
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = Path(place).stat().st_size / 2**20 if form != "import" else 0
    print(
        f"{form:<16}{num_rows:>10,} rows{size:>8.0f} MB file{seconds:>8.2f} s ({cpu:.2f} s of CPU){peak:>7.2f} GB peak",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", help="folder for the temporary files; default: the system's")
    options = parser.parse_args()
    for form in FORMS:
        with TemporaryDirectory(dir=options.folder) as folder:
            place = str(write(form, Path(folder), options.rows)) if form != "import" else ""
            code = f"from tests.benchmarks.manifest import measure; measure({form!r}, {place!r})"
            subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
