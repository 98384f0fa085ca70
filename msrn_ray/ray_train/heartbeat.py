"""What a rank tells while it runs: signs of life to the driver, gauges to Ray's metrics, and what the object store holds."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any, TypeVar

import ray
from ray.util.queue import Queue

T = TypeVar("T")
WAITING, DONE = "waiting for data", "done"


# Bytes: a new process of Ray on a full disk ends when it first writes to its log, and Ray tries again for ever
_LEAST_FREE = 32 * 2**20


def _own_node() -> dict[str, Any]:
    here = ray.get_runtime_context().get_node_id()
    return next(node for node in ray.nodes() if node["NodeID"] == here)


def _is_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LEAST_FREE
    except OSError:  # it is away, as when Ray is stopped; that ends the run by other means
        return False


class Pulse:
    """Sends signs of life of one rank from a thread, so that they come while the rank computes or waits.

    A beat is an event of kind `beat`: rank, node (address), node_id, pid, epoch, step (batches taken of the epoch), doing,
    idle: seconds since the rank last took or finished something, and full: Ray's folder on the node where its disk has no room, else None.

    Args:
        events: the driver's queue.
        rank: this rank.
        seconds: between two beats.
    """

    def __init__(self, events: Queue, rank: int, seconds: float) -> None:
        node = _own_node()
        self._who = {
            "kind": "beat",
            "rank": rank,
            "node": node["NodeManagerAddress"],
            "node_id": node["NodeID"],
            "pid": os.getpid(),
        }
        self._events, self._seconds = events, seconds
        own: Any = ray._private.worker._global_node
        self._folder: str = own.get_session_dir_path()
        self._state: tuple[int, int, str, float] = (0, 0, "starting", time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Says goodbye: a rank that has ended, well or not, does not hang."""
        self._stop.set()
        self._thread.join()
        self.note(DONE)
        self._send()

    def note(self, doing: str) -> None:
        """Notes what the rank begins to do."""
        epoch, step, _, _ = self._state
        self._state = (epoch, step, doing, time.monotonic())

    def watch(self, batches: Iterator[T], epoch: int, doing: str, first_step: int = 1) -> Iterator[T]:
        """The same batches; notes when one is waited for, and that the rank is `doing` its work on it."""
        for step in count(first_step):
            self._state = (epoch, step, WAITING, time.monotonic())
            batch = next(batches, None)
            if batch is None:
                self.note("ending the epoch")
                return
            self.note(doing)
            yield batch

    def _run(self) -> None:
        while True:
            self._send()
            if self._stop.wait(self._seconds):
                return

    def _send(self) -> None:
        epoch, step, doing, since = self._state
        full = self._folder if _is_full(self._folder) else None
        now = {"epoch": epoch, "step": step, "doing": doing, "idle": time.monotonic() - since, "full": full}
        put: Any = self._events.actor.put_nowait  # not awaited: the driver's pace is not the rank's
        put.remote({**self._who, **now})


_BEAT_SECONDS = 5.0  # between two signs of life


def beat_seconds(hang_minutes: float) -> float:
    """How often a rank gives a sign of life: at least six times before it would count as hung."""
    return min(_BEAT_SECONDS, hang_minutes * 60 / 6)
