"""Splits a data set in two so that every label keeps its share in both parts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from msrn_ray.errors import UserError
from msrn_ray.types import PRESENT

Rows = npt.NDArray[np.int64]


def stratified_split(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Iterative stratification for two parts: the rarest label first, its rows shared by what each part still lacks.

    A label with two or more positive rows gets one in each part, unless every row that could be moved for it is also
    the last one of another such label. Rows without a positive even out the sizes; with few rows a part may be empty.

    Args:
        targets: [n, C] int8 in {1, 0, -1}; only 1 counts as positive.
        fraction: share of the second part, in (0, 1).
        seed: same targets, fraction and seed give the same split.

    Returns:
        The rows of the rest, about (1 - fraction) * n, and those of the part, about fraction * n; int64, ascending.

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
    in_part = np.zeros(len(targets), bool)
    free = np.ones(len(targets), bool)
    while (left := positive[free].sum(0)).any():
        label = int(np.where(left > 0, left, len(targets) + 1).argmin())
        rows = rng.permutation(np.flatnonzero(positive[:, label] & free))
        lacking = round(fraction * total[label]) - np.count_nonzero(positive[:, label] & in_part)
        in_part[rows[: max(0, lacking)]] = True
        free[rows] = False
    _mend(positive, in_part)
    rows = rng.permutation(np.flatnonzero(free))
    in_part[rows[: max(0, round(fraction * len(targets)) - np.count_nonzero(in_part))]] = True
    return np.flatnonzero(~in_part), np.flatnonzero(in_part)


def _mend(positive: npt.NDArray[np.bool_], in_part: npt.NDArray[np.bool_]) -> None:
    """Moves single rows, in place, so that labels with two or more positives have one on each side."""
    common = positive.sum(0) > 1
    moved = True
    while moved:
        moved = False
        for label in np.flatnonzero(common):
            rows = np.flatnonzero(positive[:, label])
            if in_part[rows].any() and not in_part[rows].all():
                continue
            side = in_part == in_part[rows[0]]
            last_of_its_label = common & (positive[side].sum(0) == 1)
            movable = rows[~(positive[rows] & last_of_its_label).any(1)]
            if len(movable):
                in_part[movable[0]] = ~in_part[movable[0]]
                moved = True
