"""Reads the label files of WebDataset samples (`.json`, `.cls`, `.npy`, `.txt`) and turns them into lists of label names."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from .containers import LABEL_FIELDS
from .label_columns import split_lists
from .multi_hot import to_label_numbers
from .text_files import is_utf8

# A text that may list several labels, or a list of names and numbers, or of flags
LabelValue: TypeAlias = str | list[str | int | bool]

_KINDS = ("json", "cls", "npy", "txt")  # if a sample has several, the first holds its labels
_CAPTION_SAMPLES = 10  # fewer samples do not tell captions from rare labels


def is_label_file(suffix: str) -> bool:
    """Return whether a suffix (without its first dot, lower case) is that of labels: `json`, `cls`, ..., or `labels.json`."""
    field, _, kind = suffix.rpartition(".")
    return kind in _KINDS and (not field or field in LABEL_FIELDS)


def parse_labels(files: dict[str, bytes], field: str | None, names: Sequence[str] | None, where: str) -> LabelValue:
    """Return the labels of a sample as its file writes them.

    Args:
        files: the content of its label files by suffix.
        field: the field of a `.json` object; None: one of `LABEL_FIELDS`.
        names: the label names, to tell digit strings of flags from numbers.
        where: the sample, for messages.

    Raises:
        UserError: if no file holds labels, or one is damaged.
    """
    for suffix in sorted(files, key=lambda suffix: ("." not in suffix, _KINDS.index(suffix.rpartition(".")[2]))):
        content, kind = files[suffix], suffix.rpartition(".")[2]
        if kind == "json":
            if suffix == "json" and "cls" in files and field is None and not _has_labels(content):
                continue  # the .json describes the image, the .cls holds its labels
            return _parse_json(content, field, where, suffix)
        if kind == "cls":
            return _parse_cls(content, names)
        if kind == "npy":
            return _parse_npy(content, where)
        return _decode(content, where)
    raise UserError(
        f"{where} holds no labels; put a .json with a list of labels, a .cls, .txt or .npy, beside the image. A sample's key"
        " ends at the first dot of the file's name"
    )


def _has_labels(content: bytes) -> bool:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return True  # the error about it comes later
    return not isinstance(value, dict) or any(name in value for name in LABEL_FIELDS)


def _parse_json(content: bytes, field: str | None, where: str, suffix: str) -> LabelValue:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its .{suffix} is not JSON ({error}); correct it") from None
    if isinstance(value, dict) and suffix == "json":
        chosen = field or next((name for name in LABEL_FIELDS if name in value), None)
        if chosen not in value:
            wanted = field or ", ".join(LABEL_FIELDS)
            raise UserError(
                f"{where}: its .json has no field {wanted}, only {', '.join(map(str, value)) or 'nothing'};"
                " name the field with data.label_column"
            )
        value = value[chosen]
    if isinstance(value, dict):
        wrong = [name for name, state in value.items() if state not in (0, 1)]
        if wrong:
            raise UserError(f"{where}: label {wrong[0]!r} is {value[wrong[0]]!r}; write 1 or 0")
        value = [name for name, state in value.items() if state]
    if isinstance(value, str):
        return str(_checked(value, where))
    return [_checked(label, where) for label in (value if isinstance(value, list) else [value])]


def _parse_cls(content: bytes, names: Sequence[str] | None) -> LabelValue:
    text = content.decode("utf-8", "replace").replace(",", "\n")
    words = text.split()
    if len(words) == 1 and names is not None and len(words[0]) == len(names) > 1 and set(words[0]) <= {"0", "1"}:
        return [int(digit) for digit in words[0]]  # flags without anything between
    if not all(word.isdecimal() for word in words):  # names may contain blanks
        words = [word for line in text.splitlines() if (word := line.strip())]
    return [int(word) if word.isdecimal() else word for word in words]


def _parse_npy(content: bytes, where: str) -> LabelValue:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, MemoryError) as error:
        raise UserError(
            f"{where}: its .npy cannot be read ({' '.join(str(error).split())[:200]}); write it again"
        ) from None
    if array.ndim > 1 or array.dtype.kind not in "biufU":
        raise UserError(
            f"{where}: its .npy holds {array.dtype} of shape {array.shape}; save a list of flags, numbers or names"
        )
    return [_checked(label, where) for label in np.atleast_1d(array).tolist()]


def _decode(content: bytes, where: str) -> LabelValue:
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UserError(f"{where}: its .txt is not UTF-8; save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [*lines] if len(lines) > 1 else text


def _checked(label: Any, where: str) -> Any:
    """Return a name without blanks around it, a whole number or a flag."""
    if isinstance(label, str) and is_utf8(label):
        if label.strip():
            return label.strip()
    elif isinstance(label, int):
        return label
    elif isinstance(label, float) and label.is_integer():
        return int(label)
    raise UserError(f"{where}: {label!r} is not a label; write a name, or its number in data.labels")


def name_labels(
    root: Location,
    samples: Sequence[str],
    values: Sequence[LabelValue],
    names: Sequence[str] | None,
    separator: str | None,
) -> tuple[list[list[str]], tuple[str, ...]]:
    """Return the label names of each sample of a data set, each name once, and notes on how they were read.

    Args:
        root: the data set, for messages.
        samples: [n] what messages call a sample.
        values: [n] labels as `parse_labels` returns them, of all splits.
        names: the label names in their order, to which numbers and flags refer.
        separator: between the labels in a text; None: the only usual one that occurs.

    Raises:
        UserError: if numbers have no names, a number is too large, or lists of 0 and 1 can be read in two ways.
    """
    lists = [[*value] for value in values if not isinstance(value, str)]
    rows = [row for row, value in enumerate(values) if not isinstance(value, str)]
    notes: list[str] = []
    numeric = [at for at, labels in enumerate(lists) if labels and not any(isinstance(label, str) for label in labels)]
    if numeric:
        notes += _name_flags(root, [samples[row] for row in rows], lists, numeric, names)
    named: list[list[str]] = [[] for _ in values]
    for row, labels in zip(rows, lists, strict=True):
        named[row] = list(dict.fromkeys(_name(label, names, samples[row]) for label in labels))
    texts = [row for row, value in enumerate(values) if isinstance(value, str)]
    if texts:
        column = pa.chunked_array([pa.array([values[row] for row in texts], pa.string())])
        parts, how = split_lists(root, "labels", column, separator)
        for row, labels in zip(texts, parts.to_pylist(), strict=True):
            named[row] = list(dict.fromkeys(label.strip() for label in labels if label.strip()))
        _refuse_captions(root, [named[row] for row in texts])
        notes.append(f"{len(texts)} samples hold a text: {how}")
    return named, tuple(notes)


def _name_flags(
    root: Location, samples: Sequence[str], lists: list[list[Any]], numeric: Sequence[int], names: Sequence[str] | None
) -> list[str]:
    """Replace flags by label numbers in `lists`, if the lists of numbers are flags; return notes."""
    booleans = [at for at in numeric if any(isinstance(label, bool) for label in lists[at])]
    mixed = next((at for at in numeric if at not in set(booleans)), None) if booleans else None
    uneven = next((at for at in booleans if not all(isinstance(label, bool) for label in lists[at])), mixed)
    if uneven is not None:
        raise UserError(
            f"{samples[uneven]}: {lists[uneven]!r} has numbers, but others have true and false; write one form"
        )
    only_numbers = len(numeric) == sum(bool(labels) for labels in lists)
    if not only_numbers:  # names elsewhere: a list of numbers holds label numbers, unless it repeats some
        repeating = next((at for at in numeric if len(set(lists[at])) < len(lists[at])), None)
        if booleans or repeating is not None:
            at = booleans[0] if repeating is None else repeating
            raise UserError(
                f"{samples[at]}: {lists[at]!r} may be flags by position or label numbers, and other samples hold names;"
                " write names in all samples"
            )
        return []
    # Empty lists count: beside flags they are a fault, beside label numbers they are images without a label.
    kind = pa.bool_() if booleans else pa.int64()
    try:
        column = pa.array(lists, pa.list_(kind))
    except (OverflowError, pa.ArrowException):
        return []  # a number beyond 64 bits is refused as a label number
    numbers, note = to_label_numbers(f"{root}: labels", column, None if names is None else len(names))
    if note is None:
        return []
    lists[:] = numbers.to_pylist()
    return [note]


def _name(label: Any, names: Sequence[str] | None, where: str) -> str:
    if isinstance(label, str):
        return label
    if names is None:
        raise UserError(
            f"{where}: label {label} is a number; name the labels in a text file (data.labels), one per line"
        )
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label {label} is not one of the {len(names)} of data.labels (0 to {len(names) - 1})")
    return str(names[label])


def _refuse_captions(root: Location, labels: Sequence[Sequence[str]]) -> None:
    flat = pa.array([label for each in labels for label in each], pa.string())
    counts = flat.value_counts().field("counts")
    once = pc.sum(pc.equal(counts, 1)).as_py() or 0
    if len(labels) >= _CAPTION_SAMPLES and 2 * once > len(counts):
        raise UserError(
            f"{root}: {once} of {len(counts)} texts in the samples' labels occur once, so they look like captions, not labels;"
            " put a .json with a list of labels beside each image"
        )
