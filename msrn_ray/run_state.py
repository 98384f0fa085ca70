"""Whether a run is going on: a file that its driver keeps while it lives, and the list of runs that is read from such files; no Ray.

`state.json` says `running` until the driver writes how the run ended: `finished`, `failed` or `interrupted`. While it says `running`, the
driver touches it every few seconds; one that is killed cannot write any more, so a file that says so but is not touched is of a run that
was interrupted.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import load_config
from .errors import StoppedEarlyError, UserError

State = Literal["running", "finished", "failed", "interrupted", "unknown"]
CONFIG_FILE, METRICS_FILE, STATE_FILE = "config.yaml", "metrics.jsonl", "state.json"
FAILURE_FILE = "failure.txt"  # the error that stopped the run, where the user can mend it
_BEAT_SECONDS = 5.0  # between two touches
_SILENT_SECONDS = 60.0  # without a touch the driver is dead: shared storage may show a touch so much later


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


@contextmanager
def kept_state(folder: Path, beat_seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Keeps `state.json` of a run folder true while the block trains, and writes how it ended.

    Raises:
        UserError: if it cannot be written at the start.
    """
    path = folder / STATE_FILE
    before = _read_state(path)
    content = {
        "state": "running",
        "started": before.get("started", time.time()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    try:
        _write_state(path, content)
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(beat_seconds):
            with suppress(OSError):  # storage that is away for a while; a run that needs it says so itself
                os.utime(path)

    thread = threading.Thread(target=beat, name="run-state", daemon=True)
    thread.start()
    ended = {"state": "failed", "reason": ""}
    try:
        yield
        ended = {"state": "finished"}
    except (KeyboardInterrupt, SystemExit):
        ended = {"state": "interrupted", "reason": "stopped"}
        raise
    except BaseException as error:
        if isinstance(getattr(error, "controller_failure", None), StoppedEarlyError):
            ended = {"state": "finished", "reason": "stopped early"}
            raise
        ended["reason"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # a full disk may be what is told of; the run then counts as interrupted
            _write_state(path, content | ended)


def check_stopped(folder: Path, beat_seconds: float = _BEAT_SECONDS) -> None:
    """Refuses to go on with a run that is still going on elsewhere: two drivers would write into one folder.

    Clocks of machines differ, so the file is watched for a touch, a few seconds, unless it is known that the driver is gone.

    Raises:
        UserError: with the process and its machine.
    """
    path = folder / STATE_FILE
    said = _read_state(path)
    if said.get("state") != "running":
        return
    if said["host"] == socket.gethostname() and not _is_alive(said["pid"]):
        return
    print(
        f"{folder} says that it is trained on {said['host']}; looking {3 * beat_seconds:g} s for a sign of life of its driver",
        flush=True,
    )
    first, end = _touched(path), time.monotonic() + 3 * beat_seconds
    while time.monotonic() < end:
        if _touched(path) != first:
            raise UserError(
                f"{folder} is still trained, by process {said['pid']} on {said['host']}; stop that first, or give another train.run_name"
            )
        time.sleep(beat_seconds / 10)


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
    said = _read_state(folder / STATE_FILE)
    seen = _touched(folder / STATE_FILE) / 1e9 if said else math.nan
    state: State = said.get("state", "unknown")
    reason = said.get("reason", "")
    if state == "failed" and (folder / FAILURE_FILE).is_file():
        reason = " ".join((folder / FAILURE_FILE).read_text(encoding="utf-8").split())
    if state == "running" and time.time() - seen > _SILENT_SECONDS:
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


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole, null as nan; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]  # a line cut by a kill ends otherwise
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in whole]


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


def _touched(path: Path) -> int:
    """When the file was touched last, nanoseconds since 1970; opened, since only then NFS asks the server; 0 where it is gone."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def _read_state(path: Path) -> dict[str, Any]:
    """What the file says, {} where there is none or it is not one of these."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["pid"] and content["host"] and content["state"] else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _write_state(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
