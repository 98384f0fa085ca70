"""What the doctor's findings are made from and of: labels and facts side by side, and one finding.

Shapes: n images over all splits (train, val, test, in that order), C labels. Per-image data stays in arrow and numpy; only the few
images that a finding shows become Python objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..config import ExperimentConfig
from ..types import SampleTable

Gravity = Literal["error", "warning", "info"]
GRAVITIES: tuple[Gravity, ...] = ("error", "warning", "info")
SHOWN = 12  # images and names that a finding shows


@dataclass(frozen=True)
class Shown:
    """An image that a finding shows: `split: file` (its id where it is a part of a file), and where it lies."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        gravity: `error` makes training stop or its scores wrong, `warning` costs quality, `info` is good to know.
        title: what was found, with numbers.
        mend: what to do about it.
        details: names, the first few.
        images: some of the images concerned.
    """

    gravity: Gravity
    title: str
    mend: str
    details: tuple[str, ...] = ()
    images: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers.

    Attributes:
        name, source: `train`, `val` or `test`, and what was read.
        num_images, num_unlabelled, num_unreadable, num_bytes: of its images.
        present, unknown: [C] int64, images with the label, and images where it is unknown.
        labels_per_image: [K] int64, images with 0, 1, ..., K - 1 labels.
    """

    name: str
    source: str
    num_images: int
    num_unlabelled: int
    num_unreadable: int
    num_bytes: int
    present: npt.NDArray[np.int64]
    unknown: npt.NDArray[np.int64]
    labels_per_image: npt.NDArray[np.int64]

    @property
    def mean_labels(self) -> float:
        """Labels of an image on average."""
        return float(self.present.sum() / self.num_images)


@dataclass(frozen=True)
class Evidence:
    """Labels and facts side by side; `start[s]` is the first row of split s, `facts` has a row for each image."""

    config: ExperimentConfig
    names: tuple[str, ...]
    tables: tuple[SampleTable, ...]
    samples: pa.Table
    start: npt.NDArray[np.int64]
    facts: pa.Table
    summaries: tuple[SplitSummary, ...]
    per_image: npt.NDArray[np.int32]

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.tables[0].label_names

    def split_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self.start, rows, side="right") - 1

    def show(self, rows: npt.NDArray[np.int64]) -> tuple[Shown, ...]:
        """The first few of these images."""
        rows = rows[:SHOWN]
        chosen = self.samples.take(pa.array(rows))
        ids, uris = (chosen[column].to_pylist() for column in ("image_id", "uri"))
        return tuple(
            Shown(f"{self.names[split]}: {image_id if '#' in uri else uri}", uri)  # a part of a file says nothing
            for split, image_id, uri in zip(self.split_of(rows), ids, uris, strict=True)
        )


def few(names: Sequence[str], number: int | None = None) -> tuple[str, ...]:
    """The first names, and how many more of `number` there are (None: of the names given)."""
    more = (len(names) if number is None else number) - SHOWN
    return (*names[:SHOWN], *([f"... and {more:,} more"] if more > 0 else []))


def listed(names: Sequence[str]) -> tuple[str, ...]:
    """The first names in one line."""
    return (", ".join(few(names)),)


def plural(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
