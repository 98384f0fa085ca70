"""Splits a data set into two parts of given sizes so that every label keeps its share in both, and each group is in one part."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import UserError
from ..types import PRESENT, SampleTable

Rows = npt.NDArray[np.int64]


def split_off(samples: SampleTable, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split the rows of a table by `grouped_split` if its images have groups, else by `stratified_split`."""
    if samples.groups is None:
        return stratified_split(samples.targets, fraction, seed)
    return grouped_split(samples.targets, samples.groups, fraction, seed)


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
    _check_fraction(fraction)
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


def grouped_split(
    targets: npt.NDArray[np.int8], groups: pa.ChunkedArray, fraction: float, seed: int
) -> tuple[Rows, Rows]:
    """Split rows so that each group is in one part, by greedy iterative stratification over groups.

    The rarest label comes first, and of its groups those with most of its rows. A group joins the second part if that brings both the
    label's number of rows and the part's size nearer to their shares. Then other groups join as long as the size comes nearer to
    fraction * n. The second part has at least one group if there are two.

    Args:
        targets: [n, C] int8 in {1, 0, -1}; only 1 counts as positive.
        groups: [n] strings.
        fraction: share of the second part, in (0, 1).
        seed: the same targets, groups, fraction and seed give the same split.

    Returns:
        The rows of the first and of the second part; int64, ascending.

    Raises:
        UserError: if fraction is not in (0, 1).
    """
    _check_fraction(fraction)
    codes = groups.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    num_groups = int(codes.max(initial=-1)) + 1
    sizes = np.bincount(codes, minlength=num_groups)
    counts = np.zeros((num_groups, targets.shape[1]), np.int32)  # rows of each group with each label
    for label in range(targets.shape[1]):
        counts[:, label] = np.bincount(codes[targets[:, label] == PRESENT], minlength=num_groups)
    order = np.random.default_rng(seed).permutation(num_groups)
    in_part = _choose_groups(counts, sizes, order, fraction)
    return np.flatnonzero(~in_part[codes]), np.flatnonzero(in_part[codes])


def _choose_groups(
    counts: npt.NDArray[np.int32], sizes: npt.NDArray[np.int64], order: npt.NDArray[np.int64], fraction: float
) -> npt.NDArray[np.bool_]:
    """Return [G] bool, the groups of the second part; counts: [G, C], sizes: [G], order: a permutation of the G groups."""
    total = counts.sum(0, dtype=np.int64)
    left, lacking = total.copy(), fraction * total
    room = float(round(fraction * sizes.sum()))
    in_part, free = np.zeros(len(sizes), bool), np.ones(len(sizes), bool)
    while left.any():
        label = int(np.where(left > 0, left, total.sum() + 1).argmin())
        members = order[free[order] & (counts[order, label] > 0)]
        for group in members[np.argsort(-counts[members, label], kind="stable")].tolist():
            # what is less than twice the gap leaves a smaller gap
            if counts[group, label] < 2 * lacking[label] and sizes[group] < 2 * room:
                in_part[group] = True
                lacking -= counts[group]
                room -= int(sizes[group])
        free[members] = False
        left -= counts[members].sum(0, dtype=np.int64)
    # groups without a label come first: they disturb no share
    for group in [*order[free[order]].tolist(), *order[~free[order] & ~in_part[order]].tolist()]:
        if sizes[group] < 2 * room:
            in_part[group] = True
            room -= int(sizes[group])
    if len(sizes) > 1 and not in_part.any():
        in_part[order[sizes[order].argmin()]] = True
    return in_part


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"the fraction to split off is {fraction}, but must be above 0 and below 1; 0.1 is usual")
