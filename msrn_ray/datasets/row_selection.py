"""Drops the rows of a sample table whose image is missing or, unless they are kept, has no label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..types import PRESENT, SampleTable


def select_rows(
    samples: SampleTable, name: str, keep_unlabelled: bool, found: npt.NDArray[np.bool_] | None = None
) -> SampleTable:
    """Return the remaining rows in their order, with notes that count the dropped rows.

    Args:
        samples: n rows.
        name: what the notes call them.
        keep_unlabelled: whether rows without a present label stay.
        found: [n] bool, False for missing images; None if all images exist.
    """
    labelled = (samples.targets == PRESENT).any(1)
    found = np.ones(len(samples), bool) if found is None else found
    num_found, num_labelled = np.count_nonzero(found), np.count_nonzero(labelled & found)
    if keep_unlabelled:
        note = f"{name}: {num_found} images, {num_found - num_labelled} without a label kept"
    else:
        note = f"{name}: {num_labelled} of {num_found} images, {num_found - num_labelled} without a label dropped"
    rows = np.flatnonzero(found if keep_unlabelled else found & labelled)
    return replace(samples.take(rows), notes=(*missing_notes(name, found), note))


def missing_notes(name: str, found: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the note on missing images that are left out; () if all exist. found: [n] bool."""
    num_missing = len(found) - np.count_nonzero(found)
    return (f"{name}: {num_missing} of {len(found)} listed images are missing and left out",) if num_missing else ()
