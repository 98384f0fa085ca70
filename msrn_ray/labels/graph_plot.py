"""The label graph of a data set as text and as a picture, for `msrn graph` and the doctor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..io.files import write_output
from .graph import LabelCounts, attend_mask, conditional_probability, how_to_add_edges

Edge = tuple[int, int, float]  # i, j, P(i | j): label i attends to label j
_Numbers: TypeAlias = npt.NDArray[np.float64]
_MAX_LINES = 200  # edges listed on the screen


def edges(counts: LabelCounts, tau: float) -> list[Edge]:
    """Return (i, j, P(i | j)) for each label i that attends to another label j, largest probability first."""
    mask = attend_mask(counts, tau).numpy()
    np.fill_diagonal(mask, False)
    probability = conditional_probability(counts)  # P[r, c] = P(c | r)
    found = [(int(i), int(j), float(probability[j, i])) for i, j in zip(*np.nonzero(mask), strict=True)]
    return sorted(found, key=lambda edge: (-edge[2], edge[0], edge[1]))


def describe_graph(counts: LabelCounts, tau: float) -> Iterator[str]:
    """Yield lines: each edge with its probability and count, the labels without an edge, a warning if there is no edge."""
    found = edges(counts, tau)
    yield f"{len(counts.names)} labels, {len(found)} edges at tau {tau:.4g} (label <- label it attends to)"
    for i, j, probability in found[:_MAX_LINES]:
        together, alone = counts.cooccurrence[j, i], counts.count[j]
        first, second = counts.names[i], counts.names[j]
        yield f"  {first} <- {second}  P({first} | {second}) = {probability:.3f}  ({together} of {alone})"
    if len(found) > _MAX_LINES:
        yield f"  ... and {len(found) - _MAX_LINES} more"
    linked = {index for i, j, _ in found for index in (i, j)}
    isolated = [name for index, name in enumerate(counts.names) if index not in linked]
    if isolated:
        yield f"{len(isolated)} labels without an edge: {', '.join(isolated)}"
    if not found:
        yield f"WARNING: the graph is empty, every label attends only to itself; {how_to_add_edges(counts)}"


def draw_graph(counts: LabelCounts, tau: float, target: Path | BinaryIO) -> None:
    """Write a PNG: labels on a circle, and an arrow from j to i where i attends to j.

    A label's area grows with its frequency, an arrow's colour and width with P(i | j). Linked labels stand side by side, so that most
    arrows are short. Labels without an edge are grey.

    Raises:
        UserError: if the file cannot be written, or a probability is not in [0, 1].
    """
    num_labels = len(counts.names)
    found = edges(counts, tau)
    side = float(np.clip(num_labels / 5.5, 7, 24))
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    axis = figure.subplots()
    angle = np.empty(num_labels)
    angle[_circle_order(conditional_probability(counts))] = 2 * np.pi * np.arange(num_labels) / num_labels
    colour = ScalarMappable(Normalize(0, 1), "viridis_r")
    share = counts.count / max(1, counts.count.max())
    area = 12 + 900 * share * min(1, 30 / num_labels)
    place = np.stack([np.cos(angle), np.sin(angle)], 1)
    _draw_arrows(axis, found, place, area, colour)
    _draw_labels(axis, counts, found, place, area)
    axis.set(xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
    axis.set_title(
        f"{len(found)} edges at tau {tau:.4g}: an arrow goes from j to i, which attends to it, where P(i | j) >= tau\n"
        "area and number: images with the label; grey: no edge"
    )
    axis.axis("off")
    figure.colorbar(colour, ax=axis, label="P(i | j)", shrink=0.4, pad=0.01)
    output = write_output(target) if isinstance(target, Path) else nullcontext(target)
    with output as file:
        figure.savefig(file, format="png")


def _draw_arrows(axis: Axes, found: list[Edge], place: _Numbers, area: _Numbers, colour: ScalarMappable) -> None:
    """Draw the edges; place: [C, 2] points of the unit circle, area: [C] square points."""
    radius = _radius(area)
    tints = colour.to_rgba(np.array([probability for _, _, probability in found]))
    for (i, j, probability), tint in zip(reversed(found), reversed(tints), strict=True):  # the strongest last, on top
        axis.annotate(
            "",
            xy=tuple(place[i]),
            xytext=tuple(place[j]),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.25,head_length=0.5",
                "color": tuple(tint),
                "linewidth": 0.6 + 2 * probability,
                "connectionstyle": f"arc3,rad={_bend(place[j], place[i]):.3f}",
                "shrinkA": radius[j] + 1,
                "shrinkB": radius[i] + 1,
            },
        )


def _draw_labels(axis: Axes, counts: LabelCounts, found: list[Edge], place: _Numbers, area: _Numbers) -> None:
    """Draw the labels as discs, with name and count outside the circle; place and area as in `_draw_arrows`."""
    radius = _radius(area)
    linked = np.zeros(len(place), bool)
    linked[[index for i, j, _ in found for index in (i, j)]] = True
    colours = np.where(linked, "tab:orange", "lightgrey")
    axis.scatter(place[:, 0], place[:, 1], s=area, c=colours, edgecolors="black", linewidths=0.5, zorder=3)
    for index, (name, (x, y)) in enumerate(zip(counts.names, place, strict=True)):
        right = x >= 0
        axis.annotate(
            f"{name} {counts.count[index]:,}",
            xy=tuple(place[index]),
            xytext=tuple(place[index] * (radius[index] + 6)),
            textcoords="offset points",
            rotation=np.degrees(np.arctan2(y, x)) + (0 if right else 180),
            rotation_mode="anchor",
            va="center",
            ha="left" if right else "right",
            color="black" if linked[index] else "dimgrey",
            parse_math=False,
        )


def _radius(area: _Numbers) -> _Numbers:
    """Return the radius of a marker of this area as matplotlib draws it, points."""
    return np.sqrt(area) / 2


def _bend(start: _Numbers, end: _Numbers) -> float:
    """Return how far an arrow bends towards the middle of the circle: short arrows bend most, to pass the labels between."""
    along, middle = end - start, start + end
    is_left = along[0] * middle[1] - along[1] * middle[0] >= 0  # whether the middle lies left of the arrow
    side = 1 if is_left else -0.85  # two sizes, so that the arrows of a pair of edges do not overlap
    return side * (0.05 + 0.25 * (2 - float(np.hypot(*along))))


def _circle_order(probability: _Numbers) -> npt.NDArray[np.int64]:
    """Return [C] labels in an order that places labels which often occur together side by side; probability: [C, C], P."""
    near = probability + probability.T
    linked = (near > 0) | np.eye(len(near), dtype=bool)
    while not np.array_equal(linked, further := linked @ linked):
        linked = further
    representative = linked.argmax(1)  # the first label that a label is linked with, directly or through other labels
    groups = [np.flatnonzero(representative == label) for label in np.unique(representative)]
    return np.concatenate([group[_row_order(near[np.ix_(group, group)])] for group in groups])


def _row_order(near: _Numbers) -> npt.NDArray[np.int64]:
    """Return the order of labels that are all linked; near: [n, n], symmetric.

    Source: Atkins, Boman, Hendrickson, "A Spectral Algorithm for Seriation" (1998), on the normalised Laplacian, so that a label
    which occurs with all others does not dominate.
    """
    scale = 1 / np.sqrt(near.sum(1) + 1e-9)
    _, modes = np.linalg.eigh(np.eye(len(near)) - scale[:, None] * near * scale)
    slow = modes[:, min(1, len(near) - 1)] * scale
    slow = slow * np.sign(slow[np.abs(slow).argmax()])  # the sign of an eigenvector is arbitrary
    return np.argsort(-slow.round(9), kind="stable")
