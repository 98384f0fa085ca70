"""The label graph as text and as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msrn_ray.errors import UserError
from msrn_ray.graph_report import describe_graph, draw_graph, edges
from msrn_ray.label_graph import LabelCounts, load_counts


def hand_made() -> LabelCounts:
    """100 persons, 10 ties, all of them on persons; 20 dogs, 12 with a person, 5 with a tie; 3 maps alone."""
    names = ("person", "tie", "dog", "map")
    pairs = np.zeros((4, 4), np.int64)
    for row, column, together in ((0, 1, 10), (0, 2, 12), (1, 2, 5)):
        pairs[row, column] = pairs[column, row] = together
    return LabelCounts(names, pairs, np.array([100, 10, 20, 3], np.int64))


def test_edges_go_from_the_label_that_attends_and_are_sorted() -> None:
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


def test_a_label_that_is_only_attended_to_has_an_edge() -> None:
    lines = list(describe_graph(hand_made(), 0.9))
    assert lines[2:] == ["2 labels without an edge: dog, map"]


def test_an_empty_graph_is_warned_of() -> None:
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
def test_the_graphs_of_the_benchmarks(shared: Path, tmp_path: Path, name: str, num_labels: int, num_edges: int) -> None:
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


def test_the_arrow_ends_at_the_label_that_attends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn = []

    def note(self: Axes, text: str, *, xy: np.ndarray, xytext: np.ndarray, arrowprops: dict[str, object]) -> None:
        drawn.append((tuple(xytext.round(6).tolist()), tuple(xy.round(6).tolist()), arrowprops["arrowstyle"]))

    monkeypatch.setattr(Axes, "annotate", note)
    draw_graph(hand_made(), 0.9, tmp_path / "graph.png")
    person, tie = (1.0, 0.0), (0.0, 1.0)  # the first and second of four places on the circle
    assert drawn == [(tie, person, "-|>")]


def test_a_picture_whatever_the_graph(tmp_path: Path) -> None:
    for number in (1, 2):
        counts = LabelCounts(tuple("ab"[:number]), np.zeros((number, number), np.int64), np.zeros(number, np.int64))
        path = tmp_path / f"{number}.anything"
        draw_graph(counts, 0.4, path)
        assert Image.open(path).format == "PNG"


def test_a_picture_that_cannot_be_written_and_a_bad_tau(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/graph\.png: cannot be written \(No such file"):
        draw_graph(hand_made(), 0.4, tmp_path / "none" / "graph.png")
    with pytest.raises(UserError, match="cannot be written"):
        draw_graph(hand_made(), 0.4, tmp_path)
    for tau in (0.0, 1.01, -0.4):
        with pytest.raises(UserError, match=f"tau is {tau}"):
            edges(hand_made(), tau)
    assert list(tmp_path.iterdir()) == []
