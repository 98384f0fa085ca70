"""Turns lists of labels into targets: a list column, or texts that are lists, names with a separator, or flags by position."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from ..types import PRESENT
from .list_texts import LIST_TEXT, parse_list_text
from .separators import USUAL_SEPARATORS, split_by_recurrence
from .table_files import parse_json_lines

_FLAGS = r"^\s*[\[{(]?\s*[01](?:\s*[\s,;|]\s*[01])*\s*[\]})]?\s*$"  # "0 1 1 0", [0,1,1,0]; not 10;11, which are names
_DIGITS = r"^[01]{2,}$"  # 0110
_QUOTED = r"""^'.*'$|^".*"$"""


def as_text(manifest: Location, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts or whole numbers as strings; null stays null.

    Raises:
        UserError: for another type.
    """
    _require_text(manifest, name, column.type)
    return column.cast(pa.string())


def split_lists(
    manifest: Location, name: str, column: pa.ChunkedArray, separator: str | None
) -> tuple[pa.ChunkedArray, str]:
    """Return a column of lists, or of texts that are lists, as lists of strings.

    Args:
        manifest: the file, for messages.
        name: the column.
        column: lists; or texts, which are lists, flags or labels between separators; or one whole number per row.
        separator: between labels in a text. None: the only one of `USUAL_SEPARATORS` that occurs, else see `split_by_recurrence`.

    Returns:
        [n] list<string>, and how the column was read, for the user.

    Raises:
        UserError: if several separators occur, a text is a broken list, or the column has another type.
    """
    if is_list(column.type):
        return _as_lists(manifest, name, column), "lists"
    texts = as_text(manifest, name, column).fill_null("")
    if separator is not None:
        return _split(manifest, name, texts, separator)
    filled = pc.filter(texts, pc.not_equal(pc.utf8_trim_whitespace(texts), ""))
    if len(filled) and pc.all(pc.match_substring_regex(filled, _FLAGS)).as_py():
        digits = pc.replace_substring_regex(texts, r"[^01]", "")
        return pc.split_pattern(pc.replace_substring_regex(digits, r"([01])", r"\1,"), ","), "0 and 1"
    if (
        pc.any(pc.match_substring_regex(texts, LIST_TEXT)).as_py()
        or pc.any(pc.match_substring_regex(texts, r"^\s*\[")).as_py()
    ):
        return _parse_lists(manifest, name, texts)
    if pc.any(pc.match_substring_regex(texts, r"[\r\n]")).as_py():
        return _split_lines(manifest, name, texts), "one label per line of the cell"
    used = [candidate for candidate in USUAL_SEPARATORS if pc.any(pc.match_substring(texts, candidate)).as_py()]
    if len(used) > 1:
        raise UserError(
            f"{manifest}: column {name!r} holds {' and '.join(map(repr, used))}; choose the separator of the labels"
            f" (--data.label-separator '{used[0]}')"
        )
    if used:
        return _split(manifest, name, texts, used[0])
    unusual, decision = split_by_recurrence(pc.unique(texts).to_pylist())
    if unusual is None:
        return pc.split_pattern(texts, "\n"), f"one label per row; {decision}" if decision else "one label per row"
    return pc.split_pattern(texts, unusual), f"labels separated by {unusual!r}: {decision}"


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
    lists = _split_digits(lists, label_names)
    flags = _read_flags(manifest, name, lists, label_names)
    if flags is not None:
        return flags
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
            + (
                " a manifest lists labels by name, so write the names"
                if labels[first].as_py().isdigit()
                else " correct it or add it there"
            )
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
    if pa.types.is_boolean(column.type.value_type):
        column = column.cast(pa.list_(pa.int8()))  # flags
    _require_text(manifest, name, column.type.value_type)
    return column.cast(pa.list_(pa.string()))


def _split_digits(lists: pa.ChunkedArray, label_names: Sequence[str] | None) -> pa.ChunkedArray:
    """Split texts such as 0110 into flags, if each row holds one of the same length and they are not names of labels."""
    values = pc.utf8_trim_whitespace(pc.list_flatten(lists)).fill_null("")
    distinct = {*pc.unique(values).to_pylist()} - {""}
    if (
        not distinct
        or distinct <= {*(label_names or ())}
        or len({len(text) for text in distinct}) > 1
        or not pc.all(pc.match_substring_regex(pa.array(sorted(distinct)), _DIGITS)).as_py()
        or pc.max(pc.list_value_length(lists)).as_py() > 1
    ):
        return lists
    joined = pc.utf8_trim_whitespace(pc.binary_join(lists, ""))
    return pc.split_pattern(pc.replace_substring_regex(joined, r"([01])", r"\1,"), ",")


def _read_flags(
    manifest: Location, name: str, lists: pa.ChunkedArray, label_names: Sequence[str] | None
) -> tuple[tuple[str, ...], npt.NDArray[np.int8]] | None:
    """Return the label names and targets of lists that hold a flag per label, or None if the lists hold names.

    Raises:
        UserError: if the lists hold only 0 and 1, but do not give one flag per name of `label_names`.
    """
    values = pc.utf8_trim_whitespace(pc.list_flatten(lists)).fill_null("")
    filled = pc.filter(values, pc.not_equal(values, ""))
    occurring = {*pc.unique(filled).to_pylist()}
    if not occurring or not occurring <= {"0", "1"} or occurring <= {*(label_names or ())}:
        return None
    nonempty = pc.not_equal(pc.utf8_trim_whitespace(pc.binary_join(lists, "")), "")
    rows = np.flatnonzero(nonempty.to_numpy(zero_copy_only=False))
    per_row = np.bincount(
        pc.list_parent_indices(lists).to_numpy()[pc.not_equal(values, "").to_numpy(zero_copy_only=False)],
        minlength=len(lists),
    )
    lengths = {*per_row[rows].tolist()}
    shown = f"{manifest}: column {name!r} holds only 0 and 1"
    if len(lengths) > 1 or len(rows) < len(lists):
        counts = "or nothing" if len(lengths) == 1 else f"{min(lengths)} to {max(lengths)} in a row"
        raise UserError(
            f"{shown}, {counts}. A flag per label needs as many in each row; numbers of labels need names: write the labels by name"
        )
    (length,) = lengths
    if label_names is None or len(label_names) != length or length == 1:
        wrong = "" if label_names is None else f", which lists {len(label_names)}"
        raise UserError(
            f"{shown}, {length} in each row: a flag per label, by position? Then name the {length} labels in order"
            f" (--data.labels FILE, one per line){wrong}. If these are two labels called 0 and 1, list them in that file"
        )
    return tuple(label_names), np.array(filled.to_pylist(), np.int8).reshape(len(lists), length)


def _split(manifest: Location, name: str, texts: pa.ChunkedArray, separator: str) -> tuple[pa.ChunkedArray, str]:
    """Split texts at a separator; refuse lists that a program wrote, whose brackets and quotes would become part of the labels."""
    for row in np.flatnonzero(pc.match_substring_regex(texts, LIST_TEXT).to_numpy(zero_copy_only=False)):
        if parse_list_text(texts[int(row)].as_py()) is not None:
            raise UserError(
                f"{manifest}, row {row + 1}: {texts[int(row)].as_py()[:80]!r} in column {name!r} is a list in text; leave out"
                f" --data.label-separator {separator!r}, and all rows are read as lists"
            )
    lists = pc.split_pattern(texts, separator)
    quoted = [
        text
        for text in pc.unique(pc.utf8_trim_whitespace(pc.list_flatten(lists))).to_pylist()
        if re.search(_QUOTED, text)
    ]
    if quoted:
        raise UserError(
            f"{manifest}: the label {quoted[0]} in column {name!r} is in quotes; remove the quotes, or write JSON lists"
            ' (["dog", "person"])'
        )
    return lists, f"labels separated by {separator!r}"


def _split_lines(manifest: Location, name: str, texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Split cells that hold a label per line, unless a missing quote explains the line breaks."""
    lines = pc.split_pattern_regex(texts, r"\r\n|\r|\n")
    others = pc.match_substring_regex(texts, r"[;|,]")
    if (row := pc.index(pc.and_(others, pc.match_substring_regex(texts, r"[\r\n]")), True).as_py()) >= 0:
        raise UserError(f"{manifest}, row {row + 1}: column {name!r} has a line break in it; is a quote missing?")
    return lines


def _parse_lists(manifest: Location, name: str, texts: pa.ChunkedArray) -> tuple[pa.ChunkedArray, str]:
    """Parse lists in texts: JSON at the speed of its parser, each chunk at once; other forms text by text."""
    is_list_text = pc.match_substring_regex(texts, LIST_TEXT)
    empty = pc.equal(pc.utf8_trim_whitespace(texts), "")
    bracketed = pc.or_(is_list_text, pc.match_substring_regex(texts, r"^\s*\["))
    if (row := pc.index(pc.or_(bracketed, empty), False).as_py()) >= 0:
        raise UserError(
            f"{manifest}, row {row + 1}: {texts[row].as_py()!r} in column {name!r} is no JSON list, but other rows hold one;"
            " write JSON lists in all rows, or choose the separator of the labels (--data.label-separator ';')"
        )
    if pc.all(pc.or_(pc.match_substring_regex(texts, r"^\s*\["), empty)).as_py():
        parsed = _parse_json(manifest, name, pc.if_else(empty, "[]", texts))
        if parsed is not None:
            return parsed, "JSON lists"
    encoded = texts.combine_chunks().dictionary_encode()
    distinct = [parse_list_text(text) for text in encoded.dictionary.to_pylist()]
    indices = encoded.indices
    if None in distinct:
        row = pc.index(indices, distinct.index(None)).as_py()
        wrong = texts[row].as_py()
        raise UserError(
            f'{manifest}, row {row + 1}: {wrong[:80]!r} is not a JSON list of labels; write it as ["dog", "person"]'
        )
    if len({type(label) for labels in distinct for label in labels or ()}) > 1:
        raise UserError(
            f"{manifest}: its JSON lists hold values of different types; write each label as a text in double quotes"
        )
    labels = [[str(label) for label in labels or ()] for labels in distinct]
    return pa.chunked_array([pa.array(labels, pa.list_(pa.string())).take(indices)]), "lists in text"


def _parse_json(manifest: Location, name: str, texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Parse JSON lists, each chunk at once as lines of JSON objects; None if a text is not JSON.

    Raises:
        UserError: if the lists hold neither texts nor whole numbers.
    """
    lines = pc.binary_join_element_wise('{"labels":', texts, "}\n", "")
    parsed = []
    for chunk in lines.chunks:
        text = pc.binary_join(pa.ListArray.from_arrays([0, len(chunk)], chunk), "")[0].as_buffer()
        try:
            table = parse_json_lines(text)
        except ValueError:
            return None
        if table.num_rows != len(chunk) or table.column_names != ["labels"] or not is_list(table["labels"].type):
            return None
        parsed += _as_lists(manifest, name, table["labels"]).chunks
    return pa.chunked_array(parsed, pa.list_(pa.string()))
