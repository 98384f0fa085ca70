"""The label graph as text and as a picture."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from msrn_ray.errors import UserError
from msrn_ray.labels.graph import LabelCounts, conditional_probability, count_labels, load_counts
from msrn_ray.labels.graph_plot import _circle_order, describe_graph, draw_graph, edges


def hand_made() -> LabelCounts:
    """Return counts of 100 persons; 10 ties, all on persons; 20 dogs, 12 with a person, 5 with a tie; 3 maps alone."""
    names = ("person", "tie", "dog", "map")
    pairs = np.zeros((4, 4), np.int64)
    for row, column, together in ((0, 1, 10), (0, 2, 12), (1, 2, 5)):
        pairs[row, column] = pairs[column, row] = together
    return LabelCounts(names, pairs, np.array([100, 10, 20, 3], np.int64))


def test_edges_start_at_the_attending_label_sorted() -> None:
    found = edges(hand_made(), 0.4)
    assert found == [
        (0, 1, 1.0),  # P(person | tie) = 10/10: person attends to tie
        (0, 2, 0.6),  # P(person | dog) = 12/20
        (2, 1, 0.5),  # P(dog | tie) = 5/10
    ]
    assert edges(hand_made(), 0.5) == found, "at least tau"
    assert edges(hand_made(), 0.51) == found[:2]
    assert edges(hand_made(), 0.1)[3:] == [(1, 2, 0.25), (2, 0, 0.12), (1, 0, 0.1)]


def test_equal_edges_keep_the_order_of_labels() -> None:
    pairs = np.full((3, 3), 2, np.int64)
    np.fill_diagonal(pairs, 0)
    counts = LabelCounts(("a", "b", "c"), pairs, np.array([4, 4, 4], np.int64))
    assert [edge[:2] for edge in edges(counts, 0.5)] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


def test_description() -> None:
    assert list(describe_graph(hand_made(), 0.4)) == [
        "4 labels, 3 edges at tau 0.4 (label <- label it attends to)",
        "  person <- tie  P(person | tie) = 1.000  (10 of 10)",
        "  person <- dog  P(person | dog) = 0.600  (12 of 20)",
        "  dog <- tie  P(dog | tie) = 0.500  (5 of 10)",
        "1 labels without an edge: map",
    ]


def test_label_that_is_only_attended_to_is_linked() -> None:
    lines = list(describe_graph(hand_made(), 0.9))
    assert lines[2:] == ["2 labels without an edge: dog, map"]


def test_advice_when_no_threshold_adds_edges() -> None:
    apart = count_labels(np.eye(3, dtype=np.int8), ("a", "b", "c"))
    assert list(describe_graph(apart, 0.1))[-1].endswith("no two labels occur together, so no model.tau adds any")


def test_empty_graph_gets_a_warning() -> None:
    alone = LabelCounts(("a", "b"), np.zeros((2, 2), np.int64), np.array([3, 0], np.int64))
    lines = list(describe_graph(alone, 0.4))
    assert lines[0].startswith("2 labels, 0 edges")
    assert lines[1] == "2 labels without an edge: a, b"
    assert lines[2].startswith("WARNING: the graph is empty")
    assert len(lines) == 3
    assert not any("WARNING" in line for line in describe_graph(hand_made(), 0.4))


def test_long_lists_are_cut_with_a_count() -> None:
    number = 16
    pairs = np.full((number, number), 5, np.int64)
    np.fill_diagonal(pairs, 0)
    counts = LabelCounts(tuple(f"l{i}" for i in range(number)), pairs, np.full(number, 5, np.int64))
    lines = list(describe_graph(counts, 0.4))
    assert lines[0].startswith(f"16 labels, {number * (number - 1)} edges")
    assert sum("<-" in line for line in lines[1:]) == 200
    assert lines[-1] == "  ... and 40 more"


@pytest.mark.parametrize(("name", "num_labels", "num_edges"), [("voc", 20, 6), ("coco", 80, 111)])
def test_graphs_of_the_benchmarks(shared: Path, tmp_path: Path, name: str, num_labels: int, num_edges: int) -> None:
    counts = load_counts(shared / f"word_vectors/cooccurrence_{name}.npz")
    found = edges(counts, 0.4)
    assert (len(counts.names), len(found)) == (num_labels, num_edges)
    assert all(found[k][2] >= found[k + 1][2] for k in range(len(found) - 1))
    for i, j, probability in found:
        assert probability == counts.cooccurrence[i, j] / counts.count[j] >= 0.4
    attended = {counts.names[i] for i, _, _ in found}
    assert "person" in attended
    draw_graph(counts, 0.4, tmp_path / "graph.png")
    assert Image.open(tmp_path / "graph.png").format == "PNG"
    assert (tmp_path / "graph.png").stat().st_size > 20_000


class Drawn(NamedTuple):
    """What a picture shows: where each label stands, and arrows (from, to, colour)."""

    place: dict[str, tuple[float, float]]
    area: dict[str, float]
    arrows: list[tuple[tuple[float, float], tuple[float, float], tuple[float, ...]]]


def drawing(counts: LabelCounts, tau: float, path: Path, monkeypatch: pytest.MonkeyPatch) -> Drawn:
    from matplotlib.axes import Axes

    drawn = Drawn({}, {}, [])
    annotate, scatter = Axes.annotate, Axes.scatter

    def note(self: Axes, text: str, **options: Any) -> Any:
        if text:
            drawn.place[text.rpartition(" ")[0]] = options["xy"]
        else:
            drawn.arrows.append((options["xytext"], options["xy"], options["arrowprops"]["color"]))
        return annotate(self, text, **options)

    def spots(self: Axes, x: Any, y: Any, *, s: Any, **options: Any) -> Any:
        drawn.area.update(zip(counts.names, s.tolist(), strict=True))
        return scatter(self, x, y, s=s, **options)

    monkeypatch.setattr(Axes, "annotate", note)
    monkeypatch.setattr(Axes, "scatter", spots)
    draw_graph(counts, tau, path)
    return drawn


def test_arrow_ends_at_the_label_that_attends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawing(hand_made(), 0.9, tmp_path / "graph.png", monkeypatch)
    assert [arrow[:2] for arrow in drawn.arrows] == [(drawn.place["tie"], drawn.place["person"])]


def test_areas_show_frequency_and_colours_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawing(hand_made(), 0.4, tmp_path / "graph.png", monkeypatch)
    person, tie, dog, rare = (drawn.area[name] for name in hand_made().names)
    assert person > dog > tie > rare > 0
    assert (dog - tie) / (person - dog) == pytest.approx(10 / 80), "areas, not radii, grow with the number of images"
    assert len(drawn.arrows) == len({colour for _, _, colour in drawn.arrows}) == 3
    assert drawn.arrows[-1][:2] == (drawn.place["tie"], drawn.place["person"]), "the strongest lies on top"


def test_frequent_pairs_stand_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of two groups alternate in the list, but not on the circle."""
    pairs = np.zeros((8, 8), np.int64)
    for row in range(8):
        for column in range(8):
            pairs[row, column] = (row != column) * (9 if row % 2 == column % 2 else 1)
    counts = LabelCounts(tuple("abcdefgh"), pairs, np.full(8, 20, np.int64))
    drawn = drawing(counts, 0.4, tmp_path / "graph.png", monkeypatch)
    round_the_circle = sorted(counts.names, key=lambda name: np.arctan2(*drawn.place[name][::-1]) % (2 * np.pi))
    sides = [counts.names.index(name) % 2 for name in round_the_circle]
    assert sum(side != following for side, following in zip(sides, sides[1:] + sides[:1], strict=True)) == 2


def test_picture_is_reproducible(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_graph(hand_made(), 0.4, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    counts = LabelCounts(("$\\bad$", "b"), np.zeros((2, 2), np.int64), np.array([3, 1], np.int64))
    draw_graph(counts, 1.0, tmp_path / "graph.png")


def test_picture_of_tiny_graphs(tmp_path: Path) -> None:
    for number in (1, 2):
        counts = LabelCounts(tuple("ab"[:number]), np.zeros((number, number), np.int64), np.zeros(number, np.int64))
        path = tmp_path / f"{number}.anything"
        draw_graph(counts, 0.4, path)
        assert Image.open(path).format == "PNG"


def test_failed_picture_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/graph\.png: cannot be written \(No such file"):
        draw_graph(hand_made(), 0.4, tmp_path / "none" / "graph.png")
    with pytest.raises(UserError, match="cannot be written"):
        draw_graph(hand_made(), 0.4, tmp_path)
    wrong = LabelCounts(("a", "b"), np.array([[0, 3], [3, 0]]), np.array([5, 2]))
    with pytest.raises(UserError, match=r"P\(a \| b\) is 3 / 2, not in \[0, 1\]"):
        draw_graph(wrong, 0.4, tmp_path / "graph.png")
    for tau in (0.0, 1.01, -0.4):
        with pytest.raises(UserError, match=f"tau is {tau}"):
            edges(hand_made(), tau)
    assert list(tmp_path.iterdir()) == []


def test_failed_picture_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "graph.png"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"graph\.png: cannot be written \(No space left on device\)"):
        draw_graph(hand_made(), 0.4, path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {path.name: "old"}


def test_linked_labels_stand_together() -> None:
    """Labels of three groups that are not linked are mixed in the list."""
    group = np.array([0, 1, 2, 0, 1, 0, 1])
    targets = np.eye(3, dtype=np.int8)[:, group].repeat(4, 0)
    order = _circle_order(conditional_probability(count_labels(targets, list("abcdefg"))))
    assert sorted(order.tolist()) == list(range(7))
    assert np.count_nonzero(np.diff(group[order])) == 2
