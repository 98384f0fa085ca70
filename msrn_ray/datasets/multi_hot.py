"""Decides whether lists of numbers are label numbers ([2, 5]) or flags by position, "multi-hot" ([0, 0, 1, 0, 0, 1])."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError

_AS_NAMES = "write the labels as names"


def to_label_numbers(where: str, lists: pa.ListArray, num_names: int | None) -> tuple[pa.ListArray, str | None]:
    """Return lists of label numbers, whichever of the two forms the lists have.

    All lists of a data set must be passed together, since one list alone does not tell: [1, 0] may be two label numbers.
    Booleans are flags. Whole numbers are flags if all are 0 or 1, all lists have the same length of at least 2, and a list repeats a
    number, which a list of label numbers does not.

    Args:
        where: the file or data set and the field, for messages.
        lists: [n] list<integer> or list<bool>; a null list is empty.
        num_names: the number of label names; None: no names are known.

    Returns:
        [n] list<int64>, and a note that counts the lists if they are flags, else None.

    Raises:
        UserError: if both readings are possible, if flags have no names, or if the number of flags is not the number of names.
    """
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = lists.flatten()
    is_bool = pa.types.is_boolean(flat.type)
    if is_bool and flat.null_count:
        raise UserError(f"{where}: a flag is empty; write true or false")
    values = flat.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    if not is_bool and not _are_flags(where, values, lengths, num_names):
        return lists.cast(pa.list_(pa.int64())), None
    length = int(lengths.max(initial=0))
    other = np.flatnonzero(lengths != length)
    if len(other):
        raise UserError(
            f"{where}: list {other[0] + 1} has {lengths[other[0]]} flags, others have {length};"
            f" write one flag per label in each list, or {_AS_NAMES}"
        )
    if num_names is None:
        raise UserError(
            f"{where}: lists of {length} flags, 0 or 1, by position; name the {length} labels in this order in a text file"
            " (data.labels), one per line"
        )
    if length != num_names:
        raise UserError(
            f"{where}: lists of {length} flags, 0 or 1, by position, but there are {num_names} label names;"
            f" name these {length} labels in data.labels"
        )
    rows, columns = np.nonzero(values.reshape(-1, length))
    ends = np.cumsum(np.bincount(rows, minlength=len(lengths)))
    numbers = pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(columns, pa.int64()))
    return (
        numbers,
        f"{len(lengths)} lists of {length} flags are read by position (1: the label of that position is present)",
    )


def _are_flags(
    where: str, values: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], num_names: int | None
) -> bool:
    """Return whether lists of numbers are flags; raises UserError if both readings are possible."""
    longest = int(lengths.max(initial=0))
    if longest < 2:
        return False
    one_length = bool((lengths == longest).all())
    if not np.isin(values, (0, 1)).all():
        if one_length and longest > 2 and longest == num_names and np.isin(values, (-1, 0, 1)).all():
            raise UserError(
                f"{where}: lists of {longest} numbers -1, 0 and 1 look like flags by position with unknown ones (-1), which"
                f" lists cannot hold; {_AS_NAMES}, or use a manifest with a column per label"
            )
        return False
    # A list repeats a number if it has more than one 0 or more than one 1.
    ones = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, len(lengths)).astype(np.int64)
    repeats = bool(((ones > 1) | (lengths - ones > 1)).any())
    if one_length and repeats and num_names in (None, longest):
        return True
    if not one_length and (not repeats or (num_names is not None and longest > num_names)):
        return False
    shown = "[0, 1]" if longest == 2 else f"{longest} numbers"
    reason = f"all have {longest} numbers" if one_length else f"they have {lengths.min()} to {longest} numbers"
    names = "no label names are known" if num_names is None else f"there are {num_names} label names"
    raise UserError(
        f"{where}: lists of only 0 and 1 may be flags by position or label numbers ({shown}: the labels 0 and 1); {reason} and"
        f" {names}. {_AS_NAMES.capitalize()}, or one flag per label in every list with as many names in data.labels"
    )
