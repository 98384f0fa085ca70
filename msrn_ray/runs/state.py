"""Whether a run is running: a file that its driver keeps up to date; and the list of the runs in a folder. No Ray.

`state.json` says `running` until the driver writes how the run ended: `finished`, `failed` or `interrupted`. While the run trains, the
driver touches the file every few seconds: that is its heartbeat. A killed driver cannot write, so a `running` file without heartbeat
belongs to an interrupted run.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import load_config
from ..errors import UserError, is_stopped_early
from ..io.files import write_text
from .folder import CONFIG_FILE, FAILURE_FILE, cannot_be_written
from .history import METRICS_FILE, best_index, read_history

State = Literal["running", "finished", "failed", "interrupted", "unknown"]
STATE_FILE = "state.json"
_HEARTBEAT_SECONDS = 5.0
_DEAD_SECONDS = 60.0  # without a heartbeat the driver counts as dead; shared storage may show a touch this late


@contextmanager
def kept_state(folder: Path, heartbeat_seconds: float = _HEARTBEAT_SECONDS) -> Iterator[None]:
    """Keep `state.json` of a run folder up to date while the block trains, then write how it ended.

    Raises:
        UserError: if it cannot be written at the start.
    """
    path = folder / STATE_FILE
    started = _read_state(path).get("started", time.time())
    content = {"state": "running", "started": started, "host": socket.gethostname(), "pid": os.getpid()}
    try:
        write_text(path, json.dumps(content) + "\n")
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(heartbeat_seconds):
            # the storage may be unavailable for a while; a run that needs it reports that itself
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, name="run-state", daemon=True)
    thread.start()
    ending = {"state": "failed", "reason": ""}
    try:
        yield
        ending = {"state": "finished"}
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            ending = {"state": "interrupted", "reason": "stopped"}
        elif is_stopped_early(error):
            ending = {"state": "finished", "reason": "stopped early"}
        else:
            ending["reason"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # a full disk may have ended the run; it then counts as interrupted
            write_text(path, json.dumps(content | ending) + "\n")


def check_stopped(folder: Path, heartbeat_seconds: float = _HEARTBEAT_SECONDS) -> None:
    """Refuse to resume a run that another driver still trains: two drivers would write into one folder.

    Clocks of machines differ. So unless the driver is known to be gone, this waits a few seconds for its heartbeat.

    Raises:
        UserError: with the process and its machine.
    """
    path = folder / STATE_FILE
    state = _read_state(path)
    if state.get("state") != "running":
        return
    if state["host"] == socket.gethostname() and not _is_alive(state["pid"]):
        return
    wait_seconds = 3 * heartbeat_seconds
    print(
        f"{folder}: a driver on {state['host']} is training this run; waiting {wait_seconds:g} s for its heartbeat",
        flush=True,
    )
    first, end = _touched_at(path), time.monotonic() + wait_seconds
    while time.monotonic() < end:
        if _touched_at(path) != first:
            raise UserError(
                f"{folder}: process {state['pid']} on {state['host']} still trains this run; stop it first, or give another"
                " train.run_name"
            )
        time.sleep(heartbeat_seconds / 10)


def is_complete(folder: Path, epochs: int) -> bool:
    """Return whether a run has finished all its `epochs` and scored its test split, and has a best epoch."""
    summary = summarize(folder)
    return summary.state == "finished" and summary.epoch >= epochs and not math.isnan(summary.best)


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
    # a hidden folder is not yet complete, see `make_folder`
    runs = [summarize(path.parent) for path in storage.glob(f"[!.]*/{CONFIG_FILE}")]
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
    content = _read_state(folder / STATE_FILE)
    seen = _touched_at(folder / STATE_FILE) / 1e9 if content else math.nan
    state: State = content.get("state", "unknown")
    reason = content.get("reason", "")
    if state == "failed" and (folder / FAILURE_FILE).is_file():
        reason = " ".join((folder / FAILURE_FILE).read_text(encoding="utf-8").split())
    if state == "running" and time.time() - seen > _DEAD_SECONDS:
        state, reason = "interrupted", "killed, or its machine is lost: no heartbeat"
    started = content.get("started", math.nan)
    return RunSummary(folder.name, state, epoch, epochs, best, started, seen, damage or reason)


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


def _touched_at(path: Path) -> int:
    """Return when the file was last touched, nanoseconds since 1970; 0 if it is gone. Opens it, because only then NFS asks the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _read_state(path: Path) -> dict[str, Any]:
    """Return the content of a state file; {} if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["pid"] and content["host"] and content["state"] else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # another user's process
    return True
