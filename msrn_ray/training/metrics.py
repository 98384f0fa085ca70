"""Computes mAP, CF1, OF1 and related metrics as the multi-label papers report them, and counts each row once.

Shapes: n images, C classes. All values are fractions in [0, 1], not per cent. An average precision needs the whole
ranking. So the metrics keep scores instead of sums, and the caller gathers the rows of all ranks and computes once.

Unknown labels (-1) count nowhere: they are left out of their class's ranking, and are no true positives, false
positives or false negatives. ML-GCN leaves difficult VOC objects out of AP too, but counts them as absent in CF1 and OF1.

Sources:
    [ML-GCN] Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks", CVPR 2019; `util.py`.
    [ASL] Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021; `helper_functions.py` and
        `validate.py`.
    [VOC] Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010, section 4.2, and the
        development kit of VOC 2010, section 3.4.1.
    [WARP] Gong et al., "Deep Convolutional Ranking for Multilabel Image Annotation", 2013 (top k, no threshold).
    [SRN] Zhu et al., "Learning Spatial Regularization with Image-level Supervisions for Multi-label Image
        Classification", CVPR 2017 (top 3 and threshold, on COCO).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import UserError
from ..types import ABSENT, PRESENT, UNKNOWN

THRESHOLD = 0.5
TOP_K = 3

# Scores keep their float type: rounding them would create ties that the model did not produce.
Scores = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]


class MultiLabelMetrics:
    """Collects scores and targets in any number of pieces, and computes all metrics over all rows at once.

    Attributes:
        num_classes: C.
        num_rows: rows added so far.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._scores: list[Scores] = []
        self._targets: list[Labels] = []
        self.num_rows = 0

    def update(self, scores: Tensor | npt.ArrayLike, target: Tensor | npt.ArrayLike) -> None:
        """Add n rows (n may be 0). A refused piece does not change the rows added before.

        Args:
            scores: [n, C] float, probabilities in [0, 1]; copied to the CPU, so the caller may reuse the memory.
            target: [n, C] int in {1, 0, -1}; copied as well.

        Raises:
            UserError: if the shapes differ or are not [n, C], with both shapes; if a score is nan or not in [0, 1] (the
                0.5 threshold means nothing for logits) or a target is not 1, 0 or -1, with value, class and row. Rows
                are counted from 0 over all updates.
        """
        scores, target = _copy_to_numpy(scores), _copy_to_numpy(target)
        if scores.shape != target.shape or scores.ndim != 2 or scores.shape[1] != self.num_classes:
            raise UserError(
                f"scores {list(scores.shape)} and target {list(target.shape)} must both be [n, {self.num_classes}]"
            )
        # nan fails both tests as they are written. They come before the cast to int8, which would turn 257 into 1.
        self._require((scores >= 0) & (scores <= 1), scores, "score", "a probability in [0, 1]")
        labels = (target == PRESENT) | (target == ABSENT) | (target == UNKNOWN)
        self._require(labels, target, "target", "1 (present), 0 (absent) or -1 (unknown)")
        self._scores.append(scores)
        self._targets.append(target.astype(np.int8))
        self.num_rows += len(target)

    def _require(self, good: Mask, values: npt.NDArray[Any], name: str, requirement: str) -> None:
        """Raise UserError for the first value, row by row, that is not good."""
        if not good.all():
            row, column = np.argwhere(~good)[0].tolist()
            row_of_all = self.num_rows + row
            raise UserError(f"{name} {values[row, column]} of class {column} in row {row_of_all} is not {requirement}")

    def compute(self) -> dict[str, float | list[float]]:
        """Return all metrics over all rows added so far.

        Returns:
            mAP: mean of AP over the classes with a present and an absent label. A class without a present label gives nan in
                [ML-GCN], 0 in [ASL]. A class without an absent label would give 1 whatever the scores, in both.
            mAP_voc11: the same mean of the 11-point AP of VOC 2007, see `_average_precision`.
            mAP_envelope: the same mean of the AP of VOC 2010 and later, see `_average_precision`.
            AP: C floats, area without interpolation; nan for a class without a present or without an absent label.
            CP, CR, CF1, OP, OR, OF1: see `_precision_recall_f1`; a label is predicted if its score >= 0.5
                [ML-GCN; ASL: > 0.8].
            These six + `_top3`: the 3 highest-scoring labels of an image are predicted, even with low scores [WARP, k = 3].
            These six + `_top3_at_0.5`: those of the 3 labels with a score >= 0.5 are predicted [SRN, ML-GCN].
            If no class has a present label, every mean over classes and every recall and F1 is nan. The mAPs are nan as
                well if no class has both a present and an absent label.

        Raises:
            UserError: if there are no rows.
        """
        if self.num_rows == 0:
            raise UserError("no rows to compute metrics from: the split is empty")
        scores, target = np.concatenate(self._scores), np.concatenate(self._targets)
        known, present = target != UNKNOWN, target == PRESENT
        columns = zip(scores.T, known.T, present.T, strict=True)
        per_class = np.array([_average_precision(score[seen], label[seen]) for score, seen, label in columns])
        mean_ap, mean_voc11, mean_envelope = (_mean(column) for column in per_class.T)
        confident, top = known & (scores >= THRESHOLD), _top_k(scores, known, TOP_K)
        return {
            "mAP": mean_ap,
            "mAP_voc11": mean_voc11,
            "mAP_envelope": mean_envelope,
            "AP": per_class[:, 0].tolist(),
            **_precision_recall_f1(confident, present),
            **_precision_recall_f1(top, present, f"_top{TOP_K}"),
            **_precision_recall_f1(top & confident, present, f"_top{TOP_K}_at_{THRESHOLD}"),
        }


def _copy_to_numpy(values: Tensor | npt.ArrayLike) -> npt.NDArray[Any]:
    """Return a copy on the CPU, of the same type."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16; float32 holds each of its values.
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.array(values)


def _average_precision(scores: Scores, present: Mask) -> tuple[float, float, float]:
    """Return the average precision of a class, in three conventions.

    The precision at a present label is the share of present labels among all labels that score at least as high. So
    equal scores form one threshold: the result does not depend on the order of the rows, and the area equals that of
    scikit-learn's `average_precision_score`. ([ML-GCN, ASL, VOC] rank equal scores in the order of their sort.)
    Recall is counted in whole labels, so that rounding misses none of the 11 points (3 * 0.1 > 0.3).

    Args:
        scores: [m], of the rows whose label for this class is known.
        present: [m], whether the label is present.

    Returns:
        area: mean of the precision at the present labels: area under the curve, no interpolation [ML-GCN, ASL].
        voc11: mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or above [VOC 2007].
        envelope: as area, but each precision is the highest at that recall or above [VOC 2010 and later].
        All three are nan if no label is present, or if all are: then any ranking is right.
    """
    num_present = int(present.sum())
    if num_present in (0, len(present)):
        return np.nan, np.nan, np.nan
    ranked, hits = np.sort(scores), np.sort(scores[present])  # both ascending
    num_hits_above = num_present - np.searchsorted(hits, hits, side="left")
    num_above = len(ranked) - np.searchsorted(ranked, hits, side="left")
    precision = num_hits_above / num_above
    envelope = np.maximum.accumulate(precision)  # recall falls as scores rise
    # Recall i/10 is reached by the ceil(i/10 * num_present)-th hit from the top; recall 0 by the first.
    num_needed = np.maximum((np.arange(11) * num_present + 9) // 10, 1)
    return float(precision.mean()), float(envelope[num_present - num_needed].mean()), float(envelope.mean())


def _top_k(scores: Scores, known: Mask, k: int) -> Mask:
    """Return [n, C] bool: the k known labels of each image with the highest scores, or all known labels if fewer.

    An unknown label takes none of the k places: we cannot judge its prediction, and it would push out a label that we
    can judge. ([ML-GCN] lets difficult VOC objects take places.) Of equal scores the lower class comes first.
    """
    remaining = np.where(known, scores, -np.inf)
    top = np.zeros_like(known)
    rows = np.arange(len(scores))
    for _ in range(k):
        best = remaining.argmax(axis=1)  # of equal scores the first
        top[rows, best] = True
        remaining[rows, best] = -np.inf
    return top & known  # argmax selects class 0, which may be unknown, once no known label remains


def _precision_recall_f1(predicted: Mask, present: Mask, suffix: str = "") -> dict[str, float]:
    """Return per-class (C) and overall (O) precision, recall and F1 of yes-or-no predictions.

    CP, CR: means over the classes' precision and recall. Both leave out a class without a present label (its recall
        is 0/0). A class with a present label that is never predicted has precision 0, as in [ML-GCN, ASL].
        A class without an absent label counts, unlike in mAP: its recall still depends on the scores.
    CF1: harmonic mean of CP and CR [ML-GCN], not the mean of the classes' F1 that [ASL]'s script prints.
    OP, OR, OF1: precision, recall and their harmonic mean from the counts summed over all classes. Classes without a
        present label are included, so their false alarms count. ([ML-GCN] adds 1 false alarm per class never predicted.)
    OP is 0 if nothing is predicted. F1 is 0 if precision and recall are 0. OR and OF1 are nan if no label is present.

    Args:
        predicted: [n, C], False where the label is unknown.
        present: [n, C], False where the label is unknown.
        suffix: appended to each name.
    """
    # all [C]
    num_hits = (predicted & present).sum(axis=0, dtype=np.float64)
    num_predicted = predicted.sum(axis=0, dtype=np.float64)
    num_present = present.sum(axis=0, dtype=np.float64)
    has_present = num_present > 0
    class_precision = _mean((num_hits / np.maximum(num_predicted, 1))[has_present])
    class_recall = _mean(num_hits[has_present] / num_present[has_present])
    overall_precision = float(num_hits.sum() / max(num_predicted.sum(), 1))
    overall_recall = float(num_hits.sum() / num_present.sum()) if has_present.any() else np.nan
    return {
        f"CP{suffix}": class_precision,
        f"CR{suffix}": class_recall,
        f"CF1{suffix}": _harmonic_mean(class_precision, class_recall),
        f"OP{suffix}": overall_precision,
        f"OR{suffix}": overall_recall,
        f"OF1{suffix}": _harmonic_mean(overall_precision, overall_recall),
    }


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Return the mean of the values that are not nan; nan if every value is nan."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else np.nan


def _harmonic_mean(precision: float, recall: float) -> float:
    """Return F1; 0 if both are 0."""
    return 0.0 if precision == recall == 0 else 2 * precision * recall / (precision + recall)
