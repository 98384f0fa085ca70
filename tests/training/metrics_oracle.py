"""All metrics in plain Python: the definitions word for word, in loops and exact fractions, on lists of rows."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from msrn_ray.training.metrics import MultiLabelMetrics

Array = npt.NDArray[Any]
Result = dict[str, float | list[float]]
SIX = ("CP", "CR", "CF1", "OP", "OR", "OF1")
RULES = ("", "_top3", "_top3_at_0.5")
GRID = 64  # scores are multiples of 1 / GRID: exact in floating point, and equal often enough


def curve(scores: list[float], labels: list[int]) -> list[tuple[Fraction, Fraction]]:
    """Return (recall, precision) of a class at every threshold, the highest threshold first."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        points.append((Fraction(sum(chosen), sum(labels)), Fraction(sum(chosen), len(chosen))))
    return points


def brute_force_average_precision(scores: list[float], labels: list[int]) -> tuple[float, float, float]:
    """Return area, 11-point and envelope average precision of a class, labels in {1, 0}."""
    if not any(labels) or all(labels):
        return math.nan, math.nan, math.nan
    points = curve(scores, labels)
    area = envelope = last_recall = Fraction(0)
    for recall, precision in points:
        area += (recall - last_recall) * precision
        envelope += (recall - last_recall) * max(p for r, p in points if r >= recall)
        last_recall = recall
    eleven = sum(max(p for r, p in points if r >= Fraction(tenth, 10)) for tenth in range(11)) / Fraction(11)
    return float(area), float(eleven), float(envelope)


def is_predicted(row: list[float], target: list[int], c: int, rule: str) -> bool:
    """Return whether a rule of RULES predicts class c of an image."""
    better = [k for k in range(len(row)) if target[k] != -1 and (row[k] > row[c] or (row[k] == row[c] and k < c))]
    in_top = len(better) < 3
    return {"": row[c] >= 0.5, "_top3": in_top, "_top3_at_0.5": in_top and row[c] >= 0.5}[rule]


def f1(precision: float, recall: float) -> float:
    return 2 / (1 / precision + 1 / recall) if precision and recall else 0.0


def brute_force(scores: Array, target: Array) -> Result:
    """Return all metrics of a split with at least one present label."""
    rows: list[list[float]] = scores.tolist()
    targets: list[list[int]] = target.tolist()
    num_classes = len(rows[0])
    per_class = []
    for c in range(num_classes):
        seen = [(row[c], labels[c]) for row, labels in zip(rows, targets, strict=True) if labels[c] != -1]
        per_class.append(brute_force_average_precision([score for score, _ in seen], [label for _, label in seen]))
    result: Result = {"AP": [area for area, _, _ in per_class]}
    for key, column in zip(("mAP", "mAP_voc11", "mAP_envelope"), zip(*per_class, strict=True), strict=True):
        defined = [value for value in column if not math.isnan(value)]
        result[key] = sum(defined) / len(defined) if defined else math.nan
    for rule in RULES:
        tp, fp, fn = [0] * num_classes, [0] * num_classes, [0] * num_classes
        for row, labels in zip(rows, targets, strict=True):
            for c, label in enumerate(labels):
                if label != -1:
                    predicted = is_predicted(row, labels, c, rule)
                    tp[c] += predicted and label == 1
                    fp[c] += predicted and label == 0
                    fn[c] += not predicted and label == 1
        with_present = [c for c in range(num_classes) if tp[c] + fn[c]]
        cp = sum(tp[c] / (tp[c] + fp[c]) for c in with_present if tp[c]) / len(with_present)
        cr = sum(tp[c] / (tp[c] + fn[c]) for c in with_present) / len(with_present)
        op = sum(tp) / (sum(tp) + sum(fp)) if sum(tp) else 0.0
        recall = sum(tp) / (sum(tp) + sum(fn))
        values = (cp, cr, f1(cp, cr), op, recall, f1(op, recall))
        result.update({key + rule: value for key, value in zip(SIX, values, strict=True)})
    return result


def compute(scores: Array, target: Array, cuts: list[int] | None = None) -> Result:
    """Return the metrics, updated in pieces that end at `cuts`, by default all at once."""
    metrics = MultiLabelMetrics(scores.shape[1])
    for piece, piece_target in zip(np.split(scores, cuts or []), np.split(target, cuts or []), strict=True):
        metrics.update(piece, piece_target)
    return metrics.compute()


def assert_same(result: Result, expected: Result, rtol: float = 0) -> None:
    """Assert equal keys and values; nan equals nan."""
    assert result.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(result[key], expected[key], rtol=rtol, atol=0, err_msg=key)


def random_split(n: int, num_classes: int, seed: int, unknown: float, decimals: int) -> tuple[Array, Array]:
    """Return scores that correlate with the labels; few `decimals` give many equal scores."""
    rng = np.random.default_rng(seed)
    target = (rng.random((n, num_classes)) < 0.3).astype(np.int8)
    scores = np.clip(0.3 * target + 0.7 * rng.random((n, num_classes)), 0, 1).round(decimals)
    target[rng.random((n, num_classes)) < unknown] = -1
    return scores, target
