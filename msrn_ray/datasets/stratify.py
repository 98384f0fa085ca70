"""Splits a data set in two of given sizes so that every label keeps its share in both parts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..types import PRESENT

Rows = npt.NDArray[np.int64]
SPLITS = ("train", "val", "test")


# What people call them, in small letters.
SPLIT_WORDS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}


def stratified_split(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Iterative stratification for two parts: the rarest label first, its rows shared by what each part still lacks.

    The part has exactly round(fraction * n) rows. Labels keep their share as far as that allows; a label with too few rows for a whole
    one in the part stays in the rest.

    Args:
        targets: [n, C] int8 in {1, 0, -1}; only 1 counts as positive.
        fraction: share of the second part, in (0, 1).
        seed: same targets, fraction and seed give the same split.

    Returns:
        The rows of the rest and those of the part; int64, ascending.

    Raises:
        UserError: if fraction is not in (0, 1).

    Source: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data" (ECML PKDD 2011). Handing out
    rows one by one to the part that lacks more comes, for two parts, to one rounded number per label, done here at
    once.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction to split off is {fraction}, but must be above 0 and below 1; 0.1 is usual")
    rng = np.random.default_rng(seed)
    positive = targets == PRESENT
    total = positive.sum(0)
    left = total.copy()
    size = round(fraction * len(targets))
    in_part = np.zeros(len(targets), bool)
    free = np.ones(len(targets), bool)
    while left.any():
        label = int(np.where(left > 0, left, len(targets) + 1).argmin())
        rows = rng.permutation(np.flatnonzero(positive[:, label] & free))
        lacking = round(fraction * total[label]) - np.count_nonzero(positive[:, label] & in_part)
        in_part[rows[: max(0, min(lacking, size - np.count_nonzero(in_part)))]] = True
        free[rows] = False
        left -= positive[rows].sum(0)
    # what is missing for the size comes from rows without a label, then from any others of the rest
    others = np.concatenate([rng.permutation(np.flatnonzero(free)), rng.permutation(np.flatnonzero(~free & ~in_part))])
    in_part[others[: size - np.count_nonzero(in_part)]] = True
    return np.flatnonzero(~in_part), np.flatnonzero(in_part)
