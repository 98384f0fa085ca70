"""Columns of a manifest that name the split of each image, as people call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from ..io.storage import Location
from .split_names import SPLIT_WORDS, SPLITS, SplitName
from .text_files import first_few

_CERTAIN = ("split", "split_name")
_IS_VALID, _FOLD = "is_valid", "fold"  # fastai's flag; the number of a cross-validation fold
_LIKELY = ("subset", "set", "partition", "phase", "usage", "ml_use", "dataset", _IS_VALID, _FOLD)
_NUMBERS: dict[str, SplitName] = {"0": "train", "1": "val", "2": "test"}  # as CelebA's partition
_FLAGS: dict[str, SplitName] = {"0": "train", "false": "train", "1": "val", "true": "val"}


class SplitColumn(NamedTuple):
    """The columns of a table that are about splits, and so are no labels.

    Attributes:
        name: the one that is read; None if there is none.
        others: those that are not.
    """

    name: str | None
    others: tuple[str, ...]


def find_split_column(names: Sequence[str], taken: Sequence[str | None]) -> SplitColumn:
    """Return the column that probably names the splits, in any case; `taken` are columns with another role."""
    order = (*_CERTAIN, *_LIKELY)
    found = [name for name in names if name.strip().lower() in order and name not in taken]
    found.sort(key=lambda name: order.index(name.strip().lower()))
    return SplitColumn(found[0] if found else None, tuple(found[1:]))


def decode_splits(
    manifest: Location, name: str, column: pa.ChunkedArray
) -> tuple[npt.NDArray[np.int8] | None, str | None]:
    """Return [n] int8, the position in `SPLITS` of each row's split, or None if the column holds no splits; and a note on how it was read.

    Raises:
        UserError: if a column called split holds another word.
    """
    words = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    words = pc.replace_substring_regex(words, r"\.0$", "")
    distinct = {*pc.unique(words).to_pylist()}
    usual = name.strip().lower()
    note = None
    meaning = SPLIT_WORDS
    if usual == _IS_VALID and distinct <= {*_FLAGS}:
        meaning, note = _FLAGS, f"column {name!r} is the split: 0 or false is train, 1 or true is val"
    elif usual != _FOLD and "0" in distinct and distinct <= {*_NUMBERS}:
        meaning, note = _NUMBERS, f"column {name!r} is the split: 0 is train, 1 is val, 2 is test, as in CelebA"
    elif usual not in _CERTAIN and not distinct <= {*meaning}:
        return None, f"column {name!r} is not used as split, for it holds {first_few(sorted(map(repr, distinct)))}"
    elif usual not in _CERTAIN:
        note = f"column {name!r} is the split"
    found = pc.index_in(words, value_set=pa.array([*meaning]))
    if (row := pc.index(found.is_null(), True).as_py()) >= 0:
        raise UserError(
            f"{manifest}, row {row + 1}: {column[row].as_py()!r} in column {name!r} is none of {', '.join(SPLIT_WORDS)}; correct it"
        )
    positions = np.array([SPLITS.index(split) for split in meaning.values()], np.int8)
    return np.asarray(positions[found.to_numpy()], np.int8), note
