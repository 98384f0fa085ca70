"""Seconds and peak memory of the readers on synthetic label files of the benchmarks' size; images are empty files.

    python -m tests.benchmarks.readers

Each reader runs in a new process, so that its peak memory is not that of another reader. The peak includes libraries.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msrn_ray.datasets.coco import read_coco
from msrn_ray.datasets.nuswide import CSV_FILE, NUSWIDE_LABELS, read_nuswide
from msrn_ray.datasets.voc import VOC_LABELS, read_voc
from msrn_ray.io.storage import Location
from msrn_ray.official import COCO_LABELS
from msrn_ray.types import SampleTable

NUM_COCO_IMAGES, NUM_COCO_ANNOTATIONS = 82_783, 604_907  # train2014
MEAN_CORNERS = 25  # per outline; gives the 330 MB of the published file
NUM_VOC_IMAGES = 5_011  # trainval of 2007
NUM_NUS_OFFICIAL, NUM_NUS_CSV = 161_789, 150_000


class Measured(NamedTuple):
    """Rows read, wall and CPU seconds, and the peak memory before and after in MB."""

    rows: int
    seconds: float
    cpu_seconds: float
    peak_before: float
    peak_after: float


def measure(read: Callable[[], SampleTable]) -> Measured:
    """Measure `read` in a new process. Other load on the machine changes CPU seconds less than wall seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (read,))


def run(read: Callable[[], SampleTable]) -> Measured:
    before = peak_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    samples = read()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Measured(len(samples), seconds, cpu_seconds, before, peak_mb())


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def touch(folder: Path, names: list[str]) -> None:
    for inner in {Path(name).parent for name in names}:
        (folder / inner).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write_coco(root: Path) -> Path:
    """Write instances with outlines as long as the published ones; most of the file is numbers that no label needs."""
    rng = np.random.default_rng(0)
    names = [f"COCO_train2014_{number:012}.jpg" for number in range(NUM_COCO_IMAGES)]
    touch(root / "train2014", names)
    images = [{"id": number, "file_name": name, "width": 640, "height": 480} for number, name in enumerate(names)]
    categories = [{"id": number, "name": name, "supercategory": "x"} for number, name in enumerate(COCO_LABELS, 1)]
    pool = [float(value) for value in rng.uniform(0, 640, 100_000).round(2)]
    image = rng.integers(0, NUM_COCO_IMAGES, NUM_COCO_ANNOTATIONS).tolist()
    category = rng.integers(1, len(categories) + 1, NUM_COCO_ANNOTATIONS).tolist()
    corners = rng.integers(3, 2 * MEAN_CORNERS - 3, NUM_COCO_ANNOTATIONS).tolist()
    start = rng.integers(0, len(pool) - 4 * MEAN_CORNERS, NUM_COCO_ANNOTATIONS).tolist()
    (root / "annotations").mkdir()
    with open(root / "annotations/instances_train2014.json", "w", encoding="utf-8") as file:
        file.write(f'{{"images": {json.dumps(images)}, "categories": {json.dumps(categories)}, "annotations": [')
        for row in range(NUM_COCO_ANNOTATIONS):
            entry = {
                "segmentation": [pool[start[row] : start[row] + 2 * corners[row]]],
                "area": pool[start[row]],
                "iscrowd": 0,
                "image_id": image[row],
                "bbox": pool[start[row] : start[row] + 4],
                "category_id": category[row],
                "id": row,
            }
            file.write((", " if row else "") + json.dumps(entry))
        file.write("]}")
    return root


def write_voc(root: Path) -> Path:
    base = root / "VOC2007"
    rng = np.random.default_rng(0)
    values = rng.choice([-1, 0, 1], (NUM_VOC_IMAGES, len(VOC_LABELS)), p=[0.92, 0.02, 0.06])
    ids = [f"{number:06}" for number in range(NUM_VOC_IMAGES)]
    touch(base / "JPEGImages", [f"{image_id}.jpg" for image_id in ids])
    (base / "ImageSets/Main").mkdir(parents=True)
    (base / "Annotations").mkdir()
    for column, label in enumerate(VOC_LABELS):
        lines = "".join(f"{image_id} {value:>2}\n" for image_id, value in zip(ids, values[:, column], strict=True))
        (base / f"ImageSets/Main/{label}_trainval.txt").write_text(lines)
    for image_id, row in zip(ids, values, strict=True):
        objects = "".join(
            f"<object><name>{label}</name><pose>Left</pose><truncated>0</truncated><difficult>{int(value == 0)}</difficult>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>\n"
            for label, value in zip(VOC_LABELS, row, strict=True)
            if value >= 0
        )
        (base / f"Annotations/{image_id}.xml").write_text(f"<annotation><size/>{objects * 2}</annotation>\n")
    return root


def write_nuswide(root: Path) -> Path:
    rng = np.random.default_rng(0)
    names = [f"concept{number % 704}/{number // 704:04}_{number}.jpg" for number in range(NUM_NUS_OFFICIAL)]
    touch(root / "Flickr", names)
    (root / "ImageList").mkdir()
    (root / "Groundtruth/TrainTestLabels").mkdir(parents=True)
    (root / "ImageList/TrainImagelist.txt").write_text("".join(name.replace("/", "\\") + "\r\n" for name in names))
    (root / "Concepts81.txt").write_text("".join(f"{label}\n" for label in sorted(NUSWIDE_LABELS)))
    labels = rng.random((NUM_NUS_OFFICIAL, len(NUSWIDE_LABELS))) < 0.023
    for column, label in enumerate(NUSWIDE_LABELS):
        path = root / f"Groundtruth/TrainTestLabels/Labels_{label}_Train.txt"
        path.write_text("".join("1\n" if value else "0\n" for value in labels[:, column]))
    with open(root / CSV_FILE, "w", encoding="utf-8") as file:
        file.write("filepath,label,split_name\n")
        for name, row in zip(names[:NUM_NUS_CSV], labels, strict=False):
            file.write(f'Flickr/{name},"{[NUSWIDE_LABELS[column] for column in np.flatnonzero(row)]}",train\n')
    return root


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        coco, voc, nuswide = (folder / name for name in ("coco", "voc", "nuswide"))
        for write, root in ((write_coco, coco), (write_voc, voc), (write_nuswide, nuswide)):
            root.mkdir()
            write(root)
        megabytes = (coco / "annotations/instances_train2014.json").stat().st_size / 1e6
        readers: dict[str, Callable[[], SampleTable]] = {
            f"COCO, {megabytes:.0f} MB of JSON": partial(read_coco, Location.of(coco), "train", keep_unlabelled=True),
            "VOC with its XML files": partial(read_voc, Location.of(voc), "trainval"),
            "NUS-WIDE, official lists": partial(read_nuswide, Location.of(nuswide), "Train", form="official"),
            "NUS-WIDE, csv": partial(read_nuswide, Location.of(nuswide), "Train", form="csv"),
        }
        for name, read in readers.items():
            measured = measure(read)
            print(
                f"{name:28} {measured.rows:8,} rows {measured.seconds:7.2f} s ({measured.cpu_seconds:.2f} s of CPU)"
                f"   peak {measured.peak_after:6.0f} MB ({measured.peak_before:.0f} before reading)",
                flush=True,
            )


if __name__ == "__main__":
    main()
