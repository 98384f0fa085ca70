"""Whether a run is running: a file that its driver keeps up to date; no Ray.

`state.json` says `running` until the driver writes how the run ended: `finished`, `failed` or `interrupted`. While the run trains, the
driver touches the file every few seconds: that is its heartbeat. A killed driver cannot write, so a `running` file without heartbeat
belongs to an interrupted run.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError, is_stopped_early
from ..io.files import atomic_write
from .folder import cannot_be_written

State = Literal["running", "finished", "failed", "interrupted", "unknown"]
STATE_FILE = "state.json"
_HEARTBEAT_SECONDS = 5.0
DEAD_SECONDS = 60.0  # without a heartbeat the driver counts as dead; shared storage may show a touch this late


@contextmanager
def kept_state(folder: Path, heartbeat_seconds: float = _HEARTBEAT_SECONDS) -> Iterator[None]:
    """Keep `state.json` of a run folder up to date while the block trains, then write how it ended.

    Raises:
        UserError: if it cannot be written at the start.
    """
    path = folder / STATE_FILE
    before = read_state(path)
    content = {
        "state": "running",
        "started": before.get("started", time.time()),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    try:
        _write_state(path, content)
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(heartbeat_seconds):
            with suppress(
                OSError
            ):  # the storage may be unavailable for a while; a run that needs it reports that itself
                os.utime(path)

    thread = threading.Thread(target=touch, name="run-state", daemon=True)
    thread.start()
    ending = {"state": "failed", "reason": ""}
    try:
        yield
        ending = {"state": "finished"}
    except (KeyboardInterrupt, SystemExit):
        ending = {"state": "interrupted", "reason": "stopped"}
        raise
    except BaseException as error:
        if is_stopped_early(error):
            ending = {"state": "finished", "reason": "stopped early"}
            raise
        ending["reason"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):  # a full disk may have ended the run; it then counts as interrupted
            _write_state(path, content | ending)


def check_stopped(folder: Path, heartbeat_seconds: float = _HEARTBEAT_SECONDS) -> None:
    """Refuse to resume a run that another driver still trains: two drivers would write into one folder.

    Clocks of machines differ. So unless the driver is known to be gone, this waits a few seconds for its heartbeat.

    Raises:
        UserError: with the process and its machine.
    """
    path = folder / STATE_FILE
    state = read_state(path)
    if state.get("state") != "running":
        return
    if state["host"] == socket.gethostname() and not _is_alive(state["pid"]):
        return
    wait_seconds = 3 * heartbeat_seconds
    print(
        f"{folder}: a driver on {state['host']} is training this run; waiting {wait_seconds:g} s for its heartbeat",
        flush=True,
    )
    first, end = touched_at(path), time.monotonic() + wait_seconds
    while time.monotonic() < end:
        if touched_at(path) != first:
            raise UserError(
                f"{folder}: process {state['pid']} on {state['host']} still trains this run; stop it first, or give another"
                " train.run_name"
            )
        time.sleep(heartbeat_seconds / 10)


def touched_at(path: Path) -> int:
    """Return when the file was last touched, nanoseconds since 1970; 0 if it is gone. Opens it, because only then NFS asks the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return 0


def read_state(path: Path) -> dict[str, Any]:
    """Return the content of a state file; {} if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if content["pid"] and content["host"] and content["state"] else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}


def _write_state(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True
