"""Turns the labels of a manifest into targets: a list per row (text, JSON or a list column), or a column per label."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, UNKNOWN
from .table_files import parse_json_lines

SEPARATORS = (";", "|", ",")
_CELLS = {
    **{"1": PRESENT, "1.0": PRESENT, "true": PRESENT, "True": PRESENT, "TRUE": PRESENT},
    **{"0": ABSENT, "0.0": ABSENT, "false": ABSENT, "False": ABSENT, "FALSE": ABSENT},
    **{"-1": UNKNOWN, "-1.0": UNKNOWN, "": UNKNOWN},
}
_CELL_TEXTS = pa.array(_CELLS)
_CELL_VALUES = np.array([*_CELLS.values()], np.int8)
_NO_VALUE = np.int8(2)


def as_text(manifest: Location, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts or whole numbers as strings; null stays null.

    Raises:
        UserError: for another type.
    """
    _require_text(manifest, name, column.type)
    return column.cast(pa.string())


def label_values(manifest: Location, name: str, column: pa.ChunkedArray, first_row: int) -> npt.NDArray[np.int8]:
    """Return the column of one label as [m] int8 in {1, 0, -1}; empty cells are -1.

    Args:
        manifest: the file, for messages.
        name: the column.
        column: m cells: 1, 0, -1 as numbers or text, true and false, or empty.
        first_row: the manifest's row of the first cell, counted from 1.

    Raises:
        UserError: for another value, with column and row.
    """
    kind = column.type
    if pa.types.is_boolean(kind) or pa.types.is_null(kind):
        values = column.cast(pa.int8()).fill_null(UNKNOWN).to_numpy()
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        numbers = column.cast(pa.float64(), safe=False).fill_null(UNKNOWN).to_numpy()
        numbers = np.where(np.isnan(numbers), UNKNOWN, numbers)  # pandas writes empty cells as nan
        values = np.where(np.isin(numbers, (PRESENT, ABSENT, UNKNOWN)), numbers, _NO_VALUE).astype(np.int8)
    else:
        texts = as_text(manifest, name, column).fill_null("")
        found = pc.index_in(texts, value_set=_CELL_TEXTS)
        if found.null_count:
            found = pc.index_in(pc.utf8_trim_whitespace(texts), value_set=_CELL_TEXTS)
        values = np.append(_CELL_VALUES, _NO_VALUE)[found.fill_null(len(_CELL_VALUES)).to_numpy()]
    wrong = np.flatnonzero(values == _NO_VALUE)
    if len(wrong):
        raise UserError(
            f"{manifest}, row {first_row + wrong[0]}: {column[int(wrong[0])].as_py()!r} in column {name!r} is not 1, 0, -1 or"
            " empty; correct it. If the column is no label, name the labels in a file (--data.labels FILE, one per line) or"
            " the column that lists them (--data.label-column NAME)"
        )
    return np.asarray(values, np.int8)


def split_lists(
    manifest: Location, name: str, column: pa.ChunkedArray, separator: str | None
) -> tuple[pa.ChunkedArray, str]:
    """Return a column of lists, or of texts that are lists, as lists of strings.

    Args:
        manifest: the file, for messages.
        name: the column.
        column: lists; or texts, which are JSON lists or labels between separators; or one whole number per row.
        separator: between labels in a text. None: the only one of `SEPARATORS` that occurs.

    Returns:
        [n] list<string>, and how the column was read, for the user.

    Raises:
        UserError: if several separators occur, a text contains a line break or is a broken JSON list, or the column has another type.
    """
    if is_list(column.type):
        return _as_lists(manifest, name, column), "lists"
    texts = as_text(manifest, name, column).fill_null("")
    if (row := pc.index(pc.match_substring_regex(texts, r"[\r\n]"), True).as_py()) >= 0:
        raise UserError(f"{manifest}, row {row + 1}: column {name!r} has a line break in it; is a quote missing?")
    is_json = pc.match_substring_regex(texts, r"^\s*\[")
    if separator is None and pc.any(is_json).as_py():
        return _parse_lists(manifest, name, texts, is_json), "JSON lists"
    if separator is None:
        used = [candidate for candidate in SEPARATORS if pc.any(pc.match_substring(texts, candidate)).as_py()]
        if len(used) > 1:
            raise UserError(
                f"{manifest}: column {name!r} holds {' and '.join(map(repr, used))}; choose the separator of the labels"
                f" (--data.label-separator '{used[0]}')"
            )
        if not used:
            return pc.split_pattern(texts, "\n"), "one label per row"
        separator = used[0]
    return pc.split_pattern(texts, separator), f"labels separated by {separator!r}"


def encode_lists(
    manifest: Location, name: str, lists: pa.ChunkedArray, label_names: Sequence[str] | None
) -> tuple[tuple[str, ...], npt.NDArray[np.int8]]:
    """Return the targets in {1, 0} of lists of labels. Blanks around a label and empty labels are ignored.

    Args:
        manifest: the file, for messages.
        name: the column, for messages.
        lists: [n] list<string>.
        label_names: all labels in their order; None: the labels that occur, in alphabetical order.

    Returns:
        The C label names, and [n, C] int8.

    Raises:
        UserError: if no label occurs, or a label that is not in `label_names`, with its row.
    """
    rows = pc.list_parent_indices(lists).to_numpy()
    labels = pc.utf8_trim_whitespace(pc.list_flatten(lists)).fill_null("")
    occurring = sorted({*pc.unique(labels).to_pylist()} - {""})
    if not occurring:
        raise UserError(
            f"{manifest}: no row has a label in column {name!r}; name the column of labels (--data.label-column NAME)"
        )
    names = tuple(occurring if label_names is None else label_names)
    codes = pc.index_in(labels, value_set=pa.array([*names, ""])).fill_null(-1).to_numpy()
    unknown = np.flatnonzero(codes < 0)
    if len(unknown):
        first = int(unknown[0])
        raise UserError(
            f"{manifest}, row {rows[first] + 1}: label {labels[first].as_py()!r} is not among the {len(names)} of data.labels;"
            " correct it or add it there"
        )
    targets = np.zeros((len(lists), len(names)), np.int8)
    named = codes < len(names)
    targets[rows[named], codes[named]] = PRESENT
    return names, targets


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list, of any size."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _require_text(manifest: Location, name: str, kind: pa.DataType) -> None:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner)
    if not (text or pa.types.is_integer(inner) or pa.types.is_null(inner)):
        raise UserError(
            f"{manifest}: column {name!r} holds {kind}, but text is needed; convert it or name another column"
        )


def _as_lists(manifest: Location, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    _require_text(manifest, name, column.type.value_type)
    return column.cast(pa.list_(pa.string()))


def _parse_lists(manifest: Location, name: str, texts: pa.ChunkedArray, is_json: pa.ChunkedArray) -> pa.ChunkedArray:
    """Parse JSON lists in texts, each chunk at once as lines of JSON objects."""
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "")
    if (row := pc.index(pc.or_(is_json, empty), False).as_py()) >= 0:
        raise UserError(
            f"{manifest}, row {row + 1}: {texts[row].as_py()!r} in column {name!r} is no JSON list, but other rows hold one;"
            " write JSON lists in all rows, or choose the separator of the labels (--data.label-separator ';')"
        )
    lines = pc.binary_join_element_wise('{"labels":', pc.if_else(empty, "[]", texts), "}\n", "")
    parsed = []
    first_row = 1
    for chunk in lines.chunks:
        text = pc.binary_join(pa.ListArray.from_arrays([0, len(chunk)], chunk), "")[0].as_buffer()
        try:
            table = parse_json_lines(text)
        except ValueError:
            table = None
        if table is None or table.num_rows != len(chunk) or table.column_names != ["labels"]:
            raise UserError(f"{manifest}{_first_wrong_list(texts.slice(first_row - 1, len(chunk)), first_row)}")
        parsed += _as_lists(manifest, name, table["labels"]).chunks
        first_row += len(chunk)
    return pa.chunked_array(parsed, pa.list_(pa.string()))


def _first_wrong_list(texts: pa.ChunkedArray, first_row: int) -> str:
    for row, text in enumerate(texts.to_pylist(), first_row):
        try:
            valid = not text.strip() or isinstance(json.loads(text), list)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            return f', row {row}: {text[:80]!r} is not a JSON list; write it as ["dog", "person"]'
    return ": its JSON lists hold values of different types; write each label as a text in double quotes"
