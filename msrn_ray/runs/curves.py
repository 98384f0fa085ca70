"""Plots loss and scores by epoch as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..io.files import atomic_write
from .history import best_index


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, mAP and F1 by epoch into a PNG; `history` holds the lines of metrics.jsonl, at least one."""
    from matplotlib.figure import Figure  # pyplot would start a window system

    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    for name, axis in (
        ("train/classification_loss", left),
        ("val/loss", left),
        ("val/mAP", right),
        ("val/CF1", right),
        ("val/OF1", right),
    ):
        axis.plot(epochs, [line[name] for line in history], marker="o", markersize=3, label=name)
    best = history[best_index([line["val/mAP"] for line in history])]
    split = " on the test split (protocol paper)" if history[-1]["protocol"] == "paper" else ""
    right.axvline(best["epoch"], color="grey", linestyle=":", linewidth=1)
    right.set_title(f"best val/mAP {best['val/mAP']:.4f} at epoch {best['epoch']}{split}")
    left.set_title("classification loss")
    right.set_ylim(0, 1)
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")
