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
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from rich.console import Console

from ..data_settings import DataSettings
from ..datasets import prepared
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
from ..settings import ResourceSettings
from ..training.bad_images import BadImage, check_bad_images
from ..types import SampleTable
from .pipeline import limit_ray_data, map_blocks


class _WrittenSplit(NamedTuple):
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


def prepare(
    settings: DataSettings,
    out: Location,
    *,
    short_side: int | None = None,
    rows_per_shard: int = 256,
    console: Console | None = None,
) -> prepared.PreparedInfo:
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
    tables = _read_tables(settings)
    request = {
        "version": prepared.VERSION,
        "dataset": settings.dataset,
        "settings": reader_settings(settings),
        "short_side": short_side,
        "rows_per_shard": rows_per_shard,
    }
    splits = {name: [table.source, table.notes, fingerprint(table)] for name, table in tables.items()}
    # all that determines the bytes of the result
    everything = request | {"max_pixels": settings.max_pixels, "splits": splits}
    plan = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    _claim(out, plan)

    connect(ResourceSettings(num_workers=1))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `console` shows the progress
    limit_ray_data(max(1.0, ray.cluster_resources().get("CPU", 1.0) - 1))
    written: dict[SplitName, _WrittenSplit] = {}
    with count_images(console or Console(highlight=False, soft_wrap=True), sum(map(len, tables.values()))) as advance:
        for name, table in tables.items():
            writer = ShardWriter(out, name, table.label_names, plan, rows_per_shard, short_side, settings.max_pixels)
            written[name] = _write_split(writer, table, settings.max_bad_fraction, advance)

    for name, table in tables.items():
        _write_index(out, name, table, written[name])
    _write_bad_images(out, tables, written)
    info = _describe(request | {"plan": plan}, tables, written)
    # last: it marks the folder as finished
    (out / prepared.INFO_FILE).write_bytes(_as_lines(info.model_dump(mode="json")))
    return info


def _read_tables(settings: DataSettings) -> dict[SplitName, SampleTable]:
    """Return the published splits of a data set, train first.

    Raises:
        UserError: if the data set cannot be read, is prepared already, or has a split without an image.
    """
    if settings.root is not None and prepared.read_info(Location.of(settings.root)) is not None:
        raise UserError(f"data.root {settings.root} is prepared already; give the data set that it was prepared from")
    tables = read_published(settings).tables
    for name, table in tables.items():
        if not len(table):
            raise UserError(
                f"{name} split ({table.source}): holds no image; add images with labels, or keep the images without a label"
                " (--data.keep-unlabelled-train, --data.keep-unlabelled-eval)"
            )
    return tables


def _describe(
    request: dict[str, Any], tables: dict[SplitName, SampleTable], written: dict[SplitName, _WrittenSplit]
) -> prepared.PreparedInfo:
    """Return the content of `dataset.json`."""
    train = tables["train"]
    counts = count_labels(train.targets[written["train"].places[:, 0]], train.label_names)
    contents = [content for split in written.values() for content in split.contents]
    return prepared.PreparedInfo(
        format=prepared.FORMAT,
        **request,
        label_names=train.label_names,
        label_count=tuple(counts.count.tolist()),
        cooccurrence=tuple(map(tuple, counts.cooccurrence.tolist())),
        splits={
            name: prepared.PreparedSplit(
                source=table.source,
                notes=table.notes,
                images=len(written[name].places),
                bad_images=len(written[name].bad),
                shard_bytes=written[name].shard_bytes,
            )
            for name, table in tables.items()
        },
        content=hashlib.sha256(json.dumps([train.label_names, contents]).encode()).hexdigest(),
    )


def _as_lines(content: dict[str, Any]) -> bytes:
    """Return JSON with one line per field. Indented JSON would have thousands of lines for the square of co-occurrence."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _claim(out: Location, plan: str) -> None:
    """Mark the folder as that of this plan.

    Raises:
        UserError: if it holds something else, or cannot be written.
    """
    place = out / prepared.PLAN_FILE
    content = {"format": prepared.FORMAT, "version": prepared.VERSION, "plan": plan}
    if place.is_file():
        if read_json(place, prepared.START_OVER) != content:
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
                raise UserError(f"{error}; then {prepared.RUN_AGAIN}")
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


def _finish_shards(writer: ShardWriter, samples: ray.ObjectRef[pa.Table], numbers: list[int]) -> pa.Table:
    """Write the shards with these numbers. Return their records as JSON, or the errors: Ray would wrap raised errors in its own."""

    def finish(number: int) -> dict[str, str]:
        try:
            return {"record": writer.finish(ray.get(samples), number).model_dump_json(), "error": ""}
        except UserError as error:
            return {"record": "", "error": str(error)}

    return pa.Table.from_pylist([finish(number) for number in numbers])


def _write_index(out: Location, split: SplitName, table: SampleTable, written: _WrittenSplit) -> None:
    row, shard, offset, length = written.places.T
    kept = table.table.take(pa.array(row))
    columns = {
        "image_id": kept["image_id"],
        "shard": pa.array(shard, pa.int32()),
        "offset": pa.array(offset),
        "length": pa.array(length),
        "target": kept["target"],
    }
    if table.groups is not None:
        columns["group"] = kept["group"]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    prepared.index_file(out, split).write_bytes(sink.getvalue())


def _write_bad_images(
    out: Location, tables: dict[SplitName, SampleTable], written: dict[SplitName, _WrittenSplit]
) -> None:
    """Write the list of the images that are left out. Write no file if there are none."""
    lines = [
        [name, tables[name].table["image_id"][image.row].as_py(), image.reason]
        for name, split in written.items()
        for image in split.bad
    ]
    if lines:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["split", "image_id", "reason"], *lines])
        (out / prepared.BAD_IMAGES_FILE).write_bytes(text.getvalue().encode())
    else:  # an earlier call may have written it, before the user fixed the images
        (out / prepared.BAD_IMAGES_FILE).remove()
