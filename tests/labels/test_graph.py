"""Counts, probabilities and the mask against a slow reading, the published counts and the authors' own mask."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msrn_ray.errors import UserError
from msrn_ray.labels import graph as label_graph
from msrn_ray.labels.graph import (
    LabelCounts,
    Provenance,
    attend_mask,
    choose_tau,
    conditional_probability,
    count_labels,
    load_counts,
    save_counts,
)

TARGETS = hnp.arrays(np.int8, st.tuples(st.integers(0, 12), st.integers(1, 6)), elements=st.sampled_from([1, 0, -1]))


@given(TARGETS)
def test_counts_agree_with_a_slow_loop(targets: npt.NDArray[np.int8]) -> None:
    num_classes = targets.shape[1]
    counts = count_labels(targets, [f"label {number}" for number in range(num_classes)])
    pairs = np.zeros((num_classes, num_classes), np.int64)
    single = np.zeros(num_classes, np.int64)
    for row in targets.tolist():
        present = {label for label, value in enumerate(row) if value == 1}
        for label in present:
            single[label] += 1
            for companion in present - {label}:
                pairs[label, companion] += 1
    assert counts.cooccurrence.dtype == counts.count.dtype == np.int64
    np.testing.assert_array_equal(counts.cooccurrence, pairs)
    np.testing.assert_array_equal(counts.count, single)
    probability = conditional_probability(counts)
    assert probability.dtype == np.float64
    assert ((probability >= 0) & (probability <= 1)).all()


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 7, 9])
def test_block_size_does_not_change_counts(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    targets = np.random.default_rng(rows).choice(np.array([1, 0, -1], np.int8), (rows, 5))
    whole = count_labels(targets, "abcde")
    monkeypatch.setattr(label_graph, "_BLOCK_ROWS", 4)
    parts = count_labels(targets, "abcde")
    np.testing.assert_array_equal(parts.cooccurrence, whole.cooccurrence)
    np.testing.assert_array_equal(parts.count, whole.count)


def test_unknown_counts_as_not_present() -> None:
    counts = count_labels(np.array([[1, -1], [1, 1], [-1, -1], [0, 1]], np.int8), ("a", "b"))
    assert counts.names == ("a", "b")
    assert counts.count.tolist() == [2, 2]
    assert counts.cooccurrence.tolist() == [[0, 1], [1, 0]]


def dog_and_leash() -> LabelCounts:
    """Return counts of 10 photos of dogs and 2 of leashes, both with a dog; no photo of a cat."""
    return LabelCounts(("dog", "leash", "cat"), np.array([[0, 2, 0], [2, 0, 0], [0, 0, 0]]), np.array([10, 2, 0]))


def test_probability_divides_by_count_of_the_row() -> None:
    assert conditional_probability(dog_and_leash()).tolist() == [[0, 0.2, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("pairs", "count", "message"),
    [
        ([[0, 3], [3, 0]], [4, 2], r"P\(a \| b\) is 3 / 2, not in \[0, 1\]; take the counts of labels and of pairs"),
        ([[0, 1], [1, 0]], [0, 2], r"P\(b \| a\) is 1 / 0, not in \[0, 1\]"),
        ([[0, -1], [-1, 0]], [4, 2], r"P\(b \| a\) is -1 / 4, not in \[0, 1\]"),
    ],
)
def test_probability_out_of_range_names_the_pair(pairs: list[list[int]], count: list[int], message: str) -> None:
    counts = LabelCounts(("a", "b"), np.array(pairs), np.array(count))
    for use in (
        conditional_probability,
        lambda counts: attend_mask(counts, 0.4),
        lambda counts: choose_tau(counts, "auto", 1),
    ):
        with pytest.raises(UserError, match=message):
            use(counts)


def test_label_attends_to_labels_it_usually_accompanies() -> None:
    # P(dog | leash) = 1, so dog attends to leash; P(leash | dog) = 0.2, so not the other way.
    mask = attend_mask(dog_and_leash(), 0.4)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    assert attend_mask(dog_and_leash(), 0.2)[1, 0], "the threshold itself is enough"


@pytest.mark.parametrize("tau", [0.0, -0.1, 1.01, float("nan")])
def test_tau_out_of_range_is_an_error(tau: float) -> None:
    with pytest.raises(UserError, match=r"tau is .*, but must be above 0 and at most 1"):
        attend_mask(dog_and_leash(), tau)


def test_mask_equals_the_authors(shared: Path) -> None:
    golden = np.load(shared / "golden/msrn_voc.npz")
    counts = load_counts(shared / "word_vectors/cooccurrence_voc.npz")
    np.testing.assert_array_equal(counts.cooccurrence, golden["cooccurrence"])
    np.testing.assert_array_equal(counts.count, golden["counts"])
    np.testing.assert_array_equal(attend_mask(counts, 0.4).numpy(), golden["attend_mask"])
    assert not np.array_equal(golden["attend_mask"], golden["attend_mask"].T), (
        "the golden mask could not tell a transpose"
    )


@pytest.mark.parametrize(("name", "edges", "total"), [("voc", 6, 7_306), ("coco", 111, 241_035)])
def test_published_counts_give_the_known_edges(shared: Path, name: str, edges: int, total: int) -> None:
    counts = load_counts(shared / f"word_vectors/cooccurrence_{name}.npz")
    assert int(attend_mask(counts, 0.4).sum()) - len(counts.names) == edges
    assert int(counts.count.sum()) == total


def file(path: Path, **change: Any) -> Path:
    fields = {
        "names": np.array(["a", "b", "c"]),
        "adj": np.array([[0, 2, 1], [2, 0, 0], [1, 0, 0]]),
        "nums": np.array([4, 3, 1]),
    }
    np.savez(path, **{name: value for name, value in (fields | change).items() if value is not None})
    return path


def test_load_in_the_requested_order(tmp_path: Path) -> None:
    counts = load_counts(file(tmp_path / "counts.npz"), ["c", "a", "b"])
    assert counts.names == ("c", "a", "b")
    assert counts.count.tolist() == [1, 4, 3]
    assert counts.cooccurrence.tolist() == [[0, 1, 0], [1, 0, 2], [0, 2, 0]]


def test_load_takes_whole_floats_and_clears_the_diagonal(tmp_path: Path) -> None:
    adj = np.array([[4.0, 2, 1], [2, 3, 0], [1, 0, 1]])
    counts = load_counts(file(tmp_path / "counts.npz", adj=adj))
    assert counts.cooccurrence.tolist() == [[0, 2, 1], [2, 0, 0], [1, 0, 0]]
    assert counts.cooccurrence.dtype == counts.count.dtype == np.int64


def test_load_names_missing_and_surplus_labels(tmp_path: Path) -> None:
    message = (
        r'counts\.npz: "names" are not the labels .*lacking: d; not in the data set: b, c\); give the counts of this'
    )
    with pytest.raises(UserError, match=message):
        load_counts(file(tmp_path / "counts.npz"), ["a", "d"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nums": None}, r'has no "nums"; give an \.npz file with names, adj, nums'),
        ({"names": np.array(["a", "b", "a"])}, r'"names" must be a list of different texts; correct it'),
        ({"names": np.array([1, 2, 3])}, r'"names" must be a list of different texts'),
        ({"names": np.array(["a", "b", "c"], dtype=object)}, r"not an \.npz file of plain arrays .*; write it with"),
        ({"adj": np.zeros((3, 2), int)}, r'"adj" is \(3, 2\), but must be \(3, 3\) for 3 names; correct it'),
        ({"nums": np.ones(4, int)}, r'"nums" is \(4,\), but must be \(3,\)'),
        ({"adj": np.full((3, 3), 0.5)}, r'"adj" must hold whole numbers of at least 0; give counts, not probabilities'),
        ({"nums": np.array([4, -3, 1])}, r'"nums" must hold whole numbers'),
        ({"nums": np.array([4, np.nan, 1])}, r'"nums" must hold whole numbers'),
        ({"nums": np.array(["4", "3", "1"])}, r'"nums" must hold whole numbers'),
        (
            {"adj": np.array([[0, 2, 1], [1, 0, 0], [1, 0, 0]])},
            r'"adj" is not symmetric \(a, b: 2, the other way 1\); a pair',
        ),
        ({"nums": np.array([4, 1, 1])}, r'"adj" has 2 images with b and a, but "nums" only 1 with b; take both counts'),
        ({"nums": np.array([1, 3, 1])}, r'"adj" has 2 images with a and b, but "nums" only 1 with a'),
    ],
)
def test_load_refuses_damaged_fields(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_counts(file(tmp_path / "counts.npz", **change))
    assert "counts.npz" in str(error.value)


def test_load_refuses_a_missing_or_other_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"counts\.npz: no such file; give an \.npz file with names, adj, nums"):
        load_counts(tmp_path / "counts.npz")
    (tmp_path / "counts.npz").write_text("hello")
    with pytest.raises(UserError, match=r"counts\.npz: not an \.npz file of plain arrays"):
        load_counts(tmp_path / "counts.npz")


# tau ------------------------------------------------------------------------------------------------------------------


def num_edges(counts: LabelCounts, tau: float) -> int:
    return int(attend_mask(counts, tau).sum()) - len(counts.names)


def test_numeric_tau_is_kept() -> None:
    assert choose_tau(dog_and_leash(), 0.4, 7) == 0.4


@pytest.mark.parametrize(("name", "edges"), [("voc", 6), ("coco", 111)])
def test_auto_reproduces_the_mask_of_the_papers_tau(shared: Path, name: str, edges: int) -> None:
    """A target of exactly the mean degree at tau 0.4 gives the same mask; one edge more gives one edge more."""
    counts = load_counts(shared / f"word_vectors/cooccurrence_{name}.npz")
    number = len(counts.names)
    tau = choose_tau(counts, "auto", edges / number)
    assert torch.equal(attend_mask(counts, tau), attend_mask(counts, 0.4))
    more = choose_tau(counts, "auto", (edges + 1) / number)
    assert 0 < more < 0.4 < tau
    assert num_edges(counts, more) == edges + 1


def test_auto_tau_of_the_benchmarks(shared: Path) -> None:
    found = {}
    for name in ("voc", "coco"):
        counts = load_counts(shared / f"word_vectors/cooccurrence_{name}.npz")
        tau = choose_tau(counts, "auto", 1.0)
        found[name] = (round(tau, 4), num_edges(counts, tau))
    assert found == {"voc": (0.2225, 20), "coco": (0.4566, 80)}


@given(TARGETS, st.floats(0.01, 8))
def test_auto_is_the_largest_tau_keeping_the_degree(targets: npt.NDArray[np.int8], degree: float) -> None:
    counts = count_labels(targets, [f"label {number}" for number in range(targets.shape[1])])
    tau = choose_tau(counts, "auto", degree)
    number = len(counts.names)
    probability = conditional_probability(counts)
    possible = int((probability > 0).sum())
    assert 0 < tau <= 1
    if possible == 0:
        assert tau == 1
    elif possible / number < degree:
        assert num_edges(counts, tau) == possible, "all there are"
    else:
        assert num_edges(counts, tau) / number >= degree
        higher = float(np.nextafter(tau, 2))
        assert higher > 1 or num_edges(counts, higher) / number < degree


def test_equal_probabilities_become_edges_together() -> None:
    pairs = np.full((3, 3), 2)
    np.fill_diagonal(pairs, 0)
    counts = LabelCounts(("a", "b", "c"), pairs, np.array([4, 4, 4]))
    assert choose_tau(counts, "auto", 0.1) == 0.5
    assert num_edges(counts, 0.5) == 6


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provenance", [None, Provenance("instances_train2014.json", 12, "ab" * 32)])
def test_saved_counts_load_unchanged(tmp_path: Path, provenance: Provenance | None) -> None:
    counts = LabelCounts(("dog", "leash"), np.array([[0, 2], [2, 0]]), np.array([10, 2]), provenance)
    path = tmp_path / "counts.npz"
    save_counts(path, counts)
    back = load_counts(path, ("leash", "dog"))
    assert back.names == ("leash", "dog")
    assert back.count.tolist() == [2, 10]
    assert back.cooccurrence.tolist() == [[0, 2], [2, 0]]
    assert back.provenance == provenance
    assert list(tmp_path.iterdir()) == [path]
    if provenance is not None:
        assert str(back.provenance) == "12 images of instances_train2014.json (fingerprint abababababab)"


def test_save_replaces_the_file_behind_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "counts.npz", tmp_path / "elsewhere.npz"
    target.touch()
    link.symlink_to(target)
    save_counts(link, dog_and_leash())
    assert link.is_symlink()
    assert load_counts(target).names == dog_and_leash().names


def test_failed_save_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        save_counts(tmp_path, dog_and_leash())


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "counts.npz"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"counts\.npz: cannot be written \(No space left on device\)"):
        save_counts(path, dog_and_leash())
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "old"}


def test_damaged_provenance_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'"source", "images", "fingerprint" must be a text, a whole number and a text'):
        load_counts(file(tmp_path / "a.npz", source="x", images="many", fingerprint="y"))
    with pytest.raises(UserError, match=r'has no "images"'):
        load_counts(file(tmp_path / "b.npz", source="x"))
