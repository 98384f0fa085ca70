"""Searches hyper-parameters with Ray Tune and Optuna: `msrn search [PRESET] [options]`, or `python tuning/search.py`.

README.md beside this file says what each file of the package does. This file wires them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import optuna
import ray.tune
import ray.util
from optuna.trial import TrialState
from ray.tune import Callback
from rich.console import Console

from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.allocation import allocate, local_runs, share_cluster
from msrn_ray.ray_cluster.connection import connect
from msrn_ray.ray_train.worker_input import store_inputs
from msrn_ray.runs.folder import absolute_paths
from msrn_ray.runs.resume import describe_data
from msrn_ray.training.inputs import check_batch, gather_inputs

from .live_table import LiveTable
from .mlflow_logger import open_mlflow
from .options import SearchOptions, check_options
from .report import CSV, write_results
from .search_folder import (
    SearchFolder,
    change_study,
    make_search_folder,
    name_folder,
    new_study,
    plan_search,
    reopen_study,
    single_driver,
)
from .study import SearchStudy
from .study_storage import start_study_actor
from .trial import TrialInputs, run_trial
from .tune_adapters import SearchProgress, SearchStopper, StudySearcher


def search(options: SearchOptions) -> Path:
    """Run or resume a search and write its results into the search folder.

    Returns:
        The search folder: `best_config.yaml`, `report.html`, `trials.csv`, `trials.parquet`, a run folder per trial.

    Raises:
        UserError: for input that the user can fix, where possible before anything is written; when no trial has a score; when trials in
            a row failed for the same reason.
    """
    check_options(options)
    _quiet_libraries()
    config = absolute_paths(options.experiment)
    resources = config.resources
    folder = name_folder(options, config)
    mlflow = None if options.mlflow is None else open_mlflow(options.mlflow, folder.path.name)
    with ExitStack() as stack:
        if options.resume is not None:
            stack.enter_context(single_driver(folder))
            study = reopen_study(folder, options, config)
        else:
            plan = plan_search(options, config, folder)
        inputs = gather_inputs(config)
        check_batch(config, len(inputs.splits.train))
        data = describe_data(inputs.splits, config)
        # without test, on which only the run of the best config is scored
        inputs = replace(inputs, splits=replace(inputs.splits, test=None))
        if options.resume is not None:
            study.check_data(data["fingerprint"], data["data"])
            change_study(study, folder, options)
        runs = options.max_concurrent or local_runs(resources)
        connect(resources.model_copy(update={"dashboard": True}), runs=runs)
        allocation = share_cluster(allocate(resources), options.max_concurrent, ray.nodes())
        if options.resume is None:
            make_search_folder(folder, config)
            stack.enter_context(single_driver(folder))
            plan = plan.model_copy(update={"data": data["fingerprint"], "source": data["data"]})
            study = new_study(folder, plan, options)
        stopper = SearchStopper(None if options.time_budget is None else 60 * options.time_budget)
        trial_config = config.with_overrides({"train.storage": str(folder.path)})
        trial_inputs = TrialInputs(trial_config, store_inputs(inputs, data), allocation)
        loggers: list[Callback] = [] if mlflow is None else [stack.enter_context(closing(mlflow))]
        _run_trials(study, folder, trial_inputs, stopper, loggers)
    return folder.path


def _quiet_libraries() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs every trial beside our table
    # Tune would print the tracebacks of failed trials, which are in tune-*/*/error.txt
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's new output cannot be silenced
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # with Tune's handler, Ctrl-C looks like the search's end


def _run_trials(
    study: SearchStudy, folder: SearchFolder, inputs: TrialInputs, stopper: SearchStopper, loggers: list[Callback]
) -> None:
    """Run the trials of a study that are left, show them and write the results into the search folder.

    Raises:
        UserError: if trials are left although the time is not up, or no trial has a score.
    """
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    _announce(console, study, folder, inputs)
    study_client = start_study_actor(folder.study_url, folder.path.name)
    # Trials run on this process's node: the search ends with that node anyway. The loss of another node takes only workers, which restart.
    driver_node = f"node:{ray.util.get_node_ip_address()}"
    trainable = ray.tune.with_parameters(run_trial, inputs=inputs, study_client=study_client)
    table = LiveTable(study, console)
    tuner = ray.tune.Tuner(
        # a trial only waits for its workers, so it takes no CPU
        ray.tune.with_resources(trainable, {"CPU": 0, driver_node: 0.001}),
        tune_config=ray.tune.TuneConfig(
            search_alg=StudySearcher(study_client),
            num_samples=-1,  # the study decides when the search ends
            max_concurrent_trials=inputs.allocation.runs,
            reuse_actors=True,  # the next trial's process has imported everything
        ),
        run_config=ray.tune.RunConfig(
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(folder.path),
            stop=stopper,
            callbacks=[SearchProgress(study_client, table, stopper), *loggers],
            verbose=0,
        ),
    )
    table.start()
    try:
        tuner.fit()
    except KeyboardInterrupt:
        print(f"interrupted; resume with: {folder.resume_command}", file=sys.stderr)
        raise
    finally:
        table.stop()
        write_results(study, folder.path, console)
    _conclude(study, study_client.stopped_because(), stopper, folder)


def _conclude(study: SearchStudy, stopped_because: str | None, stopper: SearchStopper, folder: SearchFolder) -> None:
    """Say how the search ended, unless all its trials ended and one has a score.

    Raises:
        UserError: if trials are left although the time is not up, or no trial has a score.
    """
    failed = len(study.drawn_trials(TrialState.FAIL))
    retry = f" (add --retry-failed to run the {failed} failed trials again)" if failed else ""
    resume = f"resume with: {folder.resume_command}"
    if stopped_because is not None:
        raise UserError(f"the search stopped: {stopped_because}; fix the cause, then {resume}{retry}")
    if study.num_unfinished and not stopper.time_is_up:
        raise UserError(f"Tune gave up {study.num_unfinished} trials, see {folder.path}/tune-*; {resume}")
    if study.num_unfinished:
        print(f"the time is up, {study.num_unfinished} trials are left; {resume}")
    elif study.best_trial() is None:
        raise UserError(
            f"none of the {study.num_trials} trials has a score; see {folder.path / CSV}, then {resume}{retry}"
        )


def _announce(console: Console, study: SearchStudy, folder: SearchFolder, inputs: TrialInputs) -> None:
    """Print what the search is going to do."""
    plan, allocation = study.plan, inputs.allocation
    paths = ", ".join(parameter.path for parameter in study.space.parameters)
    lines = [plan.source, f"searching {paths} with {plan.sampler}"]
    _, outside = study.space.point_of(plan.config)
    if outside and plan.sampler != "grid":
        lines.append(
            f"the first trial is the preset, but draws {', '.join(outside)}: the space lacks the preset's value"
        )
    early = "stopped early where they are behind (ASHA)" if plan.prunes else "no early stopping"
    lines.append(
        f"{study.num_unfinished} of {study.num_trials} trials to run, {allocation.runs} at a time x"
        f" {allocation.num_workers} workers, {study.epochs} epochs, {early}"
    )
    console.print("\n".join([*lines, f"folder {folder.path}"]))
