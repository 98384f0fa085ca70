"""The metrics of a run's epochs (metrics.jsonl), the rule for the best epoch, and the curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.files import atomic_write

METRICS_FILE = "metrics.jsonl"


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return plain values as JSON; nan becomes null, since JSON has no nan."""
    plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}
    return json.dumps(plain, indent=indent)


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl, null as nan; no lines if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    complete = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut off the last line
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in complete]


def best_index(scores: Sequence[float]) -> int:
    """Return the index of the largest score, of equal scores the last, as Ray Train keeps it; nan loses to any number."""
    return max(range(len(scores)), key=lambda index: (not math.isnan(scores[index]), scores[index], index))


def draw_curves(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, mAP and F1 by epoch into a PNG; `history` holds the lines of metrics.jsonl, at least one."""
    from matplotlib.figure import Figure  # pyplot would start a window system

    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] for line in history]
    panels = (left, ("train/classification_loss", "val/loss")), (right, ("val/mAP", "val/CF1", "val/OF1"))
    for axis, names in panels:
        for name in names:
            axis.plot(epochs, [line[name] for line in history], marker="o", markersize=3, label=name)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    best = history[best_index([line["val/mAP"] for line in history])]
    split = " on the test split (protocol paper)" if history[-1]["protocol"] == "paper" else ""
    right.axvline(best["epoch"], color="grey", linestyle=":", linewidth=1)
    right.set_title(f"best val/mAP {best['val/mAP']:.4f} at epoch {best['epoch']}{split}")
    left.set_title("classification loss")
    right.set_ylim(0, 1)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")
