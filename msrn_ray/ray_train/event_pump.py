"""What workers tell of a run while it goes on, from Ray's queue to the run's log and the watchdog."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.util.queue import Queue

from ..errors import UserError
from ..runs.log import RunLog
from .watchdog import Watchdog


@contextmanager
def listening(events: Queue, log: RunLog, watchdog: Watchdog) -> Iterator[None]:
    """Hands events to the log, and signs of life to the watchdog, from a thread until the block ends and the queue is empty."""
    stop = threading.Event()
    failure: list[Exception] = []

    def pump() -> None:
        try:
            while True:
                last = stop.is_set()
                for event in events.get_nowait_batch(min(events.qsize(), 64)):
                    if event["kind"] == "start":
                        watchdog.restart()
                    if event["kind"] == "failure":
                        watchdog.forget()
                    if event["kind"] == "beat":
                        watchdog.hear(event)
                    elif not failure:
                        write(event)
                if events.empty():  # else a beat may wait behind a write that took long
                    watchdog.look()
                    if last:
                        return
                stop.wait(0.25)
        except Exception as error:  # whatever it is, it is raised again in the main thread
            failure.append(error)

    def write(event: dict[str, Any]) -> None:
        try:
            log.handle(event)
        except Exception as error:  # raised again when the training ends; the watchdog goes on until then
            failure.append(error)
            print(f"{log.folder}: the log stops here ({error}); the training goes on", file=sys.stderr, flush=True)

    thread = threading.Thread(target=pump, name="run-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        try:
            log.close()
        except OSError as error:  # a full disk stops the log before it stops the training
            failure.append(error)
    if failure:
        first = failure[0]
        if isinstance(first, OSError):
            raise UserError(f"{log.folder}: cannot be written ({first.strerror}); the checkpoints are whole") from first
        raise first
