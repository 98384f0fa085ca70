"""Turns the label columns of Hugging Face files (texts, numbers, flags, a column per label) into lists of label names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from .label_columns import is_list, split_lists
from .multi_hot import to_label_numbers

# Last parts of nested columns that hold the class of each object of an image, where numbers repeat and are never flags
_OBJECT_FIELDS = ("category", "category_id", "class", "class_id", "class_label")
_SPLIT_FLAGS = ("is_train", "is_training", "is_val", "is_valid", "is_validation", "is_test")


class LabelBlock(NamedTuple):
    """The label cells of n rows of a file, and the names that numbers in them stand for (None: unknown)."""

    file: Location
    cells: pa.Array
    names: tuple[str, ...] | None


def flag_columns(file: Location, schema: pa.Schema, label_names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the columns that hold one label each: all of type bool, or those named in `label_names`; () if there are fewer than two.

    Raises:
        UserError: if a column of type bool is named like a split.
    """
    columns = {field.name: field.type for field in schema}
    if label_names is not None and all(
        name in columns and (pa.types.is_boolean(columns[name]) or pa.types.is_integer(columns[name]))
        for name in label_names
    ):
        return tuple(label_names)
    flags = tuple(name for name, kind in columns.items() if pa.types.is_boolean(kind))
    split = next((name for name in flags if name.lower() in _SPLIT_FLAGS), None)
    if split is not None:
        raise UserError(
            f"{file}: column {split!r} is named like a split and would be a label; save the splits as folders (train, validation,"
            " test), or name the columns of labels in a text file (data.labels)"
        )
    return flags if len(flags) > 1 else ()


def join_flag_columns(file: Location, table: pa.Table, names: Sequence[str]) -> pa.Array:
    """Return [n] list<string>: the columns of each row that hold true or 1.

    Raises:
        UserError: for an empty cell or another number.
    """
    present = np.zeros((table.num_rows, len(names)), bool)
    for position, name in enumerate(names):
        values = table[name].cast(pa.int64()).fill_null(-1).to_numpy()
        wrong = np.flatnonzero((values != 0) & (values != 1))
        if len(wrong):
            cell = table[name][int(wrong[0])].as_py()
            raise UserError(
                f"{file}: row {wrong[0]} of a batch has {cell!r} in column {name!r}; write true or false (1 or 0), or use a"
                " manifest, which may hold unknown labels"
            )
        present[:, position] = values == 1
    rows, columns = np.nonzero(present)
    return _lists(rows, len(present), pa.array(names, pa.string()).take(pa.array(columns)))


def name_labels(
    root: Location, column: str, blocks: Sequence[LabelBlock], separator: str | None
) -> tuple[list[pa.Array], tuple[str, ...]]:
    """Return the label names of each block as [n] list<string>, and notes on how they were read.

    Args:
        root: the data set, for messages.
        column: the label column.
        blocks: all blocks of all splits: whether numbers are flags, and what separates labels in texts, is decided over all of them.
        separator: between labels in a text; None: the only usual one that occurs.

    Raises:
        UserError: if numbers have no names or exceed them, lists of 0 and 1 can be read in two ways, or the column has another type.
    """
    groups: dict[tuple[str, tuple[str, ...] | None], list[int]] = {}
    for position, block in enumerate(blocks):
        kind = _kind(block, column)
        groups.setdefault((kind, None if kind.startswith("text") else block.names), []).append(position)
    named: list[pa.Array] = [None] * len(blocks)
    notes: list[str] = []
    for (kind, names), positions in groups.items():
        cells = [blocks[position].cells for position in positions]
        if kind == "text":
            texts = pa.chunked_array([cell.cast(pa.string()) for cell in cells])
            lists, how = split_lists(root, column, texts, separator)
            notes.append(f"{root.name}: {column}: {how}")
            whole = _texts(lists.combine_chunks())
        elif kind == "texts":
            whole = _texts(pa.concat_arrays([cell.cast(pa.list_(pa.string())) for cell in cells]))
        else:
            whole = _numbers(blocks[positions[0]].file, column, cells, names, notes)
        first = 0
        for position, cell in zip(positions, cells, strict=True):
            named[position] = whole.slice(first, len(cell))
            first += len(cell)
    return named, tuple(notes)


def _kind(block: LabelBlock, column: str) -> str:
    """Return "text" or "texts", "numbers" or "flags"."""
    kind = block.cells.type
    inner = kind.value_type if is_list(kind) else kind
    if pa.types.is_string(inner) or pa.types.is_large_string(inner):
        return "texts" if is_list(kind) else "text"
    if pa.types.is_integer(inner):
        return "numbers"
    if pa.types.is_boolean(inner) and is_list(kind):
        return "flags"
    raise UserError(
        f"{block.file}: {column} is {kind}; it must hold a label or a list of labels, as text or whole numbers"
    )


def _numbers(
    file: Location, column: str, cells: Sequence[pa.Array], names: tuple[str, ...] | None, notes: list[str]
) -> pa.Array:
    lists = []
    for cell in cells:
        if not is_list(cell.type):
            cell = pa.ListArray.from_arrays(np.arange(len(cell) + 1, dtype=np.int32), cell)
        inner = pa.bool_() if pa.types.is_boolean(cell.type.value_type) else pa.int64()
        lists.append(cell.cast(pa.list_(inner)))
    whole = pa.concat_arrays(lists)
    if "." not in column or column.rpartition(".")[2] not in _OBJECT_FIELDS:
        whole, note = to_label_numbers(f"{file}: {column}", whole, None if names is None else len(names))
        if note is not None:
            notes.append(f"{column}: {note}")
    if names is None:
        raise UserError(
            f"{file}: {column} holds numbers without names; name them in a text file (data.labels), one per line"
        )
    flat = whole.flatten()
    most = pc.max(flat).as_py()
    if most is not None and most >= len(names):
        raise UserError(f"{file}: {column} holds {most}, but there are {len(names)} names (0 to {len(names) - 1})")
    known = pc.greater_equal(pc.fill_null(flat, -1), 0)  # -1 is how `datasets` writes "no label"
    return _keep(whole, pa.array(names, pa.string()).take(pc.if_else(known, flat, 0)), known)


def _texts(lists: pa.Array) -> pa.Array:
    flat = pc.utf8_trim_whitespace(lists.flatten())
    return _keep(lists, flat, pc.fill_null(pc.not_equal(flat, ""), False))


def _keep(lists: pa.Array, flat: pa.Array, known: pa.Array) -> pa.Array:
    """Return lists of the elements of `flat` that are `known`, in the rows of `lists`."""
    kept = known.to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)[kept]
    return _lists(rows, len(lists), flat.filter(known).cast(pa.string()))


def _lists(rows: np.ndarray, num_rows: int, values: pa.Array) -> pa.Array:
    ends = np.cumsum(np.bincount(rows, minlength=num_rows))
    return pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), values)


def with_groups(file: Location, images: pa.Table, cells: pa.Table, name: str | None) -> pa.Table:
    """Return images with their groups (column `group`, [n] string), if `name` is a column of groups.

    Raises:
        UserError: if the column holds neither texts nor whole numbers, or a cell is empty.
    """
    if name is None:
        return images
    column = cells[name]
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (text or pa.types.is_integer(column.type)):
        raise UserError(f"{file}: {name} (data.group_column) is {column.type}; it must hold texts or whole numbers")
    groups = pc.utf8_trim_whitespace(column.cast(pa.string()))
    if (row := pc.index(pc.equal(groups.fill_null(""), ""), True).as_py()) >= 0:
        raise UserError(f"{file}: row {row} of a batch has no {name} (data.group_column); fill it in")
    return images.append_column("group", groups)
