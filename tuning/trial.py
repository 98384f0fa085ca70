"""One trial, in a process of its own on the cluster: a run as `msrn train` does it, that also tells the desk and Tune of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import StoppedEarlyError, UserError
from msrn_ray.resources import Allocation
from msrn_ray.resuming import check_list, listed_metrics
from msrn_ray.trainer import Placed, run_in_folder

from .reports import DeskClient, TrialReports, is_out_of_memory

_SAY_LITTLE = (UserError, RuntimeError, ValueError, OSError)  # errors of these types have many causes


def trial_name(number: int) -> str:
    """The run folder of a trial; the same name again goes on from its last checkpoint."""
    return f"trial_{number:04d}"


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
    folder = Path(config.train.storage) / name
    check_list(folder)
    for metrics in listed_metrics(folder):  # a kill may have come between an epoch's checkpoint and its report
        if desk.record(point["number"], metrics) or metrics["epoch"] == config.train.epochs:
            return
    config = config.with_overrides(point["overrides"] | {"train.run_name": name})
    try:
        run_in_folder(config, placed, allocation, [TrialReports(desk, point["number"], TuneReportCallback())])
    except ray.train.TrainingFailedError as failure:
        if isinstance(getattr(failure, "controller_failure", None), StoppedEarlyError):
            return
        raise


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
