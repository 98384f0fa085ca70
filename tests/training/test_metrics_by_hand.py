"""The metrics of cases calculated by hand, the inputs they accept, and the inputs they refuse."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from msrn_ray.errors import UserError
from msrn_ray.training.metrics import MultiLabelMetrics
from tests.training.metrics_oracle import (
    GRID,
    RULES,
    SIX,
    Array,
    assert_same,
    brute_force,
    compute,
    random_split,
)


def test_average_precision_by_hand() -> None:
    """The precision at the present labels is 1/1, 2/4, 3/5; the highest from there on is 1, 3/5, 3/5."""
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    target = np.array([[1], [0], [0], [1], [1]])
    result = compute(scores, target)
    assert result["AP"] == pytest.approx([(1 + 2 / 4 + 3 / 5) / 3])
    assert result["mAP_envelope"] == pytest.approx((1 + 3 / 5 + 3 / 5) / 3)
    # The first present label (recall 1/3) reaches recall 0, .1, .2 and .3; the next two reach the other seven.
    assert result["mAP_voc11"] == pytest.approx((4 * 1 + 7 * 3 / 5) / 11)


def test_eleven_points_are_reached_exactly() -> None:
    """Recall 3/10 reaches the point 0.3, which rounding (3 * 0.1 > 0.3) would miss.

    Three labels are present, the next is absent, the other seven are present: the precision is 1 up to recall 0.3. Above it the
    highest precision is that of the last label, 10/11.
    """
    target = np.array([1, 1, 1, 0] + [1] * 7)[:, None]
    scores = np.linspace(1, 0, 11)[:, None]
    assert compute(scores, target)["mAP_voc11"] == pytest.approx((4 * 1 + 7 * 10 / 11) / 11, rel=1e-12)


def test_equal_scores_are_one_threshold() -> None:
    """All four are equal: the precision is 2/4 at both present labels, in any order of the rows."""
    target = np.array([[1], [1], [0], [0]])
    assert compute(np.full((4, 1), 0.5), target)["AP"] == [0.5]
    assert compute(np.full((4, 1), 0.5), target[::-1])["AP"] == [0.5]


def test_unknown_is_not_absent() -> None:
    """The unknown label ranks first: as absent it would halve the precision, as present it would raise the recall to 2/3."""
    scores, target = np.array([[0.9], [0.8], [0.1], [0.0]]), np.array([[-1], [1], [1], [0]])
    result = compute(scores, target)
    assert result["AP"] == [1]
    assert [result[key] for key in ("CP", "CR", "OP", "OR")] == [1, 0.5, 1, 0.5]


def test_label_without_known_negative_has_no_ap() -> None:
    """Class 0 is present wherever known, so that any ranking is right; class 1 is ranked in reverse."""
    scores, target = np.array([[0.9, 0.1], [0.8, 0.7], [0.1, 0.5]]), np.array([[1, 1], [-1, 0], [1, 0]])
    result = compute(scores, target)
    assert result["AP"] == pytest.approx([math.nan, 1 / 3], nan_ok=True)
    assert [result[key] for key in ("mAP", "mAP_voc11", "mAP_envelope")] == pytest.approx([1 / 3] * 3)
    assert all(math.isnan(compute(scores[:, :1], target[:, :1])[key]) for key in ("mAP", "mAP_voc11", "mAP_envelope"))  # type: ignore[arg-type]


def test_axes_are_images_then_classes() -> None:
    """The transpose of this square split has other values: class 0 is ranked perfectly, class 1 in reverse."""
    scores, target = np.array([[0.9, 0.8], [0.2, 0.7]]), np.array([[1, 0], [0, 1]])
    assert compute(scores, target)["AP"] == [1, 0.5]
    assert compute(scores.T, target.T)["AP"] == [1, 1]


def test_threshold_by_hand() -> None:
    """Class 0: 1 of 2 predictions is right, 1 of 1 present label is found. Class 1: 0 of 2 found. Class 2: no present label."""
    scores = np.array([[0.5, 0.4, 0.1], [0.5, 0.4, 0.6]])
    target = np.array([[1, 1, 0], [0, 1, 0]])
    result = compute(scores, target)
    assert result["CP"] == (1 / 2 + 0) / 2  # class 2 is left out, class 1 counts 0
    assert result["CR"] == (1 + 0) / 2
    assert result["CF1"] == pytest.approx(1 / 3)
    assert result["OP"] == 1 / 3  # with the false alarm of class 2
    assert result["OR"] == 1 / 3
    assert result["OF1"] == pytest.approx(1 / 3)


def test_cf1_is_the_harmonic_mean_of_the_means() -> None:
    """CP = (1 + 1/2) / 2, CR = (1/2 + 1) / 2: CF1 = 3/4, where the mean of the classes' F1 would be 2/3."""
    scores, target = np.array([[0.9, 0.9], [0.1, 0.9]]), np.array([[1, 1], [1, 0]])
    assert compute(scores, target)["CF1"] == 0.75


def test_top3_by_hand() -> None:
    """An image with five labels; the unknown label has the second highest score and takes none of the three places."""
    scores, target = np.array([[0.9, 0.8, 0.4, 0.7, 0.3]]), np.array([[1, -1, 1, 0, 1]])
    result = compute(scores, target)  # top 3: classes 0, 2, 3; of these, 0 and 3 reach 0.5
    assert (result["OP_top3"], result["OR_top3"]) == (2 / 3, 2 / 3)
    assert (result["CP_top3"], result["CR_top3"]) == (2 / 3, 2 / 3)  # classes 0, 2, 4
    assert (result["OP_top3_at_0.5"], result["OR_top3_at_0.5"]) == (1 / 2, 1 / 3)
    assert (result["CP_top3_at_0.5"], result["CR_top3_at_0.5"]) == (1 / 3, 1 / 3)
    known = np.array([[1, 0, 1, 0, 1]])
    assert compute(scores, known)["OP_top3"] == 1 / 3  # with class 1 known, the top 3 are classes 0, 1, 3


def test_top3_drops_the_fourth_confident_label() -> None:
    scores, target = np.array([[0.9, 0.6, 0.8, 0.7]]), np.ones((1, 4), dtype=int)
    result = compute(scores, target)
    assert [result[key] for key in ("OR", "OR_top3", "OR_top3_at_0.5")] == [1, 0.75, 0.75]


def test_top3_gives_equal_scores_to_the_lower_class() -> None:
    result = compute(np.full((1, 5), 0.6), np.array([[1, 1, 1, 0, 0]]))
    assert (result["OP_top3"], result["OR_top3"]) == (1, 1)
    assert compute(np.full((1, 5), 0.6), np.array([[0, 0, 1, 1, 1]]))["OP_top3"] == 1 / 3


@pytest.mark.parametrize("target", [[[1, 1]], [[-1, 1, -1, 1, -1]], [[1, -1, 1]]])
def test_top3_takes_all_if_fewer_are_known(target: list[list[int]]) -> None:
    known = np.array(target)
    result = compute(np.full(known.shape, 0.1), known)
    assert (result["OP_top3"], result["OR_top3"], result["OR_top3_at_0.5"]) == (1, 1, 0)


def test_nothing_found_is_zero_not_nan() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute(np.zeros((2, 2)), np.array([[1, 0], [0, 1]]))
    assert [result[key] for key in SIX] == [0] * 6


def test_no_present_label_gives_nan_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute(np.full((2, 2), 0.9), np.array([[0, -1], [0, 0]]))
    undefined = {key for key, value in result.items() if np.isnan(value).all()}
    assert undefined == result.keys() - {"OP", "OP_top3", "OP_top3_at_0.5"}
    assert result["OP"] == 0


def test_result_has_all_keys_and_plain_floats() -> None:
    result = compute(*random_split(5, 4, seed=5, unknown=0, decimals=2))
    assert set(result) == {"mAP", "mAP_voc11", "mAP_envelope", "AP"} | {key + rule for key in SIX for rule in RULES}
    assert all(type(value) is float for key, value in result.items() if key != "AP")
    assert [type(value) for value in result["AP"]] == [float] * 4  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_accepts_tensors_of_any_float_type(dtype: torch.dtype) -> None:
    scores, target = random_split(17, 4, seed=6, unknown=0.1, decimals=2)
    scores = np.round(scores * GRID) / GRID  # exact in each type
    metrics = MultiLabelMetrics(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.update(torch.tensor(scores, dtype=dtype, requires_grad=True), torch.tensor(target))
    assert_same(metrics.compute(), compute(scores, target))


def test_scores_are_not_rounded() -> None:
    """The two scores differ by less than the precision of float32."""
    assert compute(np.array([[0.5 + 1e-12], [0.5]]), np.array([[1], [0]]))["AP"] == [1]


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_copies_what_it_keeps(make: Callable[[Array], Any]) -> None:
    scores, target = random_split(11, 3, seed=7, unknown=0, decimals=2)
    metrics = MultiLabelMetrics(3)
    buffer, target_buffer = make(scores), make(target)
    metrics.update(buffer, target_buffer)
    buffer[:], target_buffer[:] = 0, 0
    assert_same(metrics.compute(), compute(scores, target))


def test_accepts_read_only_arrays_without_a_warning() -> None:
    scores, target = random_split(11, 3, seed=8, unknown=0, decimals=2)
    scores.flags.writeable = target.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(compute(scores, target), brute_force(scores, target), rtol=1e-12)


@pytest.mark.parametrize(
    ("scores_shape", "target_shape"),
    [((4, 3), (3, 3)), ((4, 3), (3, 4)), ((3, 4), (3, 4)), ((3,), (3,)), ((2, 4, 3), (2, 4, 3)), ((4, 3), (4,))],
)
def test_wrong_shapes_are_refused_with_both(scores_shape: tuple[int, ...], target_shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError) as error:
        MultiLabelMetrics(3).update(np.zeros(scores_shape), np.zeros(target_shape, dtype=int))
    assert str(list(scores_shape)) in str(error.value)
    assert str(list(target_shape)) in str(error.value)
    assert "[n, 3]" in str(error.value)


@pytest.mark.parametrize(
    "bad", [np.int64(2), np.int64(-2), np.int64(257), np.uint8(255), np.float64(0.5), np.float64("nan")]
)
def test_wrong_target_is_refused_with_its_place(bad: Any) -> None:
    """As int8, 257 and uint8 255 would become 1 and -1."""
    target = np.zeros((4, 3), dtype=bad.dtype)
    target[3, 1] = bad
    with pytest.raises(UserError, match=rf"target {bad} of class 1 in row 3 is not 1 \(present\), 0 \(absent\) or -1"):
        MultiLabelMetrics(3).update(np.zeros((4, 3)), target)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.5, -0.25])
def test_wrong_score_is_refused_and_keeps_other_rows(bad: float) -> None:
    scores, target = random_split(5, 3, seed=9, unknown=0, decimals=2)
    metrics = MultiLabelMetrics(3)
    metrics.update(scores, target)
    broken = scores.copy()
    broken[2, 1] = bad
    with pytest.raises(UserError, match=rf"score {bad} of class 1 in row 7 is not a probability"):  # after 5 rows
        metrics.update(broken, target)
    metrics.update(scores[:2], target[:2])
    assert metrics.num_rows == 7
    assert_same(metrics.compute(), compute(np.vstack([scores, scores[:2]]), np.vstack([target, target[:2]])))


def test_nan_score_of_an_unknown_label_is_refused() -> None:
    with pytest.raises(UserError, match="score nan of class 0 in row 0"):
        MultiLabelMetrics(1).update(torch.tensor([[math.nan]]), torch.tensor([[-1]]))


def test_no_rows_are_refused() -> None:
    metrics = MultiLabelMetrics(3)
    with pytest.raises(UserError, match="no rows"):
        metrics.compute()
    metrics.update(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int8))
    with pytest.raises(UserError, match="no rows"):
        metrics.compute()
