"""Label co-occurrence: counts of a train split, conditional probabilities, and which label attends to which.

M[r, c] is the number of images with labels r and c, n[r] the number with label r, P(c | r) = M[r, c] / n[r].
Source: MSRN (arXiv 2106.11596); the counts follow ML-GCN (Chen et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..errors import UserError
from ..io.files import read_arrays, write_output
from ..types import PRESENT

_BLOCK_ROWS = 65_536  # the floats of millions of rows at once would not fit into memory


@dataclass(frozen=True)
class Provenance:
    """Where counts come from.

    Attributes:
        source: what was read ("instances_train2014.json", ...).
        num_images: images that were counted.
        fingerprint: of their ids, labels and label names, as `protocol.fingerprint` computes it.
    """

    source: str
    num_images: int
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.num_images} images of {self.source} (fingerprint {self.fingerprint[:12]})"


@dataclass(frozen=True)
class LabelCounts:
    """How often each label, and each pair of labels, occurs.

    Attributes:
        names: the C label names.
        cooccurrence: [C, C] int64, M: images that have both labels; symmetric, zeros on the diagonal.
        count: [C] int64, n: images that have the label.
        provenance: where the counts come from; None if unknown.
    """

    names: tuple[str, ...]
    cooccurrence: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]
    provenance: Provenance | None = None


def count_labels(
    targets: npt.NDArray[np.int8], names: Sequence[str], provenance: Provenance | None = None
) -> LabelCounts:
    """Count labels and pairs over the images of a train split.

    Args:
        targets: [n, C] int8 in {1, 0, -1}; -1 (unknown) counts as not present, in labels and in pairs.
        names: [C] label names.
        provenance: where the targets come from.
    """
    assert targets.shape == (len(targets), len(names))
    pairs = np.zeros((len(names), len(names)), np.int64)
    for start in range(0, len(targets), _BLOCK_ROWS):
        # BLAS multiplies floats fast, integers would take seconds; sums are exact up to 2^24 rows per block.
        present = (targets[start : start + _BLOCK_ROWS] == PRESENT).astype(np.float32)
        pairs += (present.T @ present).astype(np.int64)
    count = pairs.diagonal().copy()
    np.fill_diagonal(pairs, 0)
    return LabelCounts(tuple(names), pairs, count, provenance)


def conditional_probability(counts: LabelCounts) -> npt.NDArray[np.float64]:
    """Return P(c | r) = M[r, c] / n[r], [C, C] float64 in [0, 1]; zeros on the diagonal and in rows of labels never seen.

    Raises:
        UserError: if a count is below 0, or a pair occurs more often than one of its labels; names the pair.
    """
    pairs, given = counts.cooccurrence, counts.count[:, None]
    if len(wrong := np.argwhere((pairs < 0) | (pairs > given))):
        row, column = wrong[0]
        first, second = counts.names[column], counts.names[row]
        raise UserError(
            f"label counts: P({first} | {second}) is {pairs[row, column]} / {counts.count[row]}, not in [0, 1];"
            " take the counts of labels and of pairs from the same images"
        )
    return np.divide(pairs, given, out=np.zeros(pairs.shape), where=given > 0)


def choose_tau(counts: LabelCounts, tau: float | Literal["auto"], degree: float) -> float:
    """Return the threshold of the graph: `tau`, or for "auto" the largest threshold with a mean degree of at least `degree`.

    The degree of a label is the number of other labels that it attends to. "auto" is the k-th largest P(i | j) of all pairs i != j,
    where k is the smallest whole number with k / C >= degree. Pairs of equal P become edges together. If fewer than k pairs occur
    together, it is the smallest P above 0, so that all of them are edges; if none does, 1.

    Args:
        counts: of the train split.
        tau: threshold in (0, 1], or "auto".
        degree: smallest mean degree that "auto" keeps, above 0.
    """
    if tau != "auto":
        return tau
    probability = conditional_probability(counts)
    falling = np.sort(probability[probability > 0])[::-1]
    if len(falling) == 0:
        return 1.0
    enough = np.arange(1, len(falling) + 1) / len(counts.names) >= degree
    return float(falling[enough.argmax() if enough.any() else -1])


def attend_mask(counts: LabelCounts, tau: float) -> torch.Tensor:
    """Return which label attends to which: i to j iff P(i | j) >= tau, or i = j.

    So a label attends to the labels that it usually accompanies.

    Args:
        counts: of the train split.
        tau: threshold in (0, 1].

    Returns:
        [C, C] bool, row i attends to column j. P(i | j) = M[j, i] / n[j] is the transpose of `conditional_probability`.

    Raises:
        UserError: if tau is not in (0, 1], or a probability is not in [0, 1].
    """
    if not 0 < tau <= 1:
        raise UserError(f"tau is {tau}, but must be above 0 and at most 1; 0.4 is usual")
    given_column = conditional_probability(counts).T  # [i, j] = P(i | j)
    return torch.from_numpy((given_column >= tau) | np.eye(len(counts.names), dtype=bool))


def how_to_add_edges(counts: LabelCounts) -> str:
    """Return what the user can do about a graph without edges, if anything."""
    if counts.cooccurrence.any():
        return "a lower model.tau, or auto, adds edges"
    return "no two labels occur together, so no model.tau adds any"


def save_counts(path: Path, counts: LabelCounts) -> None:
    """Write an .npz file for `load_counts`: `names`, `adj`, `nums`, and if known `source`, `images`, `fingerprint`.

    Raises:
        UserError: if the file cannot be written.
    """
    fields: dict[str, Any] = {"names": np.array(counts.names), "adj": counts.cooccurrence, "nums": counts.count}
    if counts.provenance is not None:
        origin = counts.provenance
        fields |= {"source": origin.source, "images": origin.num_images, "fingerprint": origin.fingerprint}
    with write_output(path) as partial, partial.open("wb") as file:  # numpy would append .npz to a path
        np.savez_compressed(file, **fields)


def load_counts(path: Path, names: Sequence[str] | None = None) -> LabelCounts:
    """Read counts from an .npz file with `names` [C], `adj` [C, C] (M; its diagonal is not used) and `nums` [C] (n).

    `source`, `images` and `fingerprint`, which `save_counts` adds, may be missing.

    Args:
        path: the file.
        names: [C] label names in the order to return; None: the file's order.

    Raises:
        UserError: if a field is missing, does not fit or cannot be counts, or the file has other names.
    """
    labels, adj, nums = read_arrays(path, ("names", "adj", "nums"))
    num_labels = len(labels) if labels.ndim == 1 else 0
    if num_labels == 0 or labels.dtype.kind != "U" or len(set(labels.tolist())) < num_labels:
        raise UserError(f'{path}: "names" must be a list of different texts; correct it')
    for field, array, shape in (("adj", adj, (num_labels, num_labels)), ("nums", nums, (num_labels,))):
        if array.shape != shape:
            raise UserError(
                f'{path}: "{field}" is {array.shape}, but must be {shape} for {num_labels} names; correct it'
            )
        if array.dtype.kind not in "iuf" or not (np.isfinite(array) & (array >= 0) & (array == np.floor(array))).all():
            raise UserError(f'{path}: "{field}" must hold whole numbers of at least 0; give counts, not probabilities')
    pairs, count = adj.astype(np.int64), nums.astype(np.int64)
    np.fill_diagonal(pairs, 0)
    if len(wrong := np.argwhere(pairs != pairs.T)):
        row, column = wrong[0]
        raise UserError(
            f'{path}: "adj" is not symmetric ({labels[row]}, {labels[column]}: {pairs[row, column]}, the other way '
            f"{pairs[column, row]}); a pair has one count"
        )
    if len(wrong := np.argwhere(pairs > count[:, None])):
        row, column = wrong[0]
        raise UserError(
            f'{path}: "adj" has {pairs[row, column]} images with {labels[row]} and {labels[column]}, but "nums" only '
            f"{count[row]} with {labels[row]}; take both counts from the same images,"
            f" or P({labels[column]} | {labels[row]}) is above 1"
        )
    place: dict[str, int] = {label: position for position, label in enumerate(labels.tolist())}
    chosen = tuple(place if names is None else names)
    lacking, surplus = sorted(set(chosen) - set(place)), sorted(set(place) - set(chosen))
    if lacking or surplus:
        raise UserError(
            f'{path}: "names" are not the labels of the data set (lacking: {", ".join(lacking) or "none"}; '
            f"not in the data set: {', '.join(surplus) or 'none'}); give the counts of this data set"
        )
    order = [place[name] for name in chosen]
    return LabelCounts(chosen, pairs[np.ix_(order, order)], count[order], _load_provenance(path))


def _load_provenance(path: Path) -> Provenance | None:
    with np.load(path, allow_pickle=False) as content:
        if "source" not in content:
            return None
    source, images, fingerprint = read_arrays(path, ("source", "images", "fingerprint"))
    if images.shape or images.dtype.kind not in "iu" or source.dtype.kind != "U" or fingerprint.dtype.kind != "U":
        raise UserError(
            f'{path}: "source", "images", "fingerprint" must be a text, a whole number and a text; correct it'
        )
    return Provenance(str(source), int(images), str(fingerprint))
