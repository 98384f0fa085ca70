"""What a trial tells the study of itself; a module of its own, so that Ray Train's controller starts without torch and Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray.train

from msrn_ray.errors import StoppedEarlyError
from msrn_ray.ray_train.failures import is_out_of_memory


class DeskClient:
    """Calls a desk from any process of the cluster; plain data, so it travels with a trial."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def next_trial(self) -> tuple[int, dict[str, Any]] | None:
        """See `Desk`."""
        drawn: tuple[int, dict[str, Any]] | None = self._ask(self._actor.next_trial)
        return drawn

    def record(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """See `Desk`."""
        return bool(self._ask(self._actor.record, number, metrics))

    def fail(self, number: int, kind: str, reason: str) -> None:
        """See `Desk`."""
        self._ask(self._actor.fail, number, kind, reason)

    def stopped_because(self) -> str | None:
        """See `Desk`."""
        reason: str | None = self._ask(self._actor.stopped_because)
        return reason

    @staticmethod
    def _ask(method: Any, *arguments: Any) -> Any:
        return ray.get(method.remote(*arguments))


class TrialReports(ray.train.UserCallback):
    """Tells the desk of each epoch, and ends the run where the desk says so, or where it would only fail again.

    Ray Train stops at an error of its callbacks and ends its workers in order. Were Tune to stop the trial, it would kill the process
    that drives the run, whose imports the next trial can use, and leave the workers to be found by others.

    Args:
        desk, number: of the study, and of the trial in it.
        tune: gets each epoch once the study has it; what Tune is told is shown.
    """

    def __init__(self, desk: DeskClient, number: int, tune: ray.train.UserCallback) -> None:
        self._desk = desk
        self._number = number
        self._tune = tune

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """A checkpoint is stored; `metrics` has those of each rank, with scores at the end of an epoch."""
        if "val/mAP" not in metrics[0]:
            return
        stop = self._desk.record(self._number, metrics[0])
        self._tune.after_report(run_context, metrics, checkpoint)
        if stop:
            raise StoppedEarlyError

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """A point that needs more memory than there is does so again, whatever `train.max_failures` allows."""
        for error in worker_exceptions.values():
            cause = getattr(error, "health_check_failure", error)
            if is_out_of_memory(cause):
                raise cause
