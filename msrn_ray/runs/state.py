"""Whether a run is going on: a file that its driver keeps while it lives, and the list of runs that is read from such files; no Ray.

`state.json` says `running` until the driver writes how the run ended: `finished`, `failed` or `interrupted`. While it says `running`, the
driver touches it every few seconds; one that is killed cannot write any more, so a file that says so but is not touched is of a run that
was interrupted.
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

from ..errors import StoppedEarlyError, UserError

State = Literal["running", "finished", "failed", "interrupted", "unknown"]
STATE_FILE = "state.json"
_BEAT_SECONDS = 5.0  # between two touches
_SILENT_SECONDS = 60.0  # without a touch the driver is dead: shared storage may show a touch so much later


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
