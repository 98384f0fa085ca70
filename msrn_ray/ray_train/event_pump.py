"""Pumps the events of a run from Ray's queue to the run's log and the watchdog, in a thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.queue import Queue

from ..errors import UserError
from ..runs.events import Event, Heartbeat, WorkerFailed, WorkersStarted
from ..runs.log import RunLog
from .watchdog import Watchdog

_POLL_SECONDS = 0.25
_BATCH = 64  # events taken at once


@contextmanager
def event_pump(events: Queue, log: RunLog, watchdog: Watchdog) -> Iterator[None]:
    """Pass events to the log and heartbeats to the watchdog until the block ends and the queue is empty.

    Raises:
        UserError: when the block ends, if the log could not be written.
    """
    stop = threading.Event()
    failures: list[Exception] = []

    def pump() -> None:
        try:
            while True:
                is_last_round = stop.is_set()
                for event in events.get_nowait_batch(min(events.qsize(), _BATCH)):
                    handle(event)
                if events.empty():  # a heartbeat may still wait behind a slow write
                    watchdog.check()
                    if is_last_round:
                        return
                stop.wait(_POLL_SECONDS)
        except Exception as error:  # of any kind: the main thread raises it again
            failures.append(error)

    def handle(event: Event) -> None:
        match event:
            case Heartbeat():
                watchdog.receive(event)
                return
            case WorkersStarted():
                watchdog.reset()
            case WorkerFailed():
                watchdog.forget_workers()
        if failures:
            return
        try:
            log.handle(event)
        except Exception as error:  # raised again when the training ends; the watchdog works until then
            failures.append(error)
            print(f"{log.folder}: logging stops here ({error}); the training continues", file=sys.stderr, flush=True)

    thread = threading.Thread(target=pump, name="event-pump", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        try:
            log.close()
        except OSError as error:  # a full disk stops the log before it stops the training
            failures.append(error)
    if failures:
        first = failures[0]
        if isinstance(first, OSError):
            raise UserError(
                f"{log.folder}: cannot be written ({first.strerror}); the checkpoints are whole. Free some space, then resume"
            ) from first
        raise first
