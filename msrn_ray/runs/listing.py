"""Lists the runs in a folder: state, epoch, best score; no Ray."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from ..config import load_config
from ..errors import UserError
from .folder import CONFIG_FILE, FAILURE_FILE
from .history import METRICS_FILE, best_index, read_history
from .state import DEAD_SECONDS, STATE_FILE, State, read_state, touched_at


@dataclass(frozen=True)
class RunSummary:
    """A run as its folder describes it.

    Attributes:
        name: of the folder.
        state: `unknown` if the files do not contain it.
        epoch: finished epochs.
        epochs: epochs of the whole run; 0 if its config cannot be read.
        best: largest val/mAP so far; nan if no epoch has one.
        started: when the run was first started, seconds since 1970; nan if unknown.
        seen: the driver's last heartbeat, seconds since 1970; nan if unknown.
        reason: what stopped the run, or what is wrong with its files; may be empty.
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
    """Return the runs in a folder, the latest heartbeat first.

    Raises:
        UserError: if there is no such folder.
    """
    if not storage.is_dir():
        raise UserError(f"{storage}: no such folder; give the train.storage of the runs")
    runs = [
        summarize(path.parent)
        for path in storage.glob(f"*/{CONFIG_FILE}")
        if not path.parent.name.startswith(".")  # not yet complete, see `make_folder`
    ]
    return sorted(runs, key=lambda run: (math.inf if math.isnan(run.seen) else -run.seen, run.name))


def summarize(folder: Path) -> RunSummary:
    """Return the summary of a run folder, even if some of its files are damaged."""
    epoch, epochs, best, damage = 0, 0, math.nan, ""
    try:
        history = read_history(folder / METRICS_FILE)
        if history:
            scores = [line["val/mAP"] for line in history]
            epoch, best = int(history[-1]["epoch"]), scores[best_index(scores)]
    except (ValueError, KeyError, TypeError, AttributeError):
        damage = f"{METRICS_FILE} is damaged"
    try:
        epochs = load_config(folder / CONFIG_FILE).train.epochs
    except UserError as error:
        damage = str(error)
    content = read_state(folder / STATE_FILE)
    seen = touched_at(folder / STATE_FILE) / 1e9 if content else math.nan
    state: State = content.get("state", "unknown")
    reason = content.get("reason", "")
    if state == "failed" and (folder / FAILURE_FILE).is_file():
        reason = " ".join((folder / FAILURE_FILE).read_text(encoding="utf-8").split())
    if state == "running" and time.time() - seen > DEAD_SECONDS:
        state, reason = "interrupted", "killed, or its machine is lost: no heartbeat"
    return RunSummary(
        folder.name,
        state,
        epoch,
        epochs,
        best,
        content.get("started", math.nan),
        seen,
        damage or reason,
    )


def describe_runs(runs: list[RunSummary], now: float) -> list[str]:
    """Return the runs as lines of a table, headings first; `now` in seconds since 1970."""
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
