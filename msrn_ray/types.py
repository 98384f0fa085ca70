"""The contracts between packages: label convention, sample table, batch and model output.

Labels are int8: 1 present, 0 absent, -1 unknown. Losses, label counts and metrics leave unknown labels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:  # code that only reads tables need not wait for torch
    from torch import Tensor

PRESENT, ABSENT, UNKNOWN = 1, 0, -1


@dataclass(frozen=True)
class SampleTable:
    """One split of a data set: its images and their labels.

    Attributes:
        table: columns `image_id` (string, unique), `uri` (string, a local path or a URI), `target`
            (fixed_size_list<int8>[C], values in {1, 0, -1}); n rows in a fixed order. With `data.group_column` also `group` (string):
            images of one group are never in two splits.
        label_names: the C label names, in the order of `target`.
        source: what was read, for messages ("instances_train2014.json", ...).
        notes: lines for the user (images dropped, images without a label, ...).
    """

    table: pa.Table
    label_names: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()

    @classmethod
    def from_columns(
        cls,
        image_ids: Sequence[str] | pa.ChunkedArray,
        uris: Sequence[str] | pa.ChunkedArray,
        targets: npt.NDArray[np.int8],
        label_names: tuple[str, ...],
        source: str,
        notes: tuple[str, ...] = (),
    ) -> SampleTable:
        """Build the table; targets: [n, C] int8 in {1, 0, -1}."""
        assert targets.shape == (len(uris), len(label_names))
        assert len(image_ids) == len(uris)
        table = pa.table({"image_id": _strings(image_ids), "uri": _strings(uris), "target": _target_column(targets)})
        return cls(table, label_names, source, notes)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def targets(self) -> npt.NDArray[np.int8]:
        """Return [n, C] int8 in {1, 0, -1}."""
        flat = self.table["target"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, dtype=np.int8).reshape(len(self), len(self.label_names))

    @property
    def groups(self) -> pa.ChunkedArray | None:
        """Return [n] strings, the group of each image; None if the images have no groups."""
        return self.table["group"] if "group" in self.table.column_names else None

    def with_groups(self, groups: pa.ChunkedArray) -> SampleTable:
        """Return the same images in groups: [n] strings."""
        return SampleTable(self.table.append_column("group", groups), self.label_names, self.source, self.notes)

    def with_targets(self, targets: npt.NDArray[np.int8], label_names: tuple[str, ...]) -> SampleTable:
        """Return the same images with other labels; targets: [n, K] int8 in {1, 0, -1}."""
        assert targets.shape == (len(self), len(label_names))
        position = self.table.schema.get_field_index("target")
        table = self.table.set_column(position, "target", _target_column(targets))
        return SampleTable(table, label_names, self.source, self.notes)

    def take(self, rows: npt.NDArray[np.int64]) -> SampleTable:
        """Return the split reduced to `rows` ([m] indices), in that order."""
        return SampleTable(self.table.take(pa.array(rows)), self.label_names, self.source, self.notes)


def _target_column(targets: npt.NDArray[np.int8]) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(targets.reshape(-1), pa.int8()), targets.shape[1])


def _strings(values: Sequence[str] | pa.ChunkedArray) -> pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values], pa.string())


class Batch(NamedTuple):
    """One batch from the data pipeline to the train step; B images of S x S pixels, C labels.

    Attributes:
        images: [B, 3, S, S] uint8, RGB, not normalised.
        target: [B, C] int8 in {1, 0, -1}.
        row: [B] int64, the row of each image in its sample table.
        valid: [B] bool; False marks a filler that keeps a rank without images in step. Its loss and score do not count.
    """

    images: Tensor
    target: Tensor
    row: Tensor
    valid: Tensor


class MSRNOutput(NamedTuple):
    """Model output; B images, C labels, G groups, D embedding width.

    Attributes:
        logits: [B, C] float.
        label_embedding: [C, D] float, E; None for the `gap` and `gmp` baselines.
        group_embedding: [G, D] float, Q; None for the baselines.
        assignment: [C, G] float in [0, 1], rows sum to 1: how much of a label goes to each group; None for the baselines.
    """

    logits: Tensor
    label_embedding: Tensor | None = None
    group_embedding: Tensor | None = None
    assignment: Tensor | None = None
