"""Checks that no group of images (`data.group_column`), such as those of one patient, is in two splits."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..types import SampleTable
from .split_names import SplitName
from .text_files import first_few


def require_groups(tables: Mapping[SplitName, SampleTable], column: str | None) -> None:
    """Refuse tables without the requested groups, and groups that are in more than one split.

    Args:
        tables: the splits by name.
        column: `data.group_column`.

    Raises:
        UserError: with the first group and an image of it in each of its splits.
    """
    groups = {name: table.groups for name, table in tables.items() if table.groups is not None}
    if len(groups) < len(tables):
        if column is None:
            return
        source = next(table.source for table in tables.values())
        raise UserError(
            f"data.group_column {column!r}: {source} was read without groups; only manifests and Hugging Face data have a column of"
            " them, and `msrn prepare` keeps the groups if it is given the same option"
        )
    unique = {name: pc.unique(values) for name, values in groups.items()}
    counts = pa.concat_arrays(list(unique.values())).value_counts()
    cut = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if not len(cut):
        return
    images = [
        f"{name} (image {table.table['image_id'][row].as_py()!r})"
        for name, table in tables.items()
        if (row := pc.index(groups[name], cut[0]).as_py()) >= 0
    ]
    raise UserError(
        f"data.group_column {column!r}: the group {cut[0].as_py()!r} is in the splits {' and '.join(images)}; groups in several splits:"
        f" {len(cut)} ({first_few(cut.to_pylist())}). Give each group one split, remove the splits to have them drawn by group, or"
        " leave out data.group_column"
    )
