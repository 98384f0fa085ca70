"""The stratified split: a partition, the same each time, fair to every label."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msrn_ray.datasets.apparel import read_apparel
from msrn_ray.datasets.split import stratified_split
from msrn_ray.errors import UserError

TARGETS = hnp.arrays(np.int8, st.tuples(st.integers(0, 40), st.integers(1, 6)), elements=st.sampled_from([1, 0, 0, -1]))
FRACTIONS = st.floats(0.01, 0.99)


@given(TARGETS, FRACTIONS, st.integers(0, 2**31))
def test_is_a_partition_and_repeats(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> None:
    rest, part = stratified_split(targets, fraction, seed)
    for rows in (rest, part):
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(targets)))
    again = stratified_split(targets, fraction, seed)
    np.testing.assert_array_equal(rest, again[0])
    np.testing.assert_array_equal(part, again[1])


@given(TARGETS, FRACTIONS, st.integers(0, 9))
def test_labels_are_on_both_sides_where_a_row_could_be_spared(
    targets: npt.NDArray[np.int8], fraction: float, seed: int
) -> None:
    parts = stratified_split(targets, fraction, seed)
    common = (targets == 1).sum(0) >= 2
    for lacking, other in (parts, parts[::-1]):
        left = (targets[other] == 1).sum(0)
        for label in np.flatnonzero(common & ~(targets[lacking] == 1).any(0)):
            for row in other:
                if targets[row, label] == 1:
                    assert (common & (targets[row] == 1) & (left == 1)).any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), FRACTIONS)
def test_single_labels_are_shared_out_to_the_nearest_row(labels: list[int], fraction: float) -> None:
    targets = np.eye(6, dtype=np.int8)[labels]
    _, part = stratified_split(targets, fraction, 0)
    total, found = targets.sum(0), targets[part].sum(0)
    assert (abs(found - fraction * total) <= np.where(total > 1, 1, 0.5) + 1e-9).all()
    assert ((found >= 1) & (found < total))[total > 1].all()


def test_a_chain_of_rare_labels_is_mended() -> None:
    # Two rows of each of the first two labels; the third has one of each and must not end up on one side.
    targets = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 1], [0, 1, 0], *[[0, 0, 0]] * 20], np.int8)
    for seed in range(20):
        rest, part = stratified_split(targets, 0.2, seed)
        assert targets[rest].any(0).all()
        assert targets[part].any(0).all()


def test_unknown_is_no_positive() -> None:
    targets = np.zeros((40, 1), np.int8)
    targets[:4], targets[4:] = 1, -1
    _, part = stratified_split(targets, 0.5, 3)
    assert (targets[part] == 1).sum() == 2
    assert len(part) == 20


def test_the_seed_matters() -> None:
    targets = np.zeros((100, 2), np.int8)
    targets[::3] = 1
    first, second = (stratified_split(targets, 0.3, seed)[1].tolist() for seed in (0, 1))
    assert first != second


def test_apparel_keeps_its_shares(shared: Path) -> None:
    targets = read_apparel(shared / "data/apparel_mini").targets
    _, part = stratified_split(targets, 0.2, 0)
    assert abs(len(part) - 0.2 * len(targets)) <= 3
    assert (abs(targets[part].sum(0) - 0.2 * targets.sum(0)) <= 3).all()
    assert targets[part].any(0).all(), "brown has only 10 photos and must be in both parts"


def test_size_of_coco() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((82_081, 80)) < np.geomspace(0.4, 0.001, 80)).astype(np.int8)
    rest, part = stratified_split(targets, 0.1, 0)
    assert abs(len(part) - 8_208) < 100
    share = targets[part].sum(0) / targets.sum(0)
    assert share.min() > 0.09
    assert share.max() < 0.12
    assert len(rest) + len(part) == 82_081


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction to split off is .*, but must be above 0 and below 1; 0\.1 is usual"):
        stratified_split(np.ones((3, 1), np.int8), fraction, 0)
