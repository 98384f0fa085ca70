"""What data sets in container files (tars, Arrow, Parquet) have in common: splits by name, lists of labels, the sample table."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT, SampleTable
from .stratify import SPLIT_WORDS
from .text_files import require_utf8

LABEL_FIELDS = ("labels", "label", "tags", "classes", "categories")
_SPLIT = re.compile(rf"({'|'.join(SPLIT_WORDS)})(?![a-z])")


def split_of(path: str) -> str | None:
    """`train`, `val` or `test` as a folder or file of the path is called so or begins so (`validation-003.tar`); else None."""
    for part in path.lower().split("/"):
        if found := _SPLIT.match(part):
            return SPLIT_WORDS[found[1]]
    return None


def by_split(root: Location, paths: Sequence[str]) -> dict[str, list[str]]:
    """Files by split, in the order given; all of them train where no name tells a split.

    Raises:
        UserError: if a name is not UTF-8, some names tell a split and others do not, or no file is train.
    """
    require_utf8(root, paths)
    found = [split_of(path) for path in paths]
    if not any(found):
        return {"train": list(paths)}
    groups: dict[str, list[str]] = {}
    for path, split in zip(paths, found, strict=True):
        if split is None:
            raise UserError(f"{root}: {path} tells no split, others do; begin its name with train, val or test")
        groups.setdefault(split, []).append(path)
    if "train" not in groups:
        raise UserError(f"{root}: no file of the train split among {', '.join(paths[:3])}; begin its name with train")
    return groups


def build_tables(
    parts: dict[str, tuple[pa.StringArray, pa.StringArray, npt.NDArray[np.int64], pa.StringArray]],
    label_names: tuple[str, ...] | None,
    root: Location,
) -> dict[str, SampleTable]:
    """Sample tables from lists of labels.

    Args:
        parts: split -> image ids [n], uris [n], how many labels each image has [n], all labels one behind the other.
        label_names: labels in the order wanted; None for all that occur in any split, in alphabetical order.
        root: the data set, for messages.

    Raises:
        UserError: if a label is not in `label_names`, or there is no label at all; if image ids are not unique.
    """
    if label_names is None:
        used = pa.chunked_array([labels for _, _, _, labels in parts.values()], pa.string())
        label_names = tuple(sorted(pc.unique(used).to_pylist()))
    if not label_names:
        raise UserError(f"{root}: no image has a label; check data.label_column")
    tables = {}
    for split, (image_ids, uris, num_labels, labels) in parts.items():
        if len(image_ids) == 0:
            raise UserError(f"{root}: the {split} split holds no image")
        counts = image_ids.value_counts()
        for one in counts.filter(pc.greater(counts.field("counts"), 1))[:1].to_pylist():
            raise UserError(
                f"{root}: {split} has the image id {one['values']!r} {one['counts']} times; make ids unique"
            )
        rows = np.repeat(np.arange(len(image_ids)), num_labels)
        columns = pc.index_in(labels, pa.array(label_names, pa.string()))
        if columns.null_count:
            first = pc.index(columns.is_null(), True).as_py()
            raise UserError(
                f"{root}: {split} image {image_ids[rows[first]]} has the label {labels[first].as_py()!r}, which is not one of the"
                f" {len(label_names)} labels; add it to data.labels or take it out"
            )
        targets = np.zeros((len(image_ids), len(label_names)), np.int8)
        targets[rows, columns.to_numpy()] = PRESENT
        target = pa.FixedSizeListArray.from_arrays(pa.array(targets.reshape(-1)), len(label_names))
        table = pa.table({"image_id": image_ids, "uri": uris, "target": target})
        tables[split] = SampleTable(table, label_names, root.name)
    return tables
