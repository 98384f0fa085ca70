"""`msrn graph`: the label graph of a data set as text and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .errors import UserError
from .label_graph import LabelCounts, attend_mask, conditional_probability

_SHOWN = 200  # edges listed on the screen


def edges(counts: LabelCounts, tau: float) -> list[tuple[int, int, float]]:
    """(i, j, P(i | j)) for each label i that attends to another label j, strongest first."""
    mask = attend_mask(counts, tau).numpy()
    np.fill_diagonal(mask, False)
    probability = conditional_probability(counts)  # P[r, c] = P(c | r)
    found = [(int(i), int(j), float(probability[j, i])) for i, j in zip(*np.nonzero(mask), strict=True)]
    return sorted(found, key=lambda edge: (-edge[2], edge[0], edge[1]))


def describe_graph(counts: LabelCounts, tau: float) -> Iterator[str]:
    """Lines: each edge with its probability and count, labels without an edge, a warning where there is no edge at all."""
    found = edges(counts, tau)
    yield f"{len(counts.names)} labels, {len(found)} edges at tau {tau} (label <- label it attends to)"
    for i, j, probability in found[:_SHOWN]:
        together, alone = counts.cooccurrence[j, i], counts.count[j]
        first, second = counts.names[i], counts.names[j]
        yield f"  {first} <- {second}  P({first} | {second}) = {probability:.3f}  ({together} of {alone})"
    if len(found) > _SHOWN:
        yield f"  ... and {len(found) - _SHOWN} more"
    linked = {index for i, j, _ in found for index in (i, j)}
    isolated = [name for index, name in enumerate(counts.names) if index not in linked]
    if isolated:
        yield f"{len(isolated)} labels without an edge: {', '.join(isolated)}"
    if not found:
        yield "WARNING: the graph is empty, every label attends to itself alone; lower model.tau"


def draw_graph(counts: LabelCounts, tau: float, path: Path) -> None:
    """Labels on a circle, sized by frequency; an arrow from j to i where i attends to j, darker with P(i | j). Writes a PNG.

    Raises:
        UserError: if the file cannot be written.
    """
    number = len(counts.names)
    side = float(np.clip(number / 5, 7, 20))
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axis = figure.subplots()
    angle = 2 * np.pi * np.arange(number) / number
    place = np.stack([np.cos(angle), np.sin(angle)], 1)
    for i, j, probability in edges(counts, tau):
        axis.annotate(
            "",
            xy=place[i],
            xytext=place[j],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "tab:blue",
                "alpha": 0.25 + 0.75 * probability,
                "connectionstyle": "arc3,rad=0.15",
                "shrinkA": 8,
                "shrinkB": 8,
            },
        )
    share = counts.count / max(1, counts.count.max())
    axis.scatter(
        place[:, 0], place[:, 1], s=30 + 600 * share, color="tab:orange", edgecolors="black", linewidths=0.5, zorder=3
    )
    for name, (x, y), turn in zip(counts.names, place, angle, strict=True):
        upright = np.degrees(turn) if np.cos(turn) >= 0 else np.degrees(turn) + 180
        axis.text(
            1.08 * x,
            1.08 * y,
            name,
            rotation=upright,
            rotation_mode="anchor",
            va="center",
            ha="left" if np.cos(turn) >= 0 else "right",
        )
    axis.set(
        xlim=(-1.5, 1.5),
        ylim=(-1.5, 1.5),
        aspect="equal",
        title=f"label graph, tau {tau}: arrow from j to i where P(i | j) >= tau",
    )
    axis.axis("off")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
