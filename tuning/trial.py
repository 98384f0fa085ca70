"""One trial, in a process on the cluster: a run as `msrn train` does it, which also reports to the study and to Ray Tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import is_stopped_early
from msrn_ray.ray_cluster.allocation import Allocation
from msrn_ray.ray_train.driver import run_in_folder
from msrn_ray.ray_train.worker_input import StoredInputs
from msrn_ray.runs.resume import check_list, listed_metrics

from .trial_callback import StudyClient, TrialCallback
from .trial_point import TrialPoint, trial_name


@dataclass(frozen=True)
class TrialInputs:
    """What all trials of a search share.

    Attributes:
        config: what every trial starts from; `train.storage` holds the trials' run folders.
        stored: the data.
        allocation: of one trial.
    """

    config: ExperimentConfig
    stored: StoredInputs
    allocation: Allocation


def run_trial(tune_config: Mapping[str, Any], inputs: TrialInputs, study_client: StudyClient) -> None:
    """Train a point, and report each epoch to the study and to Tune; a trial that was killed resumes from its last checkpoint.

    Args:
        tune_config: Tune's config of the trial, which holds its TrialPoint.
        inputs: what all trials share.
        study_client: decides whether the trial stops early.
    """
    point, config = TrialPoint(**tune_config), inputs.config
    name = trial_name(point.number)
    folder = Path(config.train.storage) / name
    check_list(folder)
    for metrics in listed_metrics(folder):  # a kill may have come between an epoch's checkpoint and its report
        if study_client.record(point.number, metrics) or metrics["epoch"] == config.train.epochs:
            return
    config = config.with_overrides(point.overrides | {"train.run_name": name})
    callback = TrialCallback(study_client, point.number, TuneReportCallback())
    try:
        run_in_folder(config, inputs.stored, inputs.allocation, [callback])
    except ray.train.TrainingFailedError as failure:
        if not is_stopped_early(failure):
            raise
