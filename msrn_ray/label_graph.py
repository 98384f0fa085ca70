"""Label co-occurrence: counts of a train split, conditional probabilities, and which label attends to which.

M[r, c] is the number of images with labels r and c, n[r] the number with label r, P(c | r) = M[r, c] / n[r].
Source: MSRN (arXiv 2106.11596); the counts follow ML-GCN (Chen et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .errors import UserError
from .types import PRESENT
from .word_vectors import read_arrays


@dataclass(frozen=True)
class LabelCounts:
    """How often each label, and each pair of labels, occurs.

    Attributes:
        names: the C label names.
        cooccurrence: [C, C] int64, M: images that have both labels; symmetric, zeros on the diagonal.
        count: [C] int64, n: images that have the label.
    """

    names: tuple[str, ...]
    cooccurrence: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]


def count_labels(targets: npt.NDArray[np.int8], names: Sequence[str]) -> LabelCounts:
    """Counts labels and pairs over the images of a train split.

    Args:
        targets: [n, C] int8 in {1, 0, -1}; -1 (unknown) counts as not present, for the pair as for the label.
        names: [C] label names.
    """
    assert targets.shape == (len(targets), len(names))
    # As floats: they go through BLAS, where integers take seconds; exact up to 2^53 images.
    present = (targets == PRESENT).astype(np.float64)
    pairs = (present.T @ present).astype(np.int64)
    count = pairs.diagonal().copy()
    np.fill_diagonal(pairs, 0)
    return LabelCounts(tuple(names), pairs, count)


def conditional_probability(counts: LabelCounts) -> npt.NDArray[np.float64]:
    """P(c | r) = M[r, c] / n[r], [C, C] float64 in [0, 1]; zeros on the diagonal and in rows of labels never seen."""
    given = counts.count[:, None]
    return np.divide(counts.cooccurrence, given, out=np.zeros(counts.cooccurrence.shape), where=given > 0)


def attend_mask(counts: LabelCounts, tau: float) -> torch.Tensor:
    """Label i attends to label j iff P(i | j) >= tau, or i = j: a label looks at those that usually bring it along.

    Args:
        counts: of the train split.
        tau: threshold in (0, 1].

    Returns:
        [C, C] bool, row i, column j. Note P(i | j) = M[j, i] / n[j]: the transpose of `conditional_probability`.

    Raises:
        UserError: if tau is not in (0, 1].
    """
    if not 0 < tau <= 1:
        raise UserError(f"tau is {tau}, but must be above 0 and at most 1; 0.4 is usual")
    given_column = conditional_probability(counts).T  # [i, j] = P(i | j)
    return torch.from_numpy((given_column >= tau) | np.eye(len(counts.names), dtype=bool))


def load_counts(path: Path, names: Sequence[str] | None = None) -> LabelCounts:
    """Reads counts from an .npz file with `names` [C], `adj` [C, C] (M; its diagonal is not used) and `nums` [C] (n).

    Args:
        path: the file.
        names: [C] label names in the order wanted; None for the file's order.

    Raises:
        UserError: if a field is missing, does not fit or cannot be counts, or the file's names are not those wanted.
    """
    labels, adj, nums = read_arrays(path, ("names", "adj", "nums"))
    num_classes = len(labels) if labels.ndim == 1 else 0
    if num_classes == 0 or labels.dtype.kind != "U" or len(set(labels.tolist())) < num_classes:
        raise UserError(f'{path}: "names" must be a list of different texts; correct it')
    for field, array, shape in (("adj", adj, (num_classes, num_classes)), ("nums", nums, (num_classes,))):
        if array.shape != shape:
            raise UserError(
                f'{path}: "{field}" is {array.shape}, but {shape} is due for {num_classes} names; correct it'
            )
        if array.dtype.kind not in "iuf" or not (np.isfinite(array) & (array >= 0) & (array == np.floor(array))).all():
            raise UserError(f'{path}: "{field}" must hold whole numbers of at least 0; give counts, not probabilities')
    pairs, count = adj.astype(np.int64), nums.astype(np.int64)
    np.fill_diagonal(pairs, 0)
    for row, column in np.argwhere(pairs != pairs.T)[:1]:
        raise UserError(
            f'{path}: "adj" is not symmetric ({labels[row]}, {labels[column]}: {pairs[row, column]}, the other way '
            f"{pairs[column, row]}); a pair has one count"
        )
    for row, column in np.argwhere(pairs > count[:, None])[:1]:
        raise UserError(
            f'{path}: "adj" has {pairs[row, column]} images with {labels[row]} and {labels[column]}, but "nums" only '
            f"{count[row]} with {labels[row]}; take both counts from the same images"
        )
    order = list(range(num_classes))
    if names is not None:
        place = {label: position for position, label in enumerate(labels.tolist())}
        lacking, surplus = sorted(set(names) - set(place)), sorted(set(place) - set(names))
        if lacking or surplus:
            raise UserError(
                f'{path}: "names" are not the labels of the data set (lacking: {", ".join(lacking) or "none"}; '
                f"not in the data set: {', '.join(surplus) or 'none'}); give the counts of this data set"
            )
        order = [place[name] for name in names]
    return LabelCounts(tuple(str(labels[position]) for position in order), pairs[np.ix_(order, order)], count[order])
