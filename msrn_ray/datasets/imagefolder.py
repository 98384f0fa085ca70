"""Reads the `imagefolder` layout of Hugging Face: images beside a `metadata.jsonl` or `metadata.csv`, often in folders of splits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from ..errors import UserError
from ..io.storage import Location
from ..types import SampleTable
from .containers import by_split
from .manifest import NamedColumns, read_manifest
from .split_names import SPLITS, SplitName

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def find_metadata(root: Location) -> list[str]:
    """Return the paths of the metadata files below `root`, or in it; none if other Parquet files hold the images."""
    names = root.names(recursive=True, missing_ok=True)
    found = [name for name in names if name.rpartition("/")[2] in METADATA]
    return [] if any(name.endswith(".parquet") and name not in found for name in names) else found


def read_imagefolder(
    root: Location,
    files: Sequence[str],
    named: NamedColumns,
    *,
    label_names: tuple[str, ...] | None = None,
    label_separator: str | None = None,
) -> dict[SplitName, SampleTable]:
    """Read the images of all metadata files.

    Args:
        root: the data set.
        files: paths of the metadata files below `root`, see `find_metadata`. The folders give the splits.
        named: the columns with unusual names.
        label_names: labels in the requested order; None: all that occur in any split, in alphabetical order.
        label_separator: between labels in a text; None: detected.

    Returns:
        split -> n rows in the order of the files; image_id is the path as written.

    Raises:
        UserError: if a file has a fault as a manifest, a split has two files, or only some folders give a split.
    """
    read = partial(read_manifest, named=named, label_separator=label_separator)
    paths = by_split(root, files)
    for split, names in paths.items():
        if len(names) > 1:
            raise UserError(
                f"{root}: {names[0]} and {names[1]} both hold the {split} split; keep one metadata file per split"
            )
    if [*paths] == ["train"] and "/" not in paths["train"][0]:
        images = read(root / paths["train"][0], label_names=label_names)
        if images.split is None:
            return {"train": images.samples}
        rows = {name: np.flatnonzero(images.split == position) for position, name in enumerate(SPLITS)}
        return {name: images.samples.take(part) for name, part in rows.items() if len(part)}
    tables: dict[SplitName, SampleTable] = {}
    if label_names is None:
        # Labels that one split lacks count in all.
        labels = {name for names in paths.values() for name in read(root / names[0]).samples.label_names}
        label_names = tuple(sorted(labels))
    for split, names in paths.items():
        images = read(root / names[0], label_names=label_names)
        rows_of = None if images.split is None else np.flatnonzero(images.split == SPLITS.index(split))
        tables[split] = images.samples if rows_of is None else images.samples.take(rows_of)
    return tables
