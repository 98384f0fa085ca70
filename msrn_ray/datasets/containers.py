"""Shared parts of the readers of container files (tars, Arrow, Parquet): splits by file name, sample tables from lists of labels."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .split_names import SPLIT_WORDS, SplitName
from .text_files import require_utf8

LABEL_FIELDS = ("labels", "label", "tags", "classes", "categories")
_SPLIT = re.compile(rf"({'|'.join(SPLIT_WORDS)})(?![a-z])")
# n images: unique id (null until it is given), URI of the image, its labels
LABELLED_IMAGES = pa.schema([("image_id", pa.string()), ("uri", pa.string()), ("labels", pa.list_(pa.string()))])


def split_of(path: str) -> SplitName | None:
    """Return the split that a folder or the file of the path is named after or begins with (`validation-003.tar`), else None."""
    for part in path.lower().split("/"):
        if found := _SPLIT.match(part):
            return SPLIT_WORDS[found[1]]
    return None


def by_split(root: Location, paths: Sequence[str]) -> dict[SplitName, list[str]]:
    """Return files by split, in their order. If no name gives a split, all files are train.

    Raises:
        UserError: if a name is not UTF-8, only some names give a split, or no file is train.
    """
    require_utf8(root, paths)
    splits = [split_of(path) for path in paths]
    if not any(splits):
        return {"train": list(paths)}
    groups: dict[SplitName, list[str]] = {}
    for path, split in zip(paths, splits, strict=True):
        if split is None:
            raise UserError(
                f"{root}: the name {path} gives no split, but other names do; begin it with train, val or test"
            )
        groups.setdefault(split, []).append(path)
    if "train" not in groups:
        raise UserError(f"{root}: no file of the train split among {', '.join(paths[:3])}; begin its name with train")
    return groups


def build_tables(
    parts: dict[SplitName, pa.Table],
    label_names: tuple[str, ...] | None,
    root: Location,
    notes: tuple[str, ...] = (),
) -> dict[SplitName, SampleTable]:
    """Build sample tables from lists of labels.

    Args:
        parts: the images of each split, of schema `LABELLED_IMAGES`, and `group` (string) if the images have groups.
        label_names: labels in the requested order; None: all that occur in any split, in alphabetical order.
        root: the data set, for messages.
        notes: how the labels were read, for the user.

    Raises:
        UserError: if a label is not in `label_names`, no label occurs, or an image id repeats.
    """
    if label_names is None:
        used = pc.list_flatten(pa.concat_tables(parts.values())["labels"])
        label_names = tuple(sorted(pc.unique(used).to_pylist()))
    if not label_names:
        raise UserError(f"{root}: no image has a label; check data.label_column")
    tables: dict[SplitName, SampleTable] = {}
    for split, part in parts.items():
        whole = part.combine_chunks()
        image_ids, uris, lists = whole.select(LABELLED_IMAGES.names).columns
        if len(image_ids) == 0:
            raise UserError(f"{root}: the {split} split holds no image")
        counts = image_ids.value_counts()
        for repeated in counts.filter(pc.greater(counts.field("counts"), 1))[:1].to_pylist():
            raise UserError(
                f"{root}: {split} has the image id {repeated['values']!r} {repeated['counts']} times; make ids unique"
            )
        rows, labels = pc.list_parent_indices(lists), pc.list_flatten(lists)
        columns = pc.index_in(labels, pa.array(label_names, pa.string()))
        if (first := pc.index(columns.is_null(), True).as_py()) >= 0:
            raise UserError(
                f"{root}: {split} image {image_ids[rows[first].as_py()]} has the label {labels[first].as_py()!r}, which is not"
                f" one of the {len(label_names)} labels; add it to data.labels or remove it"
            )
        targets = np.zeros((len(image_ids), len(label_names)), np.int8)
        targets[rows.to_numpy(), columns.to_numpy()] = PRESENT
        samples = SampleTable.from_columns(image_ids, uris, targets, label_names, root.name, notes)
        tables[split] = samples.with_groups(whole["group"]) if "group" in whole.column_names else samples
    return tables
