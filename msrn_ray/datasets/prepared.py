"""The layout and the reader of a prepared data set: Parquet shards that contain the encoded images, written by `msrn prepare`.

    plan.json                       sha256 of the request; written first
    train/train-00000.parquet ...   columns image, image_id, split, labels (names of the present labels), target ({1, 0, -1})
    train.index.parquet             one row per image: image_id, shard (its number), offset and length (in the shard file), target;
                                    group, if the images have groups
    bad_images.csv                  images left out, with the reason; only if there are any
    dataset.json                    the description (`PreparedInfo`); written last: without it the folder is unfinished

The column `image` is neither compressed nor dictionary-encoded, so the bytes of an image are contiguous in the shard. An image can be read
alone, in any order, as `SHARD#bytes=OFFSET+LENGTH`. Any Parquet reader reads the shards.
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
from .split_names import SplitName
from .text_files import read_json

FORMAT, VERSION = "msrn_ray prepared data set", 1
INFO_FILE, PLAN_FILE, BAD_IMAGES_FILE = "dataset.json", "plan.json", "bad_images.csv"
START_OVER = "empty the folder and run `msrn prepare` again, or remove the file if `msrn prepare` did not write it"
RUN_AGAIN = "run the same `msrn prepare` again, it writes only what is missing"


class Frozen(BaseModel):
    """Base of the records in the files of a prepared data set; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PreparedSplit(Frozen):
    """One split of a prepared data set.

    Attributes:
        source, notes: those of the sample table that was prepared.
        images: number of rows of the index.
        bad_images: number of images left out.
        shard_bytes: [number of shards] size of each file.
    """

    source: str
    notes: tuple[str, ...]
    images: int
    bad_images: int
    shard_bytes: tuple[int, ...]


class PreparedInfo(Frozen):
    """The content of `dataset.json`.

    Attributes:
        format, version: those of this layout.
        dataset: the reader's name (`coco`, ...).
        settings: the reader's settings (`keep_unlabelled_train`, ...), fixed by `msrn prepare`.
        short_side: the short side in pixels to which larger images were reduced; None if all bytes are the original ones.
        rows_per_shard: rows of the sample table per shard; the bad images among them are left out.
        label_names: C names in the order of `target`.
        label_count, cooccurrence: [C] and [C, C], images of the published train split with a label and with a pair; zeros on the diagonal.
        splits: as published, before a protocol splits val off.
        plan: sha256 of the request: labels, image ids and targets of all splits, settings.
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


def shard_file(root: Location, split: str, number: int) -> Location:
    """Return the location of a shard."""
    return root / split / f"{split}-{number:05}.parquet"


def index_file(root: Location, split: str) -> Location:
    """Return the location of the index of a split."""
    return root / f"{split}.index.parquet"


def read_info(root: Location) -> PreparedInfo | None:
    """Return the description of a prepared data set, or None if the folder holds none (other tools may write a `dataset.json` too).

    Raises:
        UserError: if the prepared data set is unfinished, damaged or of an unknown version.
    """
    file = root / INFO_FILE
    if not file.is_file():
        if (root / PLAN_FILE).is_file() and read_json(root / PLAN_FILE, START_OVER).get("format") == FORMAT:
            raise UserError(f"{root}: `msrn prepare` has not finished here; {RUN_AGAIN}")
        return None
    content = read_json(file, f"{RUN_AGAIN}, or remove the file if `msrn prepare` did not write it")
    if content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise UserError(
            f"{file}: format version {content.get('version')!r}, this msrn_ray reads {VERSION}; install the msrn_ray that wrote it,"
            " or prepare the data again in another folder"
        )
    try:
        return PreparedInfo.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: damaged ({field}: {first['msg']}); {RUN_AGAIN}") from None


def read_prepared(root: Location, info: PreparedInfo) -> dict[SplitName, SampleTable]:
    """Return the sample tables of a prepared data set; image uris are ranges in its shards.

    Raises:
        UserError: if an index is damaged, or a shard is missing or truncated.
    """
    return {split: _read_split(root, info, split) for split in info.splits}


def _read_split(root: Location, info: PreparedInfo, split: SplitName) -> SampleTable:
    expected = info.splits[split]
    found = (root / split).sizes()
    for number, size in enumerate(expected.shard_bytes):
        shard = shard_file(root, split, number)
        if found.get(shard.name) != size:
            problem = f"{found[shard.name]} bytes instead of {size}" if shard.name in found else "missing"
            raise UserError(f"{shard}: {problem}; copy it again, or {RUN_AGAIN}")
    file = index_file(root, split)
    try:
        with file.opened_input() as stream:
            index = pq.read_table(stream)
            groups = index["group"] if "group" in index.column_names else None
            index = index.select(["image_id", "shard", "offset", "length", "target"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(
            f"{file}: damaged ({' '.join(str(error).split())[:200]}); copy it again, or {RUN_AGAIN}"
        ) from None
    numbers, offsets, lengths = (index[name].to_numpy() for name in ("shard", "offset", "length"))
    sizes = np.array(expected.shard_bytes, np.int64)
    target_type = pa.list_(pa.int8(), len(info.label_names))
    fits = index.num_rows == expected.images and index["target"].type.equals(target_type)
    if not fits or not (
        ((numbers >= 0) & (numbers < len(sizes))).all() and (offsets + lengths <= sizes[numbers]).all()
    ):
        raise UserError(f"{file}: does not fit {INFO_FILE}; copy both again, or {RUN_AGAIN}")
    shards = pa.array([str(shard_file(root, split, number)) for number in range(len(sizes))], pa.string())
    uris = range_uris(shards.take(index["shard"]), index["offset"], index["length"])
    table = pa.table({"image_id": index["image_id"], "uri": uris, "target": index["target"]})
    samples = SampleTable(table, info.label_names, expected.source, expected.notes)
    return samples if groups is None else samples.with_groups(groups)
