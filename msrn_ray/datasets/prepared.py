"""The prepared form of a data set: Parquet shards with the encoded images inside, written by `msrn prepare`; its layout and its reader.

    plan.json                       sha256 of what was asked for; written first
    train/train-00000.parquet ...   columns image, image_id, split, labels (names of the present ones), target ({1, 0, -1})
    train.index.parquet             a row an image: image_id, shard (its number), offset, length (of the image in the shard file), target
    bad_images.csv                  images left out, with the reason; where there are some
    dataset.json                    what this is (`PreparedInfo`); written last: without it the folder is unfinished

The column `image` is neither compressed nor dictionary-encoded, so that the bytes of an image lie in one piece in the shard, and an image
is read alone, in any order, as `SHARD#bytes=OFFSET+LENGTH`. Any Parquet reader reads the shards.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import UserError
from ..io.byte_ranges import range_uris
from ..io.storage import Location
from ..types import SampleTable
from .text_files import read_json

FORMAT, VERSION = "msrn_ray prepared data set", 1
INFO_FILE, PLAN_FILE, BAD_FILE = "dataset.json", "plan.json", "bad_images.csv"
SplitName = Literal["train", "val", "test"]
ANEW = "empty the folder and run `msrn prepare` again, or take the file away if it is not of `msrn prepare`"
AGAIN = "run the same `msrn prepare` again, it writes only what is missing"


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PreparedSplit(_Content):
    """One split.

    Attributes:
        source, notes: of the sample table that was prepared.
        images: rows of the index.
        bad_images: how many were left out.
        shard_bytes: [shards], size of each file.
    """

    source: str
    notes: tuple[str, ...]
    images: int
    bad_images: int
    shard_bytes: tuple[int, ...]


class PreparedInfo(_Content):
    """The content of `dataset.json`.

    Attributes:
        format, version: of this layout.
        dataset: the reader's name (`coco`, ...).
        settings: the reader's settings (`keep_unlabelled_train`, ...), which are fixed by now.
        short_side: pixels that larger images were reduced to; None where all bytes are the original's.
        rows_per_shard: images that a shard was cut for; bad ones are missing in it.
        label_names: C names in the order of `target`.
        label_count, cooccurrence: [C] and [C, C], images of the published train split with a label and with a pair; zeros on the diagonal.
        splits: as published, before a protocol splits val off.
        plan: sha256 of what was asked for: labels, image ids and targets of all splits, settings.
        content: sha256 of all image ids, targets and image bytes.
    """

    format: Literal["msrn_ray prepared data set"]
    version: int
    dataset: str
    settings: dict[str, Any]
    short_side: int | None
    rows_per_shard: int
    label_names: tuple[str, ...]
    label_count: tuple[int, ...]
    cooccurrence: tuple[tuple[int, ...], ...]
    splits: dict[SplitName, PreparedSplit]
    plan: str
    content: str


def shard_place(root: Location, split: str, number: int) -> Location:
    """Where a shard lies."""
    return root / split / f"{split}-{number:05}.parquet"


def index_place(root: Location, split: str) -> Location:
    """Where the index of a split lies."""
    return root / f"{split}.index.parquet"


def read_info(root: Location) -> PreparedInfo | None:
    """What the folder holds, or None if it is no prepared data set (a `dataset.json` of others is none of ours).

    Raises:
        UserError: if it is one, but unfinished, damaged or of an unknown version.
    """
    place = root / INFO_FILE
    if not place.is_file():
        if (root / PLAN_FILE).is_file() and read_json(root / PLAN_FILE, ANEW).get("format") == FORMAT:
            raise UserError(f"{root}: `msrn prepare` has not finished here; {AGAIN}")
        return None
    content = read_json(place, f"{AGAIN}, or take the file away if it is not of `msrn prepare`")
    if content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise UserError(
            f"{place}: format version {content.get('version')!r}, this msrn_ray reads {VERSION}; install the one that wrote it,"
            " or prepare the data again in another folder"
        )
    try:
        return PreparedInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: damaged ({field}: {first['msg']}); {AGAIN}") from None


def read_prepared(root: Location, info: PreparedInfo) -> dict[SplitName, SampleTable]:
    """The sample tables of a prepared data set; image uris are ranges in its shards.

    Raises:
        UserError: if an index is damaged, or a shard is missing or cut off.
    """
    return {split: _read_split(root, info, split) for split in info.splits}


def _read_split(root: Location, info: PreparedInfo, split: SplitName) -> SampleTable:
    told = info.splits[split]
    found = (root / split).sizes()
    for number, size in enumerate(told.shard_bytes):
        shard = shard_place(root, split, number)
        if found.get(shard.name) != size:
            what = f"{found[shard.name]} bytes instead of {size}" if shard.name in found else "missing"
            raise UserError(f"{shard}: {what}; copy it again, or {AGAIN}")
    place = index_place(root, split)
    try:
        with place.opened_input() as stream:
            index = pq.read_table(stream).select(["image_id", "shard", "offset", "length", "target"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{place}: damaged ({' '.join(str(error).split())[:200]}); copy it again, or {AGAIN}") from None
    shard, offset, length = (index[name].to_numpy() for name in ("shard", "offset", "length"))
    sizes = np.array(told.shard_bytes, np.int64)
    target_type = pa.list_(pa.int8(), len(info.label_names))
    fits = index.num_rows == told.images and index["target"].type.equals(target_type)
    if not fits or not (((shard >= 0) & (shard < len(sizes))).all() and (offset + length <= sizes[shard]).all()):
        raise UserError(f"{place}: does not fit {INFO_FILE}; copy both again, or {AGAIN}")
    shards = pa.array([str(shard_place(root, split, number)) for number in range(len(sizes))], pa.string())
    uris = range_uris(shards.take(index["shard"]), index["offset"], index["length"])
    table = pa.table({"image_id": index["image_id"], "uri": uris, "target": index["target"]})
    return SampleTable(table, info.label_names, told.source, told.notes)
