"""Splits a data set into two parts of given sizes so that every label keeps its share in both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..types import PRESENT

Rows = npt.NDArray[np.int64]


def stratified_split(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split rows by iterative stratification: the rarest label first, its rows shared by what each part still lacks.

    The second part has exactly round(fraction * n) rows. Labels keep their share as far as that size allows. A label with too few rows
    for a whole row in the second part stays in the first.

    Args:
        targets: [n, C] int8 in {1, 0, -1}; only 1 counts as positive.
        fraction: share of the second part, in (0, 1).
        seed: the same targets, fraction and seed give the same split.

    Returns:
        The rows of the first and of the second part; int64, ascending.

    Raises:
        UserError: if fraction is not in (0, 1).

    Source: Sechidis, Tsoumakas, Vlahavas, "On the Stratification of Multi-Label Data" (ECML PKDD 2011). The paper hands out row by row to
    the part that lacks more. For two parts, that equals one rounded number per label, computed here at once.
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
    # rows without a label fill the part up to its size, then any other rows of the first part
    fillers = np.concatenate([rng.permutation(np.flatnonzero(free)), rng.permutation(np.flatnonzero(~free & ~in_part))])
    in_part[fillers[: size - np.count_nonzero(in_part)]] = True
    return np.flatnonzero(~in_part), np.flatnonzero(in_part)
