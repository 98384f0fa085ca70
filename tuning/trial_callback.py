"""What a trial reports to the study.

A module without torch and Optuna, so that Ray Train's controller, which imports it, starts quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import ray.train

from msrn_ray.errors import StoppedEarlyError
from msrn_ray.ray_train.failures import is_out_of_memory

from .trial_point import TrialPoint


class StudyClient:
    """Calls the study actor from any process of the cluster; plain data, so it travels with a trial."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def next_trial(self) -> TrialPoint | None:
        """See `SearchStudy.next_trial`."""
        return cast("TrialPoint | None", self._call("next_trial"))

    def record(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """See `SearchStudy.record`."""
        return bool(self._call("record", number, metrics))

    def fail(self, number: int, kind: str, reason: str) -> None:
        """See `SearchStudy.fail`."""
        self._call("fail", number, kind, reason)

    def stopped_because(self) -> str | None:
        """See `SearchStudy`."""
        return cast("str | None", ray.get(self._actor.stopped_because.remote()))

    def _call(self, method: str, *arguments: Any) -> Any:
        return ray.get(self._actor.call.remote(method, *arguments))


class TrialCallback(ray.train.UserCallback):
    """Records each epoch in the study, and ends the run where the study stops it, or where a restart would only fail again.

    Ray Train stops at an error of its callbacks and ends its workers in order. Were Tune to stop the trial, it would kill the process
    that drives the run, whose imports the next trial can use, and leave the workers behind.

    Args:
        study_client: of the search's study.
        number: of the trial in the study.
        tune: gets each epoch once the study has it; Tune shows what it gets.
    """

    def __init__(self, study_client: StudyClient, number: int, tune: ray.train.UserCallback) -> None:
        self._study_client = study_client
        self._number = number
        self._tune = tune

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Record a stored checkpoint's metrics: `metrics` has those of each rank, with scores only at the end of an epoch."""
        if "val/mAP" not in metrics[0]:
            return
        stop = self._study_client.record(self._number, metrics[0])
        self._tune.after_report(run_context, metrics, checkpoint)
        if stop:
            raise StoppedEarlyError

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End a run that is out of memory: its point fails again, whatever `train.max_failures` allows."""
        for error in worker_exceptions.values():
            cause = getattr(error, "health_check_failure", error)
            if is_out_of_memory(cause):
                raise cause
