"""One trial, in a process of its own on the cluster: a run as `msrn train` does it, that also tells the desk and Tune of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import StoppedEarlyError
from msrn_ray.ray_cluster.allocation import Allocation
from msrn_ray.ray_train.driver import run_in_folder
from msrn_ray.ray_train.torch_trainer import StoredInputs
from msrn_ray.runs.resume import check_list, listed_metrics

from .trial_callback import DeskClient, TrialReports


def trial_name(number: int) -> str:
    """The run folder of a trial; the same name again goes on from its last checkpoint."""
    return f"trial_{number:04d}"


def run_trial(
    point: Mapping[str, Any],
    config: ExperimentConfig,
    stored: StoredInputs,
    allocation: Allocation,
    desk: DeskClient,
) -> None:
    """Trains, and reports each epoch to the desk and to Tune; a trial that was killed goes on from its last checkpoint.

    Args:
        point: `number` of the trial and its config `overrides`.
        config: what every trial starts from; `train.storage` holds the trials' run folders.
        stored: the data of all trials.
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
        run_in_folder(config, stored, allocation, [TrialReports(desk, point["number"], TuneReportCallback())])
    except ray.train.TrainingFailedError as failure:
        if isinstance(getattr(failure, "controller_failure", None), StoppedEarlyError):
            return
        raise
