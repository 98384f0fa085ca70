"""What Ray Train's controller does when a worker fails; a module of its own, so that the controller starts without torch's vision side."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import ray.train
from ray.util.queue import Queue

from ..errors import AccountingError, UserError


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


# torch has a type for some of them only
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: .*memory|CUDA error: out of memory", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, not what it wraps, is one of the memory of a GPU, a node or a process. Those of torch and of Ray are known by the
    name that they share."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


_SAY_LITTLE = (UserError, RuntimeError, ValueError, OSError)  # errors of these types have many causes


def describe_failure(error: BaseException) -> tuple[str, str]:
    """Kind of a failure (failures of one kind have one cause) and its reason in a line.

    A failure comes wrapped in Ray's errors: of a worker in that of its run, of a run in that of its trial. Where a worker is lost the
    others fail too: the loss is the cause, and memory before all.
    """
    root = min(_roots(error), key=lambda cause: (not is_out_of_memory(cause[0]), not cause[1]))[0]
    lines = str(root).strip().splitlines() or [""]
    # a traceback as text ends with what was raised
    reason = lines[-1] if len(lines) > 1 and lines[-1].strip() else lines[0]
    name = "OutOfMemoryError" if is_out_of_memory(root) else type(root).__name__
    reason = f"{name}: {reason.strip()}"[:500]
    says_little = type(root) in _SAY_LITTLE and name == type(root).__name__
    return re.sub(r"\d+", "0", reason) if says_little else name, reason


def _roots(
    error: BaseException, lost: bool = False, above: tuple[int, ...] = ()
) -> Iterator[tuple[BaseException, bool]]:
    """The errors that an error wraps and that wrap no other, and whether Ray Train found a worker gone there."""
    gone = getattr(error, "health_check_failure", None)
    found = [*(getattr(error, "worker_failures", None) or {}).values(), gone]
    if not any(isinstance(one, BaseException) for one in found):
        found = [getattr(error, "controller_failure", None) or getattr(error, "cause", None) or error.__cause__]
    inner = [one for one in found if isinstance(one, BaseException) and id(one) not in above]
    for one in inner:
        yield from _roots(one, lost or gone is not None, (*above, id(error)))
    if not inner:
        yield error, lost
