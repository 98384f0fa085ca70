"""Decides how a column of texts separates its labels, from how often the parts recur."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

USUAL_SEPARATORS = (";", "|", ",")
_UNUSUAL_SEPARATORS = ("/", "+", " ")  # also within the name of a label; a blank may stand around the others
_MIN_RECURRING = 0.8  # fraction of the parts


def split_by_recurrence(cells: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the separator among "/", "+" and blank, or None if the cells are whole labels; and a note on what was decided.

    A separator is one if at least 0.8 of the parts of cells with several parts occur in other cells too, the cells have different numbers
    of parts, and the parts are fewer than the cells. So "dining table" stays whole: "dining" occurs in no other cell.

    Args:
        cells: the distinct texts of the column.
    """
    wholes = {" ".join(cell.split()) for cell in cells} - {""}
    for separator in _UNUSUAL_SEPARATORS:
        several = [cell for cell in wholes if separator in cell]
        if not several:
            continue
        parts = {cell: {part.strip() for part in cell.split(separator)} - {""} for cell in wholes}
        occurrences = Counter(part for found in parts.values() for part in found)
        in_several = {part for cell in several for part in parts[cell]}
        recurring = sum(occurrences[part] > 1 for part in in_several)
        if len(occurrences) >= len(wholes) or recurring < _MIN_RECURRING * len(in_several):
            continue
        counts = f"{len(occurrences)} labels if {separator!r} separates them, {len(wholes)} if not"
        lengths = {len(found) for found in parts.values()}
        if len(lengths) > 2 or (len(lengths) == 2 and any(cell in in_several for cell in wholes)):
            return separator, f"{counts}; it does, for {recurring} of {len(in_several)} parts recur in other cells"
        return None, f"{counts}; kept whole. If it separates labels, give --data.label-separator {separator!r}"
    return None, None
