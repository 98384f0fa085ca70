"""What a failed worker means: whether the run ends, what the user reads, and which failures have one cause.

Ray Train's controller imports this module, so it must not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import ray.train
from ray.util.queue import Queue

from ..errors import AccountingError, UserError
from ..runs.events import WorkerFailed

# torch has an error type for some of its out-of-memory errors only
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: .*memory|CUDA error: out of memory", re.IGNORECASE)
_VAGUE_TYPES = (UserError, RuntimeError, ValueError, OSError)  # errors of these types have many causes


class FailureCallback(ray.train.UserCallback):
    """Reports a failed worker, and ends the run at an error that a restart would only repeat.

    Args:
        events: the driver's queue.
    """

    def __init__(self, events: Queue) -> None:
        self._events = events

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise an error that must not be retried, whatever `train.max_failures` allows.

        Ray Train stops at an error of its callbacks, and `plain_errors` unwraps it.
        """
        for error in worker_exceptions.values():
            if is_final(error):
                raise error
        # when one rank is lost the others fail too, and Ray Train may see those first
        rank, error = min(worker_exceptions.items(), key=lambda item: not hasattr(item[1], "health_check_failure"))
        reason = str(getattr(error, "health_check_failure", error)).strip() or type(error).__name__
        event = WorkerFailed(f"worker {rank} failed: {reason.splitlines()[0]}")
        put: Any = self._events.actor.put
        put.remote(event)  # not awaited: Ray Train's own loop calls this


def is_final(error: BaseException | None) -> bool:
    """Return whether a restart would only repeat an error."""
    return isinstance(error, (UserError, AccountingError))


def wrapped_errors(failure: BaseException) -> Iterator[BaseException]:
    """Yield the errors that Ray Train wraps in a TrainingFailedError: its controller's, then each worker's."""
    errors = [getattr(failure, "controller_failure", None), *(getattr(failure, "worker_failures", None) or {}).values()]
    yield from filter(None, errors)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error itself, not one that it wraps, says that a GPU, a node or a process ran out of memory.

    The errors of torch and Ray share a type name.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def describe_failure(error: BaseException) -> tuple[str, str]:
    """Return the kind of a failure (failures of one kind have one cause) and its reason in a line.

    Ray wraps a worker's failure in the run's, and a run's in the trial's. When a worker is lost the others fail too. So the cause is
    memory first, then the lost worker.
    """
    root = min(_root_causes(error), key=lambda cause: (not is_out_of_memory(cause[0]), not cause[1]))[0]
    lines = str(root).strip().splitlines() or [""]
    # a traceback as text ends with the error
    reason = lines[-1] if len(lines) > 1 and lines[-1].strip() else lines[0]
    name = "OutOfMemoryError" if is_out_of_memory(root) else type(root).__name__
    reason = f"{name}: {reason.strip()}"[:500]
    is_vague = type(root) in _VAGUE_TYPES and name == type(root).__name__
    return re.sub(r"\d+", "0", reason) if is_vague else name, reason


def _root_causes(
    error: BaseException, is_lost: bool = False, above: tuple[int, ...] = ()
) -> Iterator[tuple[BaseException, bool]]:
    """Yield the errors that an error wraps and that wrap no other, and whether Ray Train found a worker lost there."""
    health = getattr(error, "health_check_failure", None)
    candidates: list[Any] = [*(getattr(error, "worker_failures", None) or {}).values(), health]
    if not any(isinstance(candidate, BaseException) for candidate in candidates):
        controller = getattr(error, "controller_failure", None)
        candidates = [controller or getattr(error, "cause", None) or error.__cause__]
    inner = [
        candidate for candidate in candidates if isinstance(candidate, BaseException) and id(candidate) not in above
    ]
    for candidate in inner:
        yield from _root_causes(candidate, is_lost or health is not None, (*above, id(error)))
    if not inner:
        yield error, is_lost
