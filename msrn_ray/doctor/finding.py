"""The types of the doctor: facts about a data set, and one finding.

Shapes: n images over all splits (train, val, test, in that order), S splits, C labels. Per-image data stays in arrow and numpy;
only the few images that a finding shows become Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..config import ExperimentConfig
from ..labels.graph import LabelCounts

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # most severe first
MAX_SHOWN = 12  # images and names that a finding shows


@dataclass(frozen=True)
class ShownImage:
    """An image that a finding shows; the caption is `split: file`, or `split: id` for an image that is a part of a file."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Finding:
    """One problem, or one fact worth knowing.

    Attributes:
        severity: `error` stops training or makes its scores wrong, `warning` costs quality, `info` is good to know.
        title: what was found, with numbers.
        fix: what to do about it.
        details: the first few names.
        images: some of the images concerned.
    """

    severity: Severity
    title: str
    fix: str
    details: tuple[str, ...] = ()
    images: tuple[ShownImage, ...] = ()


@dataclass(frozen=True)
class SplitSummary:
    """One split in numbers.

    Attributes:
        name, source: `train`, `val` or `test`, and what was read.
        num_images, num_unreadable, num_bytes: of its images.
        unlabelled: int64, the rows of the split without a label, not even an unknown one.
        present, unknown: [C] int64, images where the label is present, and images where it is unknown.
        labels_per_image: [K] int64, images with 0, 1, ..., K - 1 labels.
    """

    name: str
    source: str
    num_images: int
    unlabelled: npt.NDArray[np.int64]
    num_unreadable: int
    num_bytes: int
    present: npt.NDArray[np.int64]
    unknown: npt.NDArray[np.int64]
    labels_per_image: npt.NDArray[np.int64]

    @property
    def num_unlabelled(self) -> int:
        """Return the number of images without a label."""
        return len(self.unlabelled)

    @property
    def mean_labels(self) -> float:
        """Return the mean number of labels per image."""
        return float(self.present.sum() / self.num_images)


@dataclass(frozen=True)
class LabelFacts:
    """What the label checks need besides the images.

    Attributes:
        counts: label counts of the train split.
        graph: counts that the label graph is made from: `counts`, or those of `data.label_counts`.
        missing_words: labels without a word vector.
    """

    counts: LabelCounts
    graph: LabelCounts
    missing_words: Sequence[str] = ()


@dataclass(frozen=True)
class DatasetFacts:
    """Labels and images of all splits; `config` is the experiment that they are checked for.

    Attributes:
        split_names, summaries: one for each split.
        label_names: the C label names.
        first_rows: [S] int64, where each split starts in `samples`.
        samples: [n] rows of `image_id`, `uri`, `target`.
        images: [n] rows of schema `diagnosis.FACTS`, in the order of `samples`.
    """

    config: ExperimentConfig
    split_names: tuple[str, ...]
    label_names: tuple[str, ...]
    samples: pa.Table
    first_rows: npt.NDArray[np.int64]
    images: pa.Table
    summaries: tuple[SplitSummary, ...]

    def split_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of the split that each row is in."""
        return np.searchsorted(self.first_rows, rows, side="right") - 1

    def show(self, rows: npt.NDArray[np.int64]) -> tuple[ShownImage, ...]:
        """Return the first few of these images."""
        rows = rows[:MAX_SHOWN]
        chosen = self.samples.take(pa.array(rows))
        ids, uris = (chosen[column].to_pylist() for column in ("image_id", "uri"))
        return tuple(  # the URI of a part of a file holds only numbers, so its id is shown
            ShownImage(f"{self.split_names[split]}: {image_id if '#' in uri else uri}", uri)
            for split, image_id, uri in zip(self.split_of(rows), ids, uris, strict=True)
        )


def shorten(names: Sequence[str], total: int | None = None) -> tuple[str, ...]:
    """Return the first names and a line that counts the rest; `total` is the number of names, by default of those given."""
    num_more = (len(names) if total is None else total) - MAX_SHOWN
    return (*names[:MAX_SHOWN], *([f"... and {num_more:,} more"] if num_more > 0 else []))


def about_labels(severity: Severity, names: Sequence[str], problem: str, fix: str) -> Iterator[Finding]:
    """Yield the finding that these labels have a problem, if there are any."""
    if names:
        yield Finding(severity, f"{plural(len(names), 'label')} {problem}", fix, (", ".join(shorten(names)),))


def plural(number: int, noun: str) -> str:
    """Return `1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
