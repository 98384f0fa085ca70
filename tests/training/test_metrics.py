"""The metrics against an oracle in exact fractions and scikit-learn, and their properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from tests.training.metrics_oracle import (
    GRID,
    SIX,
    Array,
    assert_same,
    brute_force,
    compute,
    random_split,
)


@st.composite
def splits(draw: st.DrawFn) -> tuple[Array, Array]:
    """Draw [n, C] scores on the grid and targets in {1, 0, -1}, at least one of them present."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    size = shape[0] * shape[1]
    scores = draw(st.lists(st.integers(0, GRID), min_size=size, max_size=size))
    target = draw(st.lists(st.sampled_from([1, 0, -1]), min_size=size, max_size=size).filter(lambda t: 1 in t))
    return np.array(scores).reshape(shape) / GRID, np.array(target, dtype=np.int8).reshape(shape)


property_test = settings(max_examples=100, deadline=None)


@property_test
@given(splits())
def test_agrees_with_brute_force(split: tuple[Array, Array]) -> None:
    assert_same(compute(*split), brute_force(*split), rtol=1e-12)


@pytest.mark.parametrize("unknown", [0.0, 0.25])
@pytest.mark.parametrize("decimals", [1, 9])
def test_agrees_with_brute_force_on_a_larger_split(unknown: float, decimals: int) -> None:
    scores, target = random_split(61, 7, seed=1, unknown=unknown, decimals=decimals)
    target[:, 2] = np.minimum(target[:, 2], 0)  # a class without a present label
    scores[:, 4] *= 0.49  # a class that the threshold never predicts
    assert_same(compute(scores, target), brute_force(scores, target), rtol=1e-12)


@pytest.mark.parametrize("unknown", [0.0, 0.25])
@pytest.mark.parametrize("decimals", [1, 9])
def test_average_precision_agrees_with_scikit_learn(unknown: float, decimals: int) -> None:
    scores, target = random_split(203, 9, seed=2, unknown=unknown, decimals=decimals)
    known = target != -1
    expected = [average_precision_score(target[known[:, c], c], scores[known[:, c], c]) for c in range(9)]
    result = compute(scores, target)
    np.testing.assert_allclose(result["AP"], expected, rtol=1e-12)
    np.testing.assert_allclose(result["mAP"], np.mean(expected), rtol=1e-12)


@pytest.mark.parametrize("unknown", [0.0, 0.25])
def test_precision_and_recall_agree_with_scikit_learn(unknown: float) -> None:
    scores, target = random_split(203, 9, seed=3, unknown=unknown, decimals=1)
    scores[:, 4] *= 0.49  # never predicted
    known, predicted = target != -1, scores >= 0.5
    per_class = np.array(
        [
            precision_recall_fscore_support(
                target[known[:, c], c], predicted[known[:, c], c], average="binary", zero_division=0
            )[:2]
            for c in range(9)
        ]
    )
    overall = precision_recall_fscore_support(target[known], predicted[known], average="binary")[:3]
    cp, cr = per_class.mean(axis=0)
    result = compute(scores, target)
    expected = (cp, cr, 2 * cp * cr / (cp + cr), *overall)
    np.testing.assert_allclose([result[key] for key in SIX], expected, rtol=1e-12)


@property_test
@given(splits(), st.randoms(use_true_random=False))
def test_row_order_does_not_change_metrics(split: tuple[Array, Array], random: Any) -> None:
    scores, target = split
    order = random.sample(range(len(scores)), len(scores))
    assert_same(compute(scores[order], target[order]), compute(scores, target))


@property_test
@given(splits(), st.lists(st.integers(0, 12), max_size=5))
def test_update_in_pieces_equals_update_at_once(split: tuple[Array, Array], cuts: list[int]) -> None:
    assert_same(compute(*split, sorted(cuts)), compute(*split))  # equal cuts give empty pieces


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 100])
def test_every_row_counts_once_for_any_batch_size(batch: int) -> None:
    """The oracle's values: a mean of batch means or a dropped last batch fails. 13 is prime."""
    scores, target = random_split(13, 5, seed=4, unknown=0.1, decimals=2)
    cuts = list(range(batch, 13, batch))
    assert_same(compute(scores, target, cuts), brute_force(scores, target), rtol=1e-12)


@property_test
@given(splits(), st.sampled_from([np.square, np.sqrt, lambda x: 0.25 + 0.5 * x]))
def test_monotone_transform_keeps_average_precision(
    split: tuple[Array, Array], transform: Callable[[Array], Array]
) -> None:
    scores, target = split
    result, expected = compute(transform(scores), target), compute(scores, target)
    for key in ("AP", "mAP", "mAP_voc11", "mAP_envelope", *(six + "_top3" for six in SIX)):
        np.testing.assert_array_equal(result[key], expected[key], err_msg=key)


@property_test
@given(splits())
def test_values_in_range_and_envelope_above_area(split: tuple[Array, Array]) -> None:
    scores, target = split
    result = compute(scores, target)
    has_both = (target == 1).any(axis=0) & (target == 0).any(axis=0)
    values = np.array(result["AP"])
    np.testing.assert_array_equal(np.isnan(values), ~has_both)
    assert (values[has_both] > 0).all()
    assert (values[has_both] <= 1).all()
    means = {key: result.pop(key) for key in ("mAP", "mAP_voc11", "mAP_envelope")}
    if has_both.any():
        assert means["mAP_envelope"] >= means["mAP"]  # type: ignore[operator]
        assert all(0 <= value <= 1 for value in means.values())  # type: ignore[operator]
    else:
        assert all(np.isnan(value) for value in means.values())
    for key, value in result.items():
        assert key == "AP" or 0 <= value <= 1, key  # type: ignore[operator]


@property_test
@given(splits(), st.data())
def test_perfect_ranking_scores_one(split: tuple[Array, Array], data: st.DataObject) -> None:
    """Present labels score above 0.5, absent labels below, unknown labels anywhere: all metrics except top 3 are 1."""
    scores, target = split
    scores = np.where(target == 1, 0.5 + scores / 2, np.where(target == 0, scores / 4, scores))
    result = compute(scores, target)
    has_both = (target == 1).any(axis=0) & (target == 0).any(axis=0)
    assert (np.array(result["AP"])[has_both] == 1).all()
    for key in (*(("mAP", "mAP_voc11", "mAP_envelope") if has_both.any() else ()), *SIX):
        assert result[key] == pytest.approx(1, abs=1e-12), key
    # A single absent label above all others makes the ranking imperfect.
    absent = np.argwhere((target == 0) & (target == 1).any(axis=0))
    if len(absent):
        row, column = absent[data.draw(st.integers(0, len(absent) - 1))]
        scores[row, column] = 1
        spoiled = compute(scores, target)
        assert spoiled["mAP"] < 1  # type: ignore[operator]
        assert spoiled["OP"] < 1  # type: ignore[operator]


@property_test
@given(splits())
def test_scores_of_unknown_labels_do_not_count(split: tuple[Array, Array]) -> None:
    scores, target = split
    assert_same(compute(np.where(target == -1, 1 - scores, scores), target), compute(scores, target))
