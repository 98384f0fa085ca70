"""Sends heartbeats of each rank to the driver, from a thread, so that they arrive while the rank computes or waits."""

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

from ..ray_cluster.connection import this_node
from ..runs.events import Heartbeat

T = TypeVar("T")

WAITING, DONE = "waiting for data", "done"
# Bytes. A new process of Ray on a full disk dies at the first write to its log, and Ray retries forever
_MIN_FREE_BYTES = 32 * 2**20
_HEARTBEAT_SECONDS = 5.0


def heartbeat_seconds(hang_minutes: float) -> float:
    """Return the seconds between two heartbeats: at least six fit into the time after which a rank counts as hung."""
    return min(_HEARTBEAT_SECONDS, hang_minutes * 60 / 6)


class HeartbeatSender:
    """Sends a `Heartbeat` of one rank every few seconds; use as a context.

    Args:
        events: the driver's queue.
        rank: this rank.
        seconds: between two heartbeats.
    """

    def __init__(self, events: Queue, rank: int, seconds: float) -> None:
        node = this_node()
        self._rank, self._node, self._node_id = rank, node["NodeManagerAddress"], node["NodeID"]
        self._events, self._seconds = events, seconds
        context = ray.get_runtime_context()
        self._folder = os.path.join(context.get_temp_dir(), context.get_session_name())  # where Ray writes its logs
        self._state: tuple[int, int, str, float] = (0, 0, "starting", time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> HeartbeatSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Send a last heartbeat: a rank that has ended, well or not, does not hang."""
        self._stop.set()
        self._thread.join()
        self.note(DONE)
        self._send()

    def note(self, activity: str) -> None:
        """Note what the rank begins to do."""
        epoch, step, _, _ = self._state
        self._state = (epoch, step, activity, time.monotonic())

    def watch(self, batches: Iterator[T], epoch: int, activity: str, first_step: int = 1) -> Iterator[T]:
        """Yield the batches; note when the rank waits for one, and its `activity` while it works on one."""
        for step in count(first_step):
            self._state = (epoch, step, WAITING, time.monotonic())
            batch = next(batches, None)
            if batch is None:
                self.note("ending the epoch")
                return
            self.note(activity)
            yield batch

    def _run(self) -> None:
        while True:
            self._send()
            if self._stop.wait(self._seconds):
                return

    def _send(self) -> None:
        epoch, step, activity, since = self._state
        heartbeat = Heartbeat(
            rank=self._rank,
            node=self._node,
            node_id=self._node_id,
            pid=os.getpid(),
            epoch=epoch,
            step=step,
            activity=activity,
            idle_seconds=time.monotonic() - since,
            full_folder=self._folder if _is_full(self._folder) else None,
        )
        put: Any = self._events.actor.put_nowait  # not awaited: a slow driver must not slow the rank
        put.remote(heartbeat)


def _is_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < _MIN_FREE_BYTES
    except OSError:  # the folder is gone, as when Ray stops; that ends the run by other means
        return False
