"""`msrn prepare`: writes any data set as Parquet shards with the images inside. A stream of Ray Data tasks writes one shard each.

Finished shards stay. After an interruption, even by SIGKILL, the same command resumes, and the result has the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console

from ..datasets.prepared import (
    BAD_IMAGES_FILE,
    FORMAT,
    INFO_FILE,
    PLAN_FILE,
    RUN_AGAIN,
    START_OVER,
    VERSION,
    PreparedInfo,
    PreparedSplit,
    index_file,
    read_info,
)
from ..datasets.protocol import fingerprint
from ..datasets.registry import read_published, reader_settings
from ..datasets.shard_writer import ShardRecord, ShardWriter
from ..datasets.split_names import SplitName
from ..datasets.text_files import read_json
from ..errors import UserError
from ..io.progress_bar import count_images
from ..io.storage import Location
from ..labels.graph import count_labels
from ..ray_cluster.connection import connect
from ..settings import DataSettings, ResourceSettings
from ..training.bad_images import BadImage, check_bad_images
from ..types import SampleTable
from .block_tasks import Columns, map_blocks
from .pipeline import limit_ray_data


@dataclass(frozen=True)
class _Plan:
    """What one call of `prepare` writes.

    Attributes:
        settings: reader, root and limits.
        short_side: short side in pixels to which larger images are reduced, or None.
        rows_per_shard: images per shard.
        tables: sample table of each split, train first.
    """

    settings: DataSettings
    short_side: int | None
    rows_per_shard: int
    tables: dict[SplitName, SampleTable]

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.tables["train"].label_names

    def digest(self) -> str:
        """Return the sha256 of all that determines the bytes of the result."""
        content = {
            "version": VERSION,
            "dataset": self.settings.dataset,
            "settings": reader_settings(self.settings),
            "short_side": self.short_side,
            "rows_per_shard": self.rows_per_shard,
            "max_pixels": self.settings.max_pixels,
            "splits": {name: [table.source, table.notes, fingerprint(table)] for name, table in self.tables.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _WrittenSplit:
    """One split after its last shard.

    Attributes:
        places: [m, 4] int64, row of the sample table, shard, offset and length of each image in the shards.
        bad: the images that are left out.
        shard_bytes, contents: size and content hash of each shard.
    """

    places: npt.NDArray[np.int64]
    bad: tuple[BadImage, ...]
    shard_bytes: tuple[int, ...]
    contents: tuple[str, ...]

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return self.places[:, 0]


def prepare(
    settings: DataSettings,
    out: Location,
    *,
    short_side: int | None = None,
    rows_per_shard: int = 256,
    console: Console | None = None,
) -> PreparedInfo:
    """Read a data set as training does, and write it to a folder from which training can read.

    Args:
        settings: reader, root and its settings; `max_pixels` and `max_bad_fraction` decide on bad images.
        out: folder. It is new or empty, or an earlier call began to write the same data set there.
        short_side: larger images are reduced to this short side, in pixels, and stored as JPEG. None stores all bytes as they are.
        rows_per_shard: images per shard. A task holds the images of its shard in memory.
        console: where progress goes; standard output by default.

    Raises:
        UserError: if the data set cannot be read, or the folder cannot be written or holds something else.
        BadImagesError: if a split has more bad images than allowed. What is written stays.
    """
    plan = _Plan(settings, short_side, rows_per_shard, _read_tables(settings))
    digest = plan.digest()
    _claim(out, digest)

    connect(ResourceSettings(num_workers=1))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `console` shows the progress
    limit_ray_data(max(1.0, ray.cluster_resources().get("CPU", 1.0) - 1))
    written: dict[SplitName, _WrittenSplit] = {}
    console = console or Console(highlight=False, soft_wrap=True)
    with count_images(console, sum(map(len, plan.tables.values()))) as advance:
        for name, table in plan.tables.items():
            writer = ShardWriter(out, name, plan.label_names, digest, rows_per_shard, short_side, settings.max_pixels)
            written[name] = _write_split(writer, table, settings.max_bad_fraction, advance)

    for name, table in plan.tables.items():
        _write_index(out, name, table, written[name])
    _write_bad_images(out, plan.tables, written)
    info = _describe(plan, digest, written)
    (out / INFO_FILE).write_bytes(_as_lines(info.model_dump(mode="json")))  # last: it marks the folder as finished
    return info


def _read_tables(settings: DataSettings) -> dict[SplitName, SampleTable]:
    """Return the published splits of a data set, train first.

    Raises:
        UserError: if the data set cannot be read, is prepared already, or has a split without an image.
    """
    if settings.root is not None and read_info(Location.of(settings.root)) is not None:
        raise UserError(f"data.root {settings.root} is prepared already; give the data set that it was prepared from")
    published = read_published(settings)
    splits: tuple[tuple[SplitName, SampleTable | None], ...] = (
        ("train", published.train),
        ("val", published.val),
        ("test", published.held_out),
    )
    tables = {name: table for name, table in splits if table is not None}
    for name, table in tables.items():
        if not len(table):
            raise UserError(
                f"{name} split ({table.source}): holds no image; add images with labels, or keep the images without a label"
                " (--data.keep-unlabelled-train, --data.keep-unlabelled-eval)"
            )
    return tables


def _describe(plan: _Plan, digest: str, written: dict[SplitName, _WrittenSplit]) -> PreparedInfo:
    """Return the content of `dataset.json`."""
    counts = count_labels(plan.tables["train"].targets[written["train"].rows], plan.label_names)
    contents = [content for split in written.values() for content in split.contents]
    return PreparedInfo(
        format=FORMAT,
        version=VERSION,
        dataset=plan.settings.dataset,
        settings=reader_settings(plan.settings),
        short_side=plan.short_side,
        rows_per_shard=plan.rows_per_shard,
        label_names=plan.label_names,
        label_count=tuple(counts.count.tolist()),
        cooccurrence=tuple(map(tuple, counts.cooccurrence.tolist())),
        splits={
            name: PreparedSplit(
                source=table.source,
                notes=table.notes,
                images=len(written[name].rows),
                bad_images=len(written[name].bad),
                shard_bytes=written[name].shard_bytes,
            )
            for name, table in plan.tables.items()
        },
        plan=digest,
        content=hashlib.sha256(json.dumps([plan.label_names, contents]).encode()).hexdigest(),
    )


def _as_lines(content: dict[str, Any]) -> bytes:
    """Return JSON with one line per field. Indented JSON would have thousands of lines for the square of co-occurrence."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _claim(out: Location, digest: str) -> None:
    """Mark the folder as that of this plan.

    Raises:
        UserError: if it holds something else, or cannot be written.
    """
    place = out / PLAN_FILE
    content = {"format": FORMAT, "version": VERSION, "plan": digest}
    if place.is_file():
        if read_json(place, START_OVER) != content:
            raise UserError(
                f"--out {out}: holds another data set, or this one with other labels or settings; give a new folder, or empty this one"
            )
        return
    if out.is_file() or (out.is_dir() and out.names()):
        raise UserError(f"--out {out}: is not empty and no prepared data set; give a new or empty folder")
    place.write_bytes(json.dumps(content).encode() + b"\n")


def _write_split(
    writer: ShardWriter, table: SampleTable, max_bad_fraction: float, advance: Callable[[int], None]
) -> _WrittenSplit:
    num_shards = -(-len(table) // writer.rows_per_shard)
    shards = map_blocks(num_shards, partial(_finish_shards, writer, ray.put(table.table)))
    uris = table.table["uri"]
    places: list[npt.NDArray[np.int64]] = []
    bad: list[BadImage] = []
    sizes: list[int] = []
    contents: list[str] = []
    for batch in shards.iter_batches(batch_size=None):
        for text, error in zip(batch["record"], batch["error"], strict=True):
            if error:
                raise UserError(f"{error}; then {RUN_AGAIN}")
            record = ShardRecord.model_validate_json(text)
            assert record.number == len(sizes), "Ray Data keeps the order"
            numbers = [record.number] * len(record.rows)
            places.append(np.array([record.rows, numbers, record.offsets, record.lengths], np.int64).T)
            bad += [BadImage(row, uris[row].as_py(), reason) for row, reason in record.bad]
            sizes.append(record.size)
            contents.append(record.content)
            advance(len(record.rows) + len(record.bad))
        check_bad_images(bad, writer.split, len(table), max_bad_fraction)
    return _WrittenSplit(np.concatenate(places), tuple(bad), tuple(sizes), tuple(contents))


def _finish_shards(writer: ShardWriter, samples: ray.ObjectRef[pa.Table], numbers: list[int]) -> Columns:
    """Write the shards with these numbers. Return their records as JSON, or the errors: Ray would wrap raised errors in its own."""
    records: list[str] = []
    errors: list[str] = []
    for number in numbers:
        try:
            records.append(writer.finish(ray.get(samples), number).model_dump_json())
            errors.append("")
        except UserError as error:
            records.append("")
            errors.append(str(error))
    return {"record": np.array(records, dtype=object), "error": np.array(errors, dtype=object)}


def _write_index(out: Location, split: SplitName, table: SampleTable, written: _WrittenSplit) -> None:
    kept = table.table.take(pa.array(written.rows))
    _, shard, offset, length = written.places.T
    index = pa.table(
        {
            "image_id": kept["image_id"],
            "shard": pa.array(shard, pa.int32()),
            "offset": pa.array(offset),
            "length": pa.array(length),
            "target": kept["target"],
        }
    )
    sink = io.BytesIO()
    pq.write_table(index, sink, compression="zstd")
    index_file(out, split).write_bytes(sink.getvalue())


def _write_bad_images(
    out: Location, tables: dict[SplitName, SampleTable], written: dict[SplitName, _WrittenSplit]
) -> None:
    """Write the list of the images that are left out. Write no file if there are none."""
    ids = {name: table.table["image_id"] for name, table in tables.items()}
    lines = [
        [name, ids[name][image.row].as_py(), image.reason] for name, split in written.items() for image in split.bad
    ]
    if lines:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["split", "image_id", "reason"], *lines])
        (out / BAD_IMAGES_FILE).write_bytes(text.getvalue().encode())
    else:  # an earlier call may have written it, before the user fixed the images
        (out / BAD_IMAGES_FILE).remove()
