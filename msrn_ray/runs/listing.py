"""Lists the runs of a folder: state, epoch, best score; no Ray."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from ..config import load_config
from ..errors import UserError
from .folder import CONFIG_FILE, FAILURE_FILE
from .history import METRICS_FILE, read_history
from .state import DEAD_SECONDS, STATE_FILE, State, read_state, touched_at


@dataclass(frozen=True)
class RunSummary:
    """What a run folder says of its run.

    Attributes:
        name: of the folder.
        state: `unknown` where the files do not say.
        epoch: finished epochs.
        epochs: epochs of the whole run; 0 where its config cannot be read.
        best: largest val/mAP so far; nan where none is known.
        started: when it was started first, seconds since 1970; nan where that is not known.
        seen: the driver's last sign of life, alike.
        reason: what stopped it, or what is wrong with its files; may be empty.
    """

    name: str
    state: State
    epoch: int
    epochs: int
    best: float
    started: float
    seen: float
    reason: str


def list_runs(storage: Path) -> list[RunSummary]:
    """The runs in a folder, the one seen last first.

    Raises:
        UserError: if there is no such folder.
    """
    if not storage.is_dir():
        raise UserError(f"{storage}: no folder; give the train.storage of the runs")
    runs = [
        summarize(path.parent)
        for path in storage.glob(f"*/{CONFIG_FILE}")
        if not path.parent.name.startswith(".")  # made half-way, see `trainer`
    ]
    return sorted(runs, key=lambda run: (-run.seen if run.seen == run.seen else math.inf, run.name))


def summarize(folder: Path) -> RunSummary:
    """What the files of a run folder say, damaged ones included."""
    epochs, wrong = 0, ""
    try:
        history = read_history(folder / METRICS_FILE)
        scores = [line["val/mAP"] for line in history if not math.isnan(line["val/mAP"])]
        last = int(history[-1]["epoch"]) if history else 0
    except (ValueError, KeyError, TypeError, AttributeError):
        scores, last, wrong = [], 0, f"{METRICS_FILE} is damaged"
    try:
        epochs = load_config(folder / CONFIG_FILE).train.epochs
    except UserError as error:
        wrong = str(error)
    said = read_state(folder / STATE_FILE)
    seen = touched_at(folder / STATE_FILE) / 1e9 if said else math.nan
    state: State = said.get("state", "unknown")
    reason = said.get("reason", "")
    if state == "failed" and (folder / FAILURE_FILE).is_file():
        reason = " ".join((folder / FAILURE_FILE).read_text(encoding="utf-8").split())
    if state == "running" and time.time() - seen > DEAD_SECONDS:
        state, reason = "interrupted", "killed, or its machine is lost: no sign of life"
    return RunSummary(
        folder.name,
        state,
        last,
        epochs,
        max(scores, default=math.nan),
        said.get("started", math.nan),
        seen,
        wrong or reason,
    )


def describe_runs(runs: list[RunSummary], now: float) -> list[str]:
    """The runs as lines of a table, headings first; `now` in seconds since 1970."""
    rows = [("run", "state", "epoch", "best val mAP", "started", "last seen", "")]
    for run in runs:
        best = "-" if math.isnan(run.best) else f"{run.best:.4f}"
        epochs = f"{run.epoch}/{run.epochs or '?'}"
        rows.append((run.name, run.state, epochs, best, _ago(now - run.started), _ago(now - run.seen), run.reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _ago(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
