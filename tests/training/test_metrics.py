"""The metrics against a plain-Python oracle in exact fractions, scikit-learn, cases by hand and their properties."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from msrn_ray.errors import UserError
from msrn_ray.training.metrics import MultiLabelMetrics

Array = npt.NDArray[Any]
Result = dict[str, float | list[float]]
SIX = ("CP", "CR", "CF1", "OP", "OR", "OF1")
RULES = ("", "_top3", "_top3_at_0.5")
GRID = 64  # scores are multiples of 1 / GRID: exact in floating point, and equal often enough


# --- The oracle: definitions word for word, in loops and fractions, on lists of rows


def curve(scores: list[float], labels: list[int]) -> list[tuple[Fraction, Fraction]]:
    """(recall, precision) of one class at every threshold, the highest threshold first."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for score, label in zip(scores, labels, strict=True) if score >= threshold]
        points.append((Fraction(sum(chosen), sum(labels)), Fraction(sum(chosen), len(chosen))))
    return points


def brute_force_average_precision(scores: list[float], labels: list[int]) -> tuple[float, float, float]:
    """area, 11-point and envelope of one class, labels in {1, 0}."""
    if not any(labels):
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
    """Whether class c of one image is predicted by a rule of RULES."""
    better = [k for k in range(len(row)) if target[k] != -1 and (row[k] > row[c] or (row[k] == row[c] and k < c))]
    in_top = len(better) < 3
    return {"": row[c] >= 0.5, "_top3": in_top, "_top3_at_0.5": in_top and row[c] >= 0.5}[rule]


def f1(precision: float, recall: float) -> float:
    return 2 / (1 / precision + 1 / recall) if precision and recall else 0.0


def brute_force(scores: Array, target: Array) -> Result:
    """All metrics, for splits with at least one present label."""
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
        result[key] = sum(defined) / len(defined)
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


# --- Helpers


def compute(scores: Array, target: Array, cuts: list[int] | None = None) -> Result:
    """The metrics, updated in pieces that end at `cuts` (all at once without)."""
    metrics = MultiLabelMetrics(scores.shape[1])
    for piece, piece_target in zip(np.split(scores, cuts or []), np.split(target, cuts or []), strict=True):
        metrics.update(piece, piece_target)
    return metrics.compute()


def assert_same(result: Result, expected: Result, rtol: float = 0) -> None:
    """The same keys and values; nan equals nan."""
    assert result.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(result[key], expected[key], rtol=rtol, atol=0, err_msg=key)


def random_split(n: int, num_classes: int, seed: int, unknown: float, decimals: int) -> tuple[Array, Array]:
    """Scores that say something about the labels; scores rounded to `decimals` (few decimals: many ties)."""
    rng = np.random.default_rng(seed)
    target = (rng.random((n, num_classes)) < 0.3).astype(np.int8)
    scores = np.clip(0.3 * target + 0.7 * rng.random((n, num_classes)), 0, 1).round(decimals)
    target[rng.random((n, num_classes)) < unknown] = -1
    return scores, target


@st.composite
def splits(draw: st.DrawFn) -> tuple[Array, Array]:
    """[n, C] scores on the grid and targets in {1, 0, -1}, at least one of them present."""
    shape = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    size = shape[0] * shape[1]
    scores = draw(st.lists(st.integers(0, GRID), min_size=size, max_size=size))
    target = draw(st.lists(st.sampled_from([1, 0, -1]), min_size=size, max_size=size).filter(lambda t: 1 in t))
    return np.array(scores).reshape(shape) / GRID, np.array(target, dtype=np.int8).reshape(shape)


property_test = settings(max_examples=100, deadline=None)


# --- Against the oracle and scikit-learn


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


# --- Properties


@property_test
@given(splits(), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(split: tuple[Array, Array], random: Any) -> None:
    scores, target = split
    order = random.sample(range(len(scores)), len(scores))
    assert_same(compute(scores[order], target[order]), compute(scores, target))


@property_test
@given(splits(), st.lists(st.integers(0, 12), max_size=5))
def test_update_in_pieces_is_update_at_once(split: tuple[Array, Array], cuts: list[int]) -> None:
    assert_same(compute(*split, sorted(cuts)), compute(*split))  # equal cuts make empty pieces


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 100])
def test_every_row_counts_once_whatever_the_batch_size(batch: int) -> None:
    """Oracle values, so that neither a mean of batch means nor a dropped last batch can pass; 13 is prime."""
    scores, target = random_split(13, 5, seed=4, unknown=0.1, decimals=2)
    cuts = list(range(batch, 13, batch))
    assert_same(compute(scores, target, cuts), brute_force(scores, target), rtol=1e-12)


@property_test
@given(splits(), st.sampled_from([np.square, np.sqrt, lambda x: 0.25 + 0.5 * x]))
def test_monotone_transform_does_not_change_average_precision(
    split: tuple[Array, Array], transform: Callable[[Array], Array]
) -> None:
    scores, target = split
    result, expected = compute(transform(scores), target), compute(scores, target)
    for key in ("AP", "mAP", "mAP_voc11", "mAP_envelope", *(six + "_top3" for six in SIX)):
        np.testing.assert_array_equal(result[key], expected[key], err_msg=key)


@property_test
@given(splits())
def test_ranges_and_envelope(split: tuple[Array, Array]) -> None:
    scores, target = split
    result = compute(scores, target)
    has_present = (target == 1).any(axis=0)
    values = np.array(result["AP"])
    np.testing.assert_array_equal(np.isnan(values), ~has_present)
    assert (values[has_present] > 0).all()
    assert (values[has_present] <= 1).all()
    assert result["mAP_envelope"] >= result["mAP"]  # type: ignore[operator]
    for key, value in result.items():
        assert key == "AP" or 0 <= value <= 1, key  # type: ignore[operator]


@property_test
@given(splits(), st.data())
def test_perfect_ranking(split: tuple[Array, Array], data: st.DataObject) -> None:
    """Present above 0.5 above absent, unknown anywhere: everything but top 3 is 1."""
    scores, target = split
    scores = np.where(target == 1, 0.5 + scores / 2, np.where(target == 0, scores / 4, scores))
    result = compute(scores, target)
    assert np.nanmin(result["AP"]) == 1
    for key in ("mAP", "mAP_voc11", "mAP_envelope", *SIX):
        assert result[key] == pytest.approx(1, abs=1e-12), key
    # The same ranking with one absent label that outranks all: no longer perfect.
    absent = np.argwhere((target == 0) & (target == 1).any(axis=0))
    if len(absent):
        row, column = absent[data.draw(st.integers(0, len(absent) - 1))]
        scores[row, column] = 1
        spoiled = compute(scores, target)
        assert spoiled["mAP"] < 1  # type: ignore[operator]
        assert spoiled["OP"] < 1  # type: ignore[operator]


@property_test
@given(splits())
def test_score_of_an_unknown_label_does_not_matter(split: tuple[Array, Array]) -> None:
    scores, target = split
    assert_same(compute(np.where(target == -1, 1 - scores, scores), target), compute(scores, target))


# --- By hand


def test_average_precision_by_hand() -> None:
    """Precision at the present labels 1/1, 2/4, 3/5; what is highest from there on 1, 3/5, 3/5."""
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    target = np.array([[1], [0], [0], [1], [1]])
    result = compute(scores, target)
    assert result["AP"] == pytest.approx([(1 + 2 / 4 + 3 / 5) / 3])
    assert result["mAP_envelope"] == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    # Recall 0, .1, .2 and .3 is reached by the first present label (recall 1/3), the other seven by the next two.
    assert result["mAP_voc11"] == pytest.approx((4 * 1 + 7 * 3 / 5) / 11)


def test_eleven_points_are_reached_exactly() -> None:
    """Ten present labels: recall 3/10 is the point 0.3, which rounding (3 * 0.1 > 0.3) would put out of reach.

    Three present labels, then an absent one, then seven: precision 1 up to recall 0.3; from there on the highest is
    that of the last, 10/11.
    """
    target = np.array([1, 1, 1, 0] + [1] * 7)[:, None]
    scores = np.linspace(1, 0, 11)[:, None]
    assert compute(scores, target)["mAP_voc11"] == pytest.approx((4 * 1 + 7 * 10 / 11) / 11, rel=1e-12)


def test_equal_scores_are_one_threshold() -> None:
    """All four tie: precision is 2/4 at both present labels, in whichever order the rows come."""
    target = np.array([[1], [1], [0], [0]])
    assert compute(np.full((4, 1), 0.5), target)["AP"] == [0.5]
    assert compute(np.full((4, 1), 0.5), target[::-1])["AP"] == [0.5]


def test_unknown_is_not_absent() -> None:
    """The unknown label is on top: as absent it would halve the precision, as present raise the recall to 2/3."""
    scores, target = np.array([[0.9], [0.8], [0.1]]), np.array([[-1], [1], [1]])
    result = compute(scores, target)
    assert result["AP"] == [1]
    assert [result[key] for key in ("CP", "CR", "OP", "OR")] == [1, 0.5, 1, 0.5]


def test_axes_are_images_then_classes() -> None:
    """A square split whose transpose has other values: class 0 is ranked perfectly, class 1 the wrong way round."""
    scores, target = np.array([[0.9, 0.8], [0.2, 0.7]]), np.array([[1, 0], [0, 1]])
    assert compute(scores, target)["AP"] == [1, 0.5]
    assert compute(scores.T, target.T)["AP"] == [1, 1]


def test_threshold_by_hand() -> None:
    """By class: 1 of 2 predictions right and 1 of 1 present found; never predicted, 0 of 2 found; no present label."""
    scores = np.array([[0.5, 0.4, 0.1], [0.5, 0.4, 0.6]])
    target = np.array([[1, 1, 0], [0, 1, 0]])
    result = compute(scores, target)
    assert result["CP"] == (1 / 2 + 0) / 2  # the third class is left out, the second counts 0
    assert result["CR"] == (1 + 0) / 2
    assert result["CF1"] == pytest.approx(1 / 3)
    assert result["OP"] == 1 / 3  # the false alarm of the third class included
    assert result["OR"] == 1 / 3
    assert result["OF1"] == pytest.approx(1 / 3)


def test_per_class_f1_is_the_harmonic_mean_of_the_means() -> None:
    """CP = (1 + 1/2) / 2, CR = (1/2 + 1) / 2: CF1 = 3/4, where the mean of the classes' F1 would be 2/3."""
    scores, target = np.array([[0.9, 0.9], [0.1, 0.9]]), np.array([[1, 1], [1, 0]])
    assert compute(scores, target)["CF1"] == 0.75


def test_top3_by_hand() -> None:
    """One image, five labels; the unknown one, second in score, takes none of the three places."""
    scores, target = np.array([[0.9, 0.8, 0.4, 0.7, 0.3]]), np.array([[1, -1, 1, 0, 1]])
    result = compute(scores, target)  # top 3: classes 0, 2, 3; of these 0 and 3 reach 0.5
    assert (result["OP_top3"], result["OR_top3"]) == (2 / 3, 2 / 3)
    assert (result["CP_top3"], result["CR_top3"]) == (2 / 3, 2 / 3)  # classes 0, 2, 4
    assert (result["OP_top3_at_0.5"], result["OR_top3_at_0.5"]) == (1 / 2, 1 / 3)
    assert (result["CP_top3_at_0.5"], result["CR_top3_at_0.5"]) == (1 / 3, 1 / 3)
    known = np.array([[1, 0, 1, 0, 1]])
    assert compute(scores, known)["OP_top3"] == 1 / 3  # the same, known: classes 0, 1, 3


def test_top3_drops_the_fourth_confident_label() -> None:
    scores, target = np.array([[0.9, 0.6, 0.8, 0.7]]), np.ones((1, 4), dtype=int)
    result = compute(scores, target)
    assert [result[key] for key in ("OR", "OR_top3", "OR_top3_at_0.5")] == [1, 0.75, 0.75]


def test_top3_gives_equal_scores_to_the_lower_class() -> None:
    result = compute(np.full((1, 5), 0.6), np.array([[1, 1, 1, 0, 0]]))
    assert (result["OP_top3"], result["OR_top3"]) == (1, 1)
    assert compute(np.full((1, 5), 0.6), np.array([[0, 0, 1, 1, 1]]))["OP_top3"] == 1 / 3


@pytest.mark.parametrize("target", [[[1, 1]], [[-1, 1, -1, 1, -1]], [[1, -1, 1]]])
def test_top3_takes_all_where_fewer_are_known(target: list[list[int]]) -> None:
    known = np.array(target)
    result = compute(np.full(known.shape, 0.1), known)
    assert (result["OP_top3"], result["OR_top3"], result["OR_top3_at_0.5"]) == (1, 1, 0)


def test_nothing_found_is_zero_not_nan() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute(np.zeros((2, 2)), np.array([[1, 0], [0, 1]]))
    assert [result[key] for key in SIX] == [0] * 6


def test_no_present_label_at_all_is_nan_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute(np.full((2, 2), 0.9), np.array([[0, -1], [0, 0]]))
    undefined = {key for key, value in result.items() if np.isnan(value).all()}
    assert undefined == result.keys() - {"OP", "OP_top3", "OP_top3_at_0.5"}
    assert result["OP"] == 0


def test_keys_are_all_there_and_plain() -> None:
    result = compute(*random_split(5, 4, seed=5, unknown=0, decimals=2))
    assert set(result) == {"mAP", "mAP_voc11", "mAP_envelope", "AP"} | {key + rule for key in SIX for rule in RULES}
    assert all(type(value) is float for key, value in result.items() if key != "AP")
    assert [type(value) for value in result["AP"]] == [float] * 4  # type: ignore[union-attr]


# --- What comes in


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_takes_tensors_of_any_float_type(dtype: torch.dtype) -> None:
    scores, target = random_split(17, 4, seed=6, unknown=0.1, decimals=2)
    scores = np.round(scores * GRID) / GRID  # exact in each of the types
    metrics = MultiLabelMetrics(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update(torch.tensor(scores, dtype=dtype, requires_grad=True), torch.tensor(target))
    assert_same(metrics.compute(), compute(scores, target))


def test_scores_are_not_rounded() -> None:
    """The two differ by less than float32 can tell."""
    assert compute(np.array([[0.5 + 1e-12], [0.5]]), np.array([[1], [0]]))["AP"] == [1]


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_copies_what_it_keeps(make: Callable[[Array], Any]) -> None:
    scores, target = random_split(11, 3, seed=7, unknown=0, decimals=2)
    metrics = MultiLabelMetrics(3)
    buffer, target_buffer = make(scores), make(target)
    metrics.update(buffer, target_buffer)
    buffer[:], target_buffer[:] = 0, 0
    assert_same(metrics.compute(), compute(scores, target))


def test_takes_read_only_arrays_without_a_warning() -> None:
    scores, target = random_split(11, 3, seed=8, unknown=0, decimals=2)
    scores.flags.writeable = target.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(compute(scores, target), brute_force(scores, target), rtol=1e-12)


# --- Errors


@pytest.mark.parametrize(
    ("scores_shape", "target_shape"),
    [((4, 3), (3, 3)), ((4, 3), (3, 4)), ((3, 4), (3, 4)), ((3,), (3,)), ((2, 4, 3), (2, 4, 3)), ((4, 3), (4,))],
)
def test_wrong_shapes(scores_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as error:
        MultiLabelMetrics(3).update(np.zeros(scores_shape), np.zeros(target_shape, dtype=int))
    assert str(list(scores_shape)) in str(error.value)
    assert str(list(target_shape)) in str(error.value)
    assert "[n, 3]" in str(error.value)


@pytest.mark.parametrize(
    "bad", [np.int64(2), np.int64(-2), np.int64(257), np.uint8(255), np.float64(0.5), np.float64("nan")]
)
def test_wrong_target(bad: Any) -> None:
    """257 and uint8 255 would turn into 1 and -1 as int8."""
    target = np.zeros((4, 3), dtype=bad.dtype)
    target[3, 1] = bad
    with pytest.raises(UserError, match=rf"target {bad} of class 1 in row 3 is not 1 \(present\), 0 \(absent\) or -1"):
        MultiLabelMetrics(3).update(np.zeros((4, 3)), target)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.5, -0.25])
def test_wrong_score_is_refused_and_leaves_the_rest(bad: float) -> None:
    scores, target = random_split(5, 3, seed=9, unknown=0, decimals=2)
    metrics = MultiLabelMetrics(3)
    metrics.update(scores, target)
    broken = scores.copy()
    broken[2, 1] = bad
    with pytest.raises(UserError, match=rf"score {bad} of class 1 in row 7 is not a probability"):  # 5 rows before
        metrics.update(broken, target)
    metrics.update(scores[:2], target[:2])
    assert metrics.num_rows == 7
    assert_same(metrics.compute(), compute(np.vstack([scores, scores[:2]]), np.vstack([target, target[:2]])))


def test_nan_score_of_an_unknown_label_is_refused_too() -> None:
    with pytest.raises(UserError, match="score nan of class 0 in row 0"):
        MultiLabelMetrics(1).update(torch.tensor([[math.nan]]), torch.tensor([[-1]]))


def test_no_rows() -> None:
    metrics = MultiLabelMetrics(3)
    with pytest.raises(UserError, match="no rows"):
        metrics.compute()
    metrics.update(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int8))
    with pytest.raises(UserError, match="no rows"):
        metrics.compute()
