"""Writes one shard of a prepared data set: the same rows give the same bytes; no Ray.

The footer of a shard records its content, so a complete shard need not be written again.
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
from pydantic import ValidationError
from torchvision.transforms.v2 import functional as transform

from ..errors import UserError
from ..io.byte_ranges import read_bytes
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .prepared import Frozen, shard_file
from .transforms import decode

JPEG_QUALITY = 95  # of re-encoded images; the loss of the second encoding is invisible
_MAX_JPEG_SIDE = 65_500  # pixels of the longest side that libjpeg writes
_RECORD_KEY = "msrn_ray.shard"


class ShardRecord(Frozen):
    """The content of a shard.

    Attributes:
        plan, split, number: identify the shard.
        rows: [n] rows of the split's sample table.
        offsets, lengths: [n] position of each image in the file, bytes.
        bad: row and reason of each image left out.
        content: sha256 of ids, targets and image bytes.
        size: bytes of the file; not in the footer, which is part of the file.
    """

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
        plan: sha256 of the request.
        rows_per_shard: rows of the sample table per shard.
        short_side: larger images are reduced to this short side, pixels; None keeps all bytes as they are.
        max_pixels: an image with more pixels is bad.
    """

    root: Location
    split: str
    label_names: tuple[str, ...]
    plan: str
    rows_per_shard: int
    short_side: int | None
    max_pixels: int

    def finish(self, samples: pa.Table, number: int) -> ShardRecord:
        """Write shard `number` of a `SampleTable.table`, unless it exists. A shard with bad images is written again: they may be fixed.

        Raises:
            UserError: if the shard cannot be written, or an existing image cannot be read.
        """
        existing = self._find(number)
        return self._write(samples, number) if existing is None or existing.bad else existing

    def _find(self, number: int) -> ShardRecord | None:
        """Return the record of a complete shard of this plan, or None."""
        file = shard_file(self.root, self.split, number)
        try:
            with file.opened_input() as stream:
                footer = pq.read_metadata(stream).metadata or {}
                size = stream.size()
            record = ShardRecord.model_validate_json(footer[_RECORD_KEY.encode()]).model_copy(update={"size": size})
        except (OSError, pa.ArrowException, KeyError, ValidationError):
            return None  # missing or incomplete
        return record if (record.plan, record.split, record.number) == (self.plan, self.split, number) else None

    def _write(self, samples: pa.Table, number: int) -> ShardRecord:
        start = number * self.rows_per_shard
        shard_samples = samples.slice(start, self.rows_per_shard)
        rows: list[int] = []
        images: list[bytes] = []
        bad: list[tuple[int, str]] = []
        for position, uri in enumerate(shard_samples["uri"].to_pylist()):
            try:
                images.append(self._encoded(read_bytes(uri)))
                rows.append(start + position)
            except UserError as error:
                bad.append((start + position, str(error)))
            except FileNotFoundError:  # no path in the reason: the same images in another folder give the same bytes
                bad.append((start + position, os.strerror(errno.ENOENT)))
            except OSError as error:  # a passing fault of a network or disk must not leave images out for good
                raise UserError(f"{uri}: cannot be read ({error})") from None
        kept = shard_samples.take(pa.array(np.array(rows, np.int64) - start))
        target = SampleTable(kept, self.label_names, self.split).targets
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
        # Statistics would copy images into the footer. The other columns are too small for compression to pay.
        with pq.ParquetWriter(
            sink, table.schema, compression="none", use_dictionary=False, write_statistics=False
        ) as writer:
            writer.write_table(table, row_group_size=max(1, len(rows)))
            record = ShardRecord(
                plan=self.plan,
                split=self.split,
                number=number,
                rows=tuple(rows),
                offsets=_offsets(sink.getvalue(), images),
                lengths=tuple(map(len, images)),
                bad=tuple(bad),
                content=_content_hash(kept["image_id"].to_pylist(), target, images),
            )
            writer.add_key_value_metadata(
                {_RECORD_KEY: record.model_dump_json(exclude={"size"}), "label_names": json.dumps(self.label_names)}
            )
        data = sink.getvalue()
        shard_file(self.root, self.split, number).write_bytes(data)
        return record.model_copy(update={"size": len(data)})

    def _encoded(self, data: bytes) -> bytes:
        """Return the bytes to store. Every image is decoded, because only decoding shows whether it is intact."""
        image = decode(data, max_pixels=self.max_pixels)
        if self.short_side is None or min(image.shape[-2:]) <= self.short_side:
            return data
        if max(image.shape[-2:]) * self.short_side > _MAX_JPEG_SIDE * min(image.shape[-2:]):
            return data  # even the reduced image is too long for JPEG
        smaller = transform.resize(image, [self.short_side], antialias=True)
        encoded = io.BytesIO()
        Image.fromarray(smaller.permute(1, 2, 0).numpy()).save(encoded, "JPEG", quality=JPEG_QUALITY)
        return encoded.getvalue()


def _offsets(data: bytes, images: list[bytes]) -> tuple[int, ...]:
    """Return the offset of each image in the file, which stores them in order, with page headers between them."""
    offsets: list[int] = []
    end = 0
    for image in images:
        offset = data.find(image, end)
        assert offset >= 0, "Parquet stores the bytes of an image unchanged"
        offsets.append(offset)
        end = offset + len(image)
    return tuple(offsets)


def _content_hash(image_ids: list[str], target: npt.NDArray[np.int8], images: list[bytes]) -> str:
    digest = hashlib.sha256()
    for image_id, row, image in zip(image_ids, target, images, strict=True):
        for part in (image_id.encode(), row.tobytes(), image):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def _present_names(target: npt.NDArray[np.int8], names: tuple[str, ...]) -> pa.ListArray:
    """Return the names of the present labels of each row; target: [n, C]."""
    present = target == PRESENT
    ends = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(names, pa.string()).take(pa.array(np.nonzero(present)[1])))
