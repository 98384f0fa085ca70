"""What Ray Train's controller does when a worker fails; a module of its own, so that the controller starts without torch's vision side."""

from __future__ import annotations

from typing import Any

import ray.train
from ray.util.queue import Queue

from .errors import AccountingError, UserError


class Failures(ray.train.UserCallback):
    """Tells the user of a worker that failed, and ends the run at an error that starting again would only repeat.

    Args:
        events: gets a line for each failure.
    """

    def __init__(self, events: Queue) -> None:
        self._events = events

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises what is not to be tried again, whatever `train.max_failures` allows: Ray Train stops at an error of its callbacks, and
        `run_trainer` hands it on."""
        for error in worker_exceptions.values():
            if isinstance(error, (UserError, AccountingError)):
                raise error
        # where a rank is lost the others fail too, and may be seen first
        rank, error = min(worker_exceptions.items(), key=lambda item: not hasattr(item[1], "health_check_failure"))
        reason = str(getattr(error, "health_check_failure", error)).strip() or type(error).__name__
        event = {"kind": "failure", "text": f"worker {rank} failed: {reason.splitlines()[0]}"}
        self._events.actor.put.remote(event)  # type: ignore[attr-defined]  # without waiting: Ray Train's own loop calls this
