"""Turns a manifest's columns of single labels into targets: what 1, 0, -1, an empty cell or a word in them means."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import UserError
from ..io.storage import Location
from ..types import ABSENT, PRESENT, UNKNOWN

# codes beside 1 and 0, until the whole table has shown what these cells mean
_MINUS_ONE, _EMPTY, _SAID_UNKNOWN, _NO_VALUE = -1, -2, -3, -4
_USUAL = {
    **dict.fromkeys(("1", "true", "yes"), PRESENT),
    **dict.fromkeys(("0", "false", "no"), ABSENT),
    **{"-1": _MINUS_ONE, "": _EMPTY},
}
_NUMBERED = re.compile(r"(label|tag|class|category)s?[ _-]?\d+", re.IGNORECASE)
_NO_LABEL = (
    "If the column is no label, name the labels in a file (--data.labels FILE, one per line) or the column that lists them"
    " (--data.label-column NAME)"
)


@dataclass(frozen=True)
class ValueMeaning:
    """What the user says of the cells of label columns; None where the usual meaning holds.

    Attributes:
        present, absent, unknown: texts, compared without blanks around them; "" is the empty cell.
    """

    present: tuple[str, ...] | None = None
    absent: tuple[str, ...] | None = None
    unknown: tuple[str, ...] | None = None
    codes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        """Raise UserError if a text has two meanings."""
        codes: dict[str, int] = {}
        options = {"present": (self.present, PRESENT), "absent": (self.absent, ABSENT)}
        for option, (texts, code) in (options | {"unknown": (self.unknown, _SAID_UNKNOWN)}).items():
            for text in map(_plain, texts or ()):
                if codes.setdefault(text, code) != code:
                    raise UserError(f"data.{option}_values: {text!r} has two meanings; name each value once")
        object.__setattr__(self, "codes", codes)


def value_codes(
    manifest: Location, name: str, column: pa.ChunkedArray, first_row: int, meaning: ValueMeaning
) -> npt.NDArray[np.int8]:
    """Return the column of one label as [m] int8 codes for `resolve_values`.

    Args:
        manifest: the file, for messages.
        name: the column.
        column: m cells: numbers, truth values, texts or nothing.
        first_row: the manifest's row of the first cell, counted from 1.
        meaning: what the user says of values.

    Raises:
        UserError: for a value without a meaning, with column and row.
    """
    encoded = column.combine_chunks().dictionary_encode()
    texts = [_plain(value) for value in encoded.dictionary.to_pylist()]
    codes = [meaning.codes.get(text, _USUAL.get(text.lower(), _NO_VALUE)) for text in texts]
    codes.append(meaning.codes.get("", _EMPTY))  # null
    values = np.array(codes, np.int8)[encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)]
    wrong = np.flatnonzero(values == _NO_VALUE)
    if len(wrong):
        value = column[int(wrong[0])].as_py()
        raise UserError(
            f"{manifest}, row {first_row + wrong[0]}: {value!r} in column {name!r} is not 1, 0, -1 or empty;"
            f" {_hint(name, _plain(value))}"
        )
    return np.asarray(values, np.int8)


def resolve_values(
    manifest: Location, names: tuple[str, ...], codes: npt.NDArray[np.int8], meaning: ValueMeaning
) -> tuple[npt.NDArray[np.int8], list[str]]:
    """Return the targets of all label columns, and notes on the cells that are unknown.

    -1 and empty cells are unknown if the table has a 0. Without any 0 they may as well mean absent: CelebA writes -1 for it, others leave
    the cell empty. So the user has to say.

    Args:
        manifest: the file, for messages.
        names: the C columns.
        codes: [n, C] int8, what `value_codes` returned; changed in place.
        meaning: what the user says of values.

    Returns:
        [n, C] int8 in {1, 0, -1}.

    Raises:
        UserError: if no cell says that a label is absent.
    """
    counts = {code: int(np.count_nonzero(codes == code)) for code in (ABSENT, _MINUS_ONE, _EMPTY)}
    if not counts[ABSENT]:
        for code, text, shown in ((_MINUS_ONE, "-1", "-1"), (_EMPTY, '""', "empty")):
            if counts[code]:
                raise UserError(
                    f"{manifest}: no cell of the {len(names)} label columns is 0, and {counts[code]} are {shown}. If {shown} means"
                    f" absent, as in CelebA, give --data.absent-values {text}; if it means unknown, give --data.unknown-values {text}"
                )
        if meaning.unknown is None:
            raise UserError(
                f"{manifest}: all cells of the {len(names)} label columns are 1, so no image lacks a label; write 0 where a label is"
                " absent, or name the column that lists the labels (--data.label-column NAME)"
            )
    notes = [
        f"{manifest.name}: {counts[code]} of {codes.size} label cells are {shown}: unknown, not absent (else give"
        f" --data.absent-values {text})"
        for code, text, shown in ((_MINUS_ONE, "-1", "-1"), (_EMPTY, '""', "empty"))
        if counts[code]
    ]
    codes[codes < UNKNOWN] = UNKNOWN
    return codes, notes


def _plain(value: object) -> str:
    """Return a cell as text: whole numbers without decimals, and nothing for nan, which pandas writes for an empty cell."""
    if value is None or value != value:  # nan is the only value that differs from itself
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value).strip()
    return re.sub(r"\.0+$", "", text) if re.fullmatch(r"-?\d+\.0+", text) else text


def _hint(name: str, text: str) -> str:
    """Return what a cell without a meaning probably is, and what to do."""
    if _NUMBERED.fullmatch(name):
        return f"the columns {name!r} and its like seem to hold one label each. Join them into a column 'labels', with ; between labels"
    if name.lower() in ("class", "classes", "category", "categories", "target", "targets"):
        return f"does it list the labels? Then give --data.label-column {name}"
    if re.fullmatch(r"-?\d+,\d+", text):
        return f"{text!r} is a number with a decimal comma. Save the file with decimal points"
    if re.fullmatch(r"[xX✓✔*+]", text):
        return (
            f"{text!r} seems to mark a present label. Give --data.present-values {text}, and what an empty cell means:"
            ' --data.absent-values ""'
        )
    if text.isdigit():
        return (
            f"{text!r} seems to be a count or a number of a class. For counts, give all that mean present (--data.present-values 1 2 3)."
            f" {_NO_LABEL}"
        )
    return (
        "correct it, or say what it means with --data.present-values, --data.absent-values or --data.unknown-values."
        f" {_NO_LABEL}"
    )


USUAL_MEANING = ValueMeaning()
