"""One trial, in a process of its own on the cluster: a run as `msrn train` does it, that also tells the desk and Tune of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import StoppedEarlyError
from msrn_ray.resources import Allocation
from msrn_ray.resuming import check_list
from msrn_ray.trainer import Placed, run_in_folder

from .desk import DeskClient

OUT_OF_MEMORY = (torch.OutOfMemoryError, ray.exceptions.OutOfMemoryError, MemoryError)  # of a GPU, a node, a process


def trial_name(number: int) -> str:
    """The run folder of a trial; the same name again goes on from its last checkpoint."""
    return f"trial_{number:04d}"


class TrialReports(ray.train.UserCallback):
    """Tells the desk of each epoch, and ends the run where the desk says so, or where it would only fail again.

    Ray Train stops at an error of its callbacks and ends its workers in order. Were Tune to stop the trial, it would kill the process
    that drives the run, whose imports the next trial can use, and leave the workers to be found by others.
    """

    def __init__(self, desk: DeskClient, number: int) -> None:
        self._desk = desk
        self._number = number

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """An epoch's checkpoint is stored; `metrics` has those of each rank."""
        if self._desk.record(self._number, metrics[0]):
            raise StoppedEarlyError

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """A point that needs more memory than there is does so again, whatever `train.max_failures` allows."""
        for error in worker_exceptions.values():
            cause = getattr(error, "health_check_failure", error)
            if isinstance(cause, OUT_OF_MEMORY):
                raise cause


def run_trial(
    point: Mapping[str, Any],
    config: ExperimentConfig,
    placed: Placed,
    allocation: Allocation,
    desk: DeskClient,
) -> None:
    """Trains, and reports each epoch to the desk and to Tune; a trial that was killed goes on from its last checkpoint.

    Args:
        point: `number` of the trial and its config `overrides`.
        config: what every trial starts from; `train.storage` holds the trials' run folders.
        placed: the data of all trials.
        allocation: of one trial.
        desk: decides whether it is stopped early.
    """
    name = trial_name(point["number"])
    check_list(Path(config.train.storage) / name)
    config = config.with_overrides(point["overrides"] | {"train.run_name": name})
    try:
        _, result = run_in_folder(
            config, placed, allocation, [TuneReportCallback(), TrialReports(desk, point["number"])]
        )
    except ray.train.TrainingFailedError as failure:
        if isinstance(getattr(failure, "controller_failure", None), StoppedEarlyError):
            return
        raise
    # a kill may have come after the last checkpoint and before its report; one that is known already changes nothing
    for _, metrics in result.best_checkpoints or []:
        desk.record(point["number"], metrics)


def describe_failure(error: BaseException) -> tuple[str, str]:
    """Kind of a failure (failures of one kind have one cause) and its reason in a line.

    A failure comes wrapped in Ray's errors: of a worker in that of its run, of a run in that of its trial.
    """
    causes = list(_causes(error))
    root = causes[-1]
    for cause in causes:
        if isinstance(cause, OUT_OF_MEMORY):
            root = cause
    lines = str(root).strip().splitlines() or [""]
    # a traceback as text ends with what was raised
    reason = lines[-1] if len(lines) > 1 and lines[-1].strip() else lines[0]
    return type(root).__name__, f"{type(root).__name__}: {reason.strip()}"[:500]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        workers = getattr(current, "worker_failures", None) or {}
        wrapped = [*workers.values(), getattr(current, "controller_failure", None), getattr(current, "cause", None)]
        inner = next(filter(None, wrapped), current.__cause__)
        current = inner if isinstance(inner, BaseException) else None
