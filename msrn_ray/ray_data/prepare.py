"""`prepare`: any data set as Parquet shards with the images inside, written by a stream of Ray Data tasks, one a shard.

What is finished stays: a run that was stopped, even killed, is gone on with by the same command, and the result is the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import torch
from rich.console import Console

from ..config import DataSettings, ResourceSettings
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
from ..errors import BadImagesError, UserError
from ..io.progress_bar import count_images
from ..io.storage import Location
from ..labels.graph import count_labels
from ..ray_cluster.connection import connect
from ..types import SampleTable
from .pipeline import limit_ray_data


@dataclass(frozen=True)
class _Written:
    """One split after its last shard: the rows that are in, where their images lie, and those that are not.

    Attributes:
        places: [m, 4] int64, row of the sample table, shard, offset and length of each image that is in.
        bad: row and reason of each image that is not.
        shard_bytes, contents: size and content hash of each shard.
    """

    places: npt.NDArray[np.int64]
    bad: tuple[tuple[int, str], ...]
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
    """Reads a data set as training would and writes it to a folder that training reads from.

    Args:
        settings: reader, root and its settings; `max_pixels` and `max_bad_fraction` decide on bad images.
        out: folder; new, empty, or one where the same was begun.
        short_side: images with a larger short side are reduced to this and stored as JPEG, pixels; None stores all as they are.
        rows_per_shard: images of a shard, and of a task, which holds them in memory.
        console: where progress goes; standard output by default.

    Raises:
        UserError: if the data set cannot be read, or the folder cannot be written or holds something else.
        BadImagesError: if more images of a split cannot be decoded than allowed; what is written stays.
    """
    if settings.root is not None and read_info(Location.of(settings.root)) is not None:
        raise UserError(f"data.root {settings.root} is prepared already; give the data set that it was prepared from")
    published = read_published(settings)
    named: tuple[tuple[SplitName, SampleTable | None], ...] = (
        ("train", published.train),
        ("val", published.val),
        ("test", published.held_out),
    )
    tables = {name: table for name, table in named if table is not None}
    for name, table in tables.items():
        if not len(table):
            raise UserError(
                f"{name} split ({table.source}): holds no image; add images with labels, or keep those without any"
                " (--data.keep-unlabelled-train, --data.keep-unlabelled-eval)"
            )
    asked = {
        "version": VERSION,
        "dataset": settings.dataset,
        "settings": reader_settings(settings),
        "short_side": short_side,
        "rows_per_shard": rows_per_shard,
        "max_pixels": settings.max_pixels,
        "splits": {name: [table.source, table.notes, fingerprint(table)] for name, table in tables.items()},
    }
    plan = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    _claim(out, plan)

    connect(ResourceSettings(num_workers=1))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is told here
    limit_ray_data(max(1.0, ray.cluster_resources().get("CPU", 1.0) - 1))
    label_names = published.train.label_names
    written: dict[SplitName, _Written] = {}
    console = console or Console(highlight=False, soft_wrap=True)
    with count_images(console, sum(map(len, tables.values()))) as advance:
        for name, table in tables.items():
            writer = ShardWriter(out, name, label_names, plan, rows_per_shard, short_side, settings.max_pixels)
            written[name] = _write_split(writer, table, settings.max_bad_fraction, advance)

    for name, table in tables.items():
        _write_index(out, name, table, written[name])
    _write_bad(out, tables, written)
    counts = count_labels(published.train.targets[written["train"].rows], label_names)
    contents = [content for one in written.values() for content in one.contents]
    info = PreparedInfo(
        format=FORMAT,
        version=VERSION,
        dataset=settings.dataset,
        settings=reader_settings(settings),
        short_side=short_side,
        rows_per_shard=rows_per_shard,
        label_names=label_names,
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
            for name, table in tables.items()
        },
        plan=plan,
        content=hashlib.sha256(json.dumps([label_names, contents]).encode()).hexdigest(),
    )
    (out / INFO_FILE).write_bytes(_as_lines(info.model_dump(mode="json")))
    return info


def _as_lines(content: dict[str, Any]) -> bytes:
    """JSON with a line for each field: the square of co-occurrence would be thousands."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _claim(out: Location, plan: str) -> None:
    """Marks the folder as that of this plan.

    Raises:
        UserError: if it holds something else, or cannot be written.
    """
    place = out / PLAN_FILE
    if place.is_file():
        theirs = read_json(place, START_OVER)
        if theirs != {"format": FORMAT, "version": VERSION, "plan": plan}:
            raise UserError(
                f"--out {out}: holds another data set, or this one with other labels or settings; give a new folder, or empty this one"
            )
        return
    if out.is_file() or (out.is_dir() and out.names()):
        raise UserError(f"--out {out}: is not empty and no prepared data set; give a new or empty folder")
    place.write_bytes(json.dumps({"format": FORMAT, "version": VERSION, "plan": plan}).encode() + b"\n")


def _write_split(
    writer: ShardWriter, table: SampleTable, max_bad_fraction: float, advance: Callable[[int], None]
) -> _Written:
    num_shards = -(-len(table) // writer.rows_per_shard)
    samples = ray.put(table.table)
    shards = ray.data.range(num_shards, override_num_blocks=num_shards)
    places: list[npt.NDArray[np.int64]] = []
    bad: list[tuple[int, str]] = []
    sizes: list[int] = []
    contents: list[str] = []
    task = _shard_task(writer, samples)
    for batch in shards.map_batches(task, batch_size=None, num_cpus=1).iter_batches(batch_size=None):
        for text, error in zip(batch["record"], batch["error"], strict=True):
            if error:
                raise UserError(f"{error}; then {RUN_AGAIN}")
            record = ShardRecord.model_validate_json(text)
            assert record.number == len(sizes), "Ray Data keeps the order"
            numbers = [record.number] * len(record.rows)
            places.append(np.array([record.rows, numbers, record.offsets, record.lengths], np.int64).T)
            bad += record.bad
            sizes.append(record.size)
            contents.append(record.content)
            advance(len(record.rows) + len(record.bad))
        if len(bad) > max_bad_fraction * len(table):
            uris = table.table["uri"]
            listed = "; ".join(f"{uris[row].as_py()} ({reason})" for row, reason in bad[:5])
            raise BadImagesError(
                f"{len(bad)} of {len(table)} {writer.split} images cannot be decoded, more than"
                f" data.max_bad_fraction={max_bad_fraction} allows: {listed}; mend them or take them out, or allow more"
            )
    return _Written(np.concatenate(places), tuple(bad), tuple(sizes), tuple(contents))


def _shard_task(writer: ShardWriter, samples: ray.ObjectRef[pa.Table]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def finish(block: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)  # tasks are the parallelism
        records: list[str] = []
        errors: list[str] = []
        for number in block["id"]:
            try:
                records.append(writer.finish(ray.get(samples), int(number)).model_dump_json())
                errors.append("")
            except UserError as error:
                records.append("")
                errors.append(str(error))
        return {"record": np.array(records, dtype=object), "error": np.array(errors, dtype=object)}

    return finish


def _write_index(out: Location, split: SplitName, table: SampleTable, written: _Written) -> None:
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


def _write_bad(out: Location, tables: dict[SplitName, SampleTable], written: dict[SplitName, _Written]) -> None:
    """The list of images left out; no file where there is none."""
    ids = {name: table.table["image_id"] for name, table in tables.items()}
    lines = [[name, ids[name][row].as_py(), reason] for name, one in written.items() for row, reason in one.bad]
    if lines:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["split", "image_id", "reason"], *lines])
        (out / BAD_IMAGES_FILE).write_bytes(text.getvalue().encode())
    else:  # of an earlier run, before they were mended
        (out / BAD_IMAGES_FILE).remove()
