"""The stratified split: a reproducible partition in which every label keeps its share."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msrn_ray.datasets.apparel import read_apparel
from msrn_ray.datasets.stratify import stratified_split
from msrn_ray.errors import UserError
from msrn_ray.io.storage import Location

TARGETS = hnp.arrays(np.int8, st.tuples(st.integers(0, 40), st.integers(1, 6)), elements=st.sampled_from([1, 0, 0, -1]))
FRACTIONS = st.floats(0.01, 0.99)


@given(TARGETS, FRACTIONS, st.integers(0, 2**31))
def test_split_is_a_reproducible_partition(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> None:
    rest, part = stratified_split(targets, fraction, seed)
    for rows in (rest, part):
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
    assert sorted([*rest.tolist(), *part.tolist()]) == list(range(len(targets)))
    again = stratified_split(targets, fraction, seed)
    np.testing.assert_array_equal(rest, again[0])
    np.testing.assert_array_equal(part, again[1])


@given(TARGETS, FRACTIONS, st.integers(0, 9))
def test_the_part_has_the_requested_size(targets: npt.NDArray[np.int8], fraction: float, seed: int) -> None:
    _, part = stratified_split(targets, fraction, seed)
    assert len(part) == round(fraction * len(targets))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.sampled_from([0.1, 0.25, 0.5, 0.75]))
def test_single_labels_are_split_in_proportion(tens: list[int], fraction: float) -> None:
    # one label per image, a multiple of 20 images per label: every share is a whole number, so it must be met exactly
    sizes = [20 * ten for ten in tens]
    targets = np.eye(6, dtype=np.int8)[np.repeat(np.arange(len(sizes)), sizes)]
    _, part = stratified_split(targets, fraction, 0)
    np.testing.assert_array_equal(targets[part].sum(0)[: len(sizes)], [fraction * size for size in sizes])


def test_unknown_labels_do_not_count() -> None:
    targets = np.zeros((40, 1), np.int8)
    targets[:4], targets[4:] = 1, -1
    _, part = stratified_split(targets, 0.5, 3)
    assert (targets[part] == 1).sum() == 2
    assert len(part) == 20


def test_seeds_give_different_splits() -> None:
    targets = np.zeros((100, 2), np.int8)
    targets[::3] = 1
    first, second = (stratified_split(targets, 0.3, seed)[1].tolist() for seed in (0, 1))
    assert first != second


def test_apparel_labels_keep_their_shares(shared: Path) -> None:
    targets = read_apparel(Location.of(shared / "data/apparel_mini")).targets
    _, part = stratified_split(targets, 0.2, 0)
    assert len(part) == round(0.2 * len(targets))
    assert (abs(targets[part].sum(0) - 0.2 * targets.sum(0)) <= 3).all()
    assert targets[part].any(0).all(), "brown has only 10 photos and must be in both parts"


def test_shares_hold_at_the_size_of_coco() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((82_081, 80)) < np.geomspace(0.4, 0.001, 80)).astype(np.int8)
    rest, part = stratified_split(targets, 0.1, 0)
    assert len(part) == 8_208
    share = targets[part].sum(0) / targets.sum(0)
    assert share.min() > 0.09
    assert share.max() < 0.12
    assert len(rest) + len(part) == 82_081


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction to split off is .*, but must be above 0 and below 1; 0\.1 is usual"):
        stratified_split(np.ones((3, 1), np.int8), fraction, 0)
