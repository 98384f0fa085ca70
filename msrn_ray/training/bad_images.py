"""Images that could not be read or decoded, collected per rank and gathered over all ranks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import BadImagesError
from . import distributed

RECALLED = "could not be decoded before the interruption"  # stands for the reason until the image is met again
_NAMED = 5  # images that the error names


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read or decoded."""

    row: int
    uri: str
    reason: str


@dataclass
class BadImages:
    """The bad images of one split that this rank met, each row once.

    Attributes:
        seen: the first report of each row; later epochs meet the same file again.
        in_epoch: rows met since `begin_epoch`.
        reported: row -> reason, over all ranks, as `take_new` returned them.
    """

    seen: dict[int, BadImage] = field(default_factory=dict)
    in_epoch: set[int] = field(default_factory=set)
    reported: dict[int, str] = field(default_factory=dict)

    def begin_epoch(self) -> None:
        """Forget which rows the last epoch met."""
        self.in_epoch.clear()

    def add(self, image: BadImage) -> None:
        """Add a bad image that this rank met."""
        if image.row not in self.seen or self.seen[image.row].reason == RECALLED:
            self.seen[image.row] = image
        self.in_epoch.add(image.row)

    def recall(self, unreadable: npt.NDArray[np.bool_], uris: pa.ChunkedArray) -> None:
        """Add the images that could not be decoded before an interruption; unreadable: [N] bool, uris: [N] string."""
        rows = np.flatnonzero(unreadable)
        for row, uri in zip(rows.tolist(), uris.take(pa.array(rows)).to_pylist(), strict=True):
            self.add(BadImage(row, uri, RECALLED))

    def gather(self) -> list[BadImage]:
        """Return the images of all ranks by row, each row once; the same on every rank, which must all call it."""
        found = {image.row: image for part in distributed.all_gather(self.seen) for image in part.values()}
        return [found[row] for row in sorted(found)]

    def gather_epoch(self) -> set[int]:
        """Return the rows that any rank met in this epoch; the same on every rank, which must all call it."""
        return set().union(*distributed.all_gather(self.in_epoch))

    def take_new(self, gathered: Collection[BadImage]) -> list[BadImage]:
        """Return those of the gathered images that are not reported yet with this reason, and mark them as reported."""
        new = [image for image in gathered if self.reported.get(image.row) != image.reason]
        self.reported = {image.row: image.reason for image in gathered}
        return new


def check_bad_images(images: Collection[BadImage], split: str, num_images: int, max_fraction: float) -> None:
    """Refuse a split with more bad images than `data.max_bad_fraction` allows.

    Args:
        images: the bad images of the split.
        split: its name.
        num_images: all images of the split.
        max_fraction: the largest part that may be bad, in [0, 1].

    Raises:
        BadImagesError: with the first images and their reasons.
    """
    if len(images) <= max_fraction * num_images:
        return
    first = sorted(images, key=lambda image: image.row)[:_NAMED]
    names = "; ".join(f"{image.uri} ({image.reason})" for image in first)
    more = f"; and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    raise BadImagesError(
        f"{len(images)} of {num_images} {split} images cannot be decoded, more than data.max_bad_fraction={max_fraction} allows:"
        f" {names}{more}; fix them, take them out of the data set, or raise data.max_bad_fraction"
    )
