"""Writes one shard of a prepared data set: the same rows give the same bytes; no Ray.

What a shard holds is recorded in its own footer, so that a shard that is there whole need not be written again.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torchvision.transforms.v2 import functional as transform

from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..io.storage import Location
from ..types import PRESENT
from .prepared import shard_place
from .transforms import decode

JPEG_QUALITY = 95  # of re-encoded images: losses of a second encoding are not seen
_JPEG_SIDE = 65_500  # pixels of the longest side that libjpeg writes
_RECORD_KEY = "msrn_ray.shard"


class ShardRecord(BaseModel):
    """What a shard holds.

    Attributes:
        plan, split, number: which shard of which data set.
        rows: [n] rows of the split's sample table.
        offsets, lengths: [n] where each image lies in the file.
        bad: row and reason of each image that was left out.
        content: sha256 of ids, targets and image bytes.
        size: bytes of the file; not in the footer, which is a part of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    split: str
    number: int
    rows: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    bad: tuple[tuple[int, str], ...]
    content: str
    size: int = 0


@dataclass(frozen=True)
class ShardWriter:
    """Writes the shards of one split.

    Attributes:
        root: folder of the prepared data set.
        split: the split's name.
        label_names: C names in the order of `target`.
        plan: sha256 of what was asked for.
        rows_per_shard: rows of the sample table that a shard is cut for.
        short_side: larger images are reduced to this, pixels; None keeps all bytes as they are.
        max_pixels: an image with more is bad.
    """

    root: Location
    split: str
    label_names: tuple[str, ...]
    plan: str
    rows_per_shard: int
    short_side: int | None
    max_pixels: int

    def finish(self, samples: pa.Table, number: int) -> ShardRecord:
        """Writes shard `number` of a `SampleTable.table` unless it is there already, without a bad image: that may be mended by now.

        Raises:
            UserError: if it cannot be written, or an image that is there cannot be read.
        """
        there = self._find(number)
        return self._write(samples, number) if there is None or there.bad else there

    def _find(self, number: int) -> ShardRecord | None:
        """The record of a whole shard of this plan; None where there is none."""
        place = shard_place(self.root, self.split, number)
        try:
            with place.opened_input() as stream:
                footer = pq.read_metadata(stream).metadata or {}
                size = stream.size()
            record = ShardRecord.model_validate_json(footer[_RECORD_KEY.encode()]).model_copy(update={"size": size})
        except (OSError, pa.ArrowException, KeyError, ValidationError):
            return None  # not there or not whole: to be written
        return record if (record.plan, record.split, record.number) == (self.plan, self.split, number) else None

    def _write(self, samples: pa.Table, number: int) -> ShardRecord:
        start = number * self.rows_per_shard
        chosen = samples.slice(start, self.rows_per_shard)
        rows: list[int] = []
        images: list[bytes] = []
        bad: list[tuple[int, str]] = []
        for position, uri in enumerate(chosen["uri"].to_pylist()):
            try:
                images.append(self._encoded(read_bytes(uri)))
                rows.append(start + position)
            except UserError as error:
                bad.append((start + position, str(error)))
            except FileNotFoundError:  # without its path: the same images elsewhere give the same bytes
                bad.append((start + position, os.strerror(errno.ENOENT)))
            except OSError as error:  # a network or a disk that may work again must not leave images out for good
                raise UserError(f"{uri}: cannot be read ({error})") from None
        kept = chosen.take(pa.array(np.array(rows, np.int64) - start))
        flat = np.asarray(kept["target"].combine_chunks().flatten())
        target = flat.astype(np.int8).reshape(len(rows), len(self.label_names))
        table = pa.table(
            {
                "image": pa.array(images, pa.large_binary()),
                "image_id": kept["image_id"],
                "split": pa.array([self.split] * len(rows), pa.string()),
                "labels": _present_names(target, self.label_names),
                "target": kept["target"],
            }
        )
        sink = io.BytesIO()
        # Statistics would copy images into the footer; the other columns are too small to be worth packing.
        with pq.ParquetWriter(
            sink, table.schema, compression="none", use_dictionary=False, write_statistics=False
        ) as writer:
            writer.write_table(table, row_group_size=max(1, len(rows)))
            record = ShardRecord(
                plan=self.plan,
                split=self.split,
                number=number,
                rows=tuple(rows),
                offsets=_places(sink.getvalue(), images),
                lengths=tuple(map(len, images)),
                bad=tuple(bad),
                content=_content_hash(kept["image_id"].to_pylist(), target, images),
            )
            writer.add_key_value_metadata(
                {_RECORD_KEY: record.model_dump_json(exclude={"size"}), "label_names": json.dumps(self.label_names)}
            )
        data = sink.getvalue()
        shard_place(self.root, self.split, number).write_bytes(data)
        return record.model_copy(update={"size": len(data)})

    def _encoded(self, data: bytes) -> bytes:
        """The bytes to store; all images are decoded, since only then it is known that they are whole."""
        image = decode(data, max_pixels=self.max_pixels)
        if self.short_side is None or min(image.shape[-2:]) <= self.short_side:
            return data
        if max(image.shape[-2:]) * self.short_side > _JPEG_SIDE * min(image.shape[-2:]):
            return data  # so long that JPEG cannot hold even the smaller one
        smaller = transform.resize(image, [self.short_side], antialias=True)
        encoded = io.BytesIO()
        Image.fromarray(smaller.permute(1, 2, 0).numpy()).save(encoded, "JPEG", quality=JPEG_QUALITY)
        return encoded.getvalue()


def _places(data: bytes, images: list[bytes]) -> tuple[int, ...]:
    """Where each image begins in the file; they lie there one behind the other, with headers of pages between."""
    places: list[int] = []
    end = 0
    for image in images:
        place = data.find(image, end)
        assert place >= 0, "Parquet has not stored the image plainly"
        places.append(place)
        end = place + len(image)
    return tuple(places)


def _content_hash(image_ids: list[str], target: npt.NDArray[np.int8], images: list[bytes]) -> str:
    digest = hashlib.sha256()
    for image_id, one, image in zip(image_ids, target, images, strict=True):
        for part in (image_id.encode(), one.tobytes(), image):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _present_names(target: npt.NDArray[np.int8], names: tuple[str, ...]) -> pa.ListArray:
    """[n, C] -> the names of the present labels of each row."""
    present = target == PRESENT
    ends = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(names, pa.string()).take(pa.array(np.nonzero(present)[1])))
