"""Searches hyper-parameters with Ray Tune and Optuna: `msrn search [PRESET] [options]`, or `python tuning/search.py`.

`study.py` holds the points and what became of them, `space.py` where they are drawn from, `trial.py` one training run, `tune.py` what Ray
Tune does with them, `report.py` and `view.py` what a person looks at. This file wires them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
import torch
from rich.console import Console

from msrn_ray.config import ExperimentConfig, ResourceSettings
from msrn_ray.errors import UserError
from msrn_ray.materials import Materials, gather_materials
from msrn_ray.resources import Allocation, allocate, connect, usable_cores
from msrn_ray.resuming import check_batch, describe_data, flatten
from msrn_ray.run_state import CONFIG_FILE
from msrn_ray.trainer import absolute_paths, place
from tuning.desk import open_desk
from tuning.options import Search
from tuning.plan import Plan
from tuning.report import write_results
from tuning.space_file import DEFAULT_SPACE, build_space, read_space
from tuning.study import SearchStudy, create_study, open_study
from tuning.trial import run_trial
from tuning.tune import SearchProgress, SearchStopper, StudySearcher
from tuning.view import SearchView

STUDY_FILE = "study.db"
_TRIALS = 12
# What a resumed search may do otherwise: where and on what it runs, and where the same data lie now
_MAY_CHANGE = ("resources.", "train.storage", "train.run_name", "train.log_every", "model.compile", "data.root")


def search(options: Search) -> Path:
    """Runs or resumes a search and writes its results into the search folder.

    Returns:
        The search folder: `best_config.yaml`, `report.html`, `trials.csv`, `trials.parquet`, a run folder for each trial.

    Raises:
        UserError: for input that the user can mend, before anything is written where that is possible; when no trial was scored; when
            trials in a row failed alike.
    """
    _check(options)
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of every trial beside our table
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's new output cannot be silenced
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # with its own, Ctrl-C looks like the end of the search
    config = absolute_paths(options.experiment)
    name = config.train.run_name or f"search-{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.train.storage) / name
    if options.resume is None and folder.exists():
        raise UserError(f"{folder} exists already; give another --train.run-name, or --resume {folder}")
    loggers = mlflow_callbacks(options.mlflow, name)
    space_source = str(options.space or DEFAULT_SPACE.name)
    entries = read_space(options.space)
    if options.resume is None:
        build_space(entries, config, space_source)  # before the data are read
    materials, data = _gather(config)
    url = options.study_storage or f"sqlite:///{folder / STUDY_FILE}"
    if options.resume is not None:
        study = _reopen(options, config, folder, url, name)
        study.check_data(data["fingerprint"], data["data"])
    connect(config.resources, runs=options.max_concurrent or own_machine_runs(config.resources))
    allocation = share(allocate(config.resources), options.max_concurrent, ray.cluster_resources())
    if options.resume is None:
        plan = Plan(
            config=config,
            entries=entries,
            sampler=options.sampler,
            objectives=options.objectives,
            early_stopping=options.early_stopping,
            data=data["fingerprint"],
            source=data["data"],
        )
        _make_folder(folder, config.with_overrides({"train.run_name": name}))
        study = create_study(url, name, plan, options.trials or (None if options.sampler == "grid" else _TRIALS))
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    _announce(console, study, allocation, folder)
    desk = open_desk(url, name)
    stopper = SearchStopper(None if options.time_budget is None else 60 * options.time_budget)
    trial_config = config.with_overrides({"train.storage": str(folder)})
    trainable = ray.tune.with_parameters(
        run_trial, config=trial_config, placed=place(materials, data), allocation=allocation, desk=desk
    )
    view = SearchView(study, console)
    tuner = ray.tune.Tuner(
        # it only waits for its workers, so it takes no CPU; Tune refuses an empty request
        ray.tune.with_resources(trainable, {"CPU": 0, "memory": 1}),
        tune_config=ray.tune.TuneConfig(
            search_alg=StudySearcher(desk),
            num_samples=-1,  # the study says when it is over
            max_concurrent_trials=allocation.runs,
            reuse_actors=True,  # the next trial finds all imported
        ),
        run_config=ray.tune.RunConfig(
            name=f"tune-{time.strftime('%Y%m%d-%H%M%S')}",
            storage_path=str(folder),
            stop=stopper,
            callbacks=[SearchProgress(desk, view, stopper), *loggers],
            verbose=0,
        ),
    )
    view.start()
    try:
        tuner.fit()
    except KeyboardInterrupt:
        print(f"interrupted; go on with: msrn search --resume {folder}", file=sys.stderr)
        raise
    finally:
        view.stop()
        if study.best() is not None:
            view.show()
            write_results(study, folder, console)
    _conclude(study, desk.stopped_because(), stopper, folder)
    return folder


def _gather(config: ExperimentConfig) -> tuple[Materials, dict[str, str]]:
    """What all trials share, without the test split, which is scored by whoever trains the best config; and what it is."""
    materials = gather_materials(config)
    check_batch(config, len(materials.splits.train))
    data = describe_data(materials.splits, config)
    return replace(materials, splits=replace(materials.splits, test=None)), data


def _conclude(study: SearchStudy, because: str | None, stopper: SearchStopper, folder: Path) -> None:
    """Says how the search ended where it did not end well.

    Raises:
        UserError: if trials are left for another reason than the time, or none was scored.
    """
    go_on = f"go on with: msrn search --resume {folder}"
    if because is not None:
        raise UserError(f"the search stopped: {because}; mend it and {go_on}")
    if study.unfinished and not stopper.time_is_up:
        raise UserError(f"Tune gave up {study.unfinished} trials, see {folder}/tune-*; {go_on}")
    if study.unfinished:
        print(f"the time is up, {study.unfinished} trials are left; {go_on}")
    elif study.best() is None:
        raise UserError(f"none of the {study.trials} trials was scored; see {folder / 'tune-*'}")


def _check(options: Search) -> None:
    """Refuses numbers that make no sense, with the option."""
    for option, number in (("--trials", options.trials), ("--max-concurrent", options.max_concurrent)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: must be at least 1")
    if options.time_budget is not None and not options.time_budget > 0:
        raise UserError(f"--time-budget {options.time_budget:g}: must be more than 0 minutes")
    if options.experiment.protocol == "paper":
        raise UserError("--protocol paper: would choose the settings on the published test split; search with honest")
    workers = options.experiment.resources.num_workers
    if isinstance(workers, str) and ".." in workers:
        raise UserError(
            f"--resources.num-workers {workers}: one trial could take the workers of the next, which would wait for ever; give a number"
        )
    if not options.objectives or len(set(options.objectives)) < len(options.objectives):
        raise UserError("--objectives: name at least one, each once")


def _reopen(options: Search, config: ExperimentConfig, folder: Path, url: str, name: str) -> SearchStudy:
    """The study of the search folder.

    Raises:
        UserError: if it is not there, or an option asks for another search.
    """
    if options.study_storage is None and not (folder / STUDY_FILE).is_file():
        raise UserError(f"{folder}: no {STUDY_FILE} in it; name the study's database with --study-storage")
    study = open_study(url, name, options.trials)
    defaults = {one.name: one.default for one in fields(Search)}
    changed = [
        f"--{option.replace('_', '-')}"
        for option in ("sampler", "objectives", "early_stopping")
        if getattr(options, option) not in (defaults[option], getattr(study.plan, option))
    ]
    if options.space is not None and read_space(options.space) != study.plan.entries:
        changed.append("--space")
    saved, now = flatten(study.plan.config.to_dict()), flatten(config.to_dict())
    changed += [
        f"{path} was {saved[path]!r}, now {now[path]!r}"
        for path in now
        if saved[path] != now[path] and not path.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{folder}: a search goes on as it was ({', '.join(changed)}); start a new one for other settings"
        )
    return study


def _make_folder(folder: Path, config: ExperimentConfig) -> None:
    try:
        folder.mkdir(parents=True)
        config.save(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None


def own_machine_runs(settings: ResourceSettings) -> int:
    """Trials at a time on a cluster that is started on this machine: a core, and its part of a GPU, for each worker."""
    workers, _ = settings.worker_range or (1, 1)
    room = usable_cores() // (workers * settings.cpus_per_worker)
    gpus = 0 if settings.use_gpu is False else torch.cuda.device_count()
    if gpus:
        room = min(room, math.floor(gpus / (workers * settings.gpus_per_worker) + 1e-9))
    return max(1, room)


def share(allocation: Allocation, asked: int | None, there: dict[str, float]) -> Allocation:
    """The allocation of a trial, with how many of them run at a time.

    Tune does not count what a trial's workers take, so this does: trials that wait for each other's workers would wait for ever.

    Args:
        allocation: of one trial alone.
        asked: trials at a time, or None for as many as there is room for.
        there: the cluster's resources.

    Raises:
        UserError: if there is not room for as many as are asked for, with what there is.
    """
    cpus = allocation.num_workers * allocation.cpus_per_worker
    room = math.floor(there["CPU"] / (cpus + 1))
    each = f"{cpus} CPUs for workers, 1 for decoding"
    if allocation.use_gpu:
        gpus = allocation.num_workers * allocation.gpus_per_worker
        room = min(room, math.floor(there["GPU"] / gpus + 1e-9))
        each += f", {gpus:g} GPUs"
    if (asked or 1) > room:
        have = f"{there['CPU']:g} CPUs and {there.get('GPU', 0):g} GPUs"
        raise UserError(
            f"--max-concurrent {asked or 1} has no room: a trial takes {each}; the cluster has {have}, enough for {room}"
        )
    return replace(allocation, runs=asked or room)


def _announce(console: Console, study: SearchStudy, allocation: Allocation, folder: Path) -> None:
    """Says what is about to be searched."""
    plan = study.plan
    console.print(f"{plan.source}", markup=False)
    paths = ", ".join(parameter.path for parameter in study.space.parameters)
    console.print(f"searching {paths} with {plan.sampler}", markup=False)
    _, outside = study.space.point_of(plan.config)
    if outside and plan.sampler != "grid":
        console.print(
            f"the first trial is the preset, with {', '.join(outside)} drawn: the space lacks its value", markup=False
        )
    early = "stopped early where they are behind (ASHA)" if plan.prunes else "each run to its end"
    console.print(
        f"{study.unfinished} of {study.trials} trials to go, {allocation.runs} at a time x {allocation.num_workers} workers,"
        f" {study.epochs} epochs, {early}",
        markup=False,
    )
    console.print(f"folder {folder}", markup=False)


def mlflow_callbacks(uri: str | None, experiment: str) -> list[Any]:
    """Tune's own callback for MLflow, if it is asked for: an experiment for the search, a run for each trial.

    Raises:
        UserError: if the package is missing or nothing answers at the address.
    """
    if uri is None:
        return []
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("--mlflow needs the package mlflow; install it with: pip install 'msrn-ray[mlflow]'")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 make a wrong address a wait of minutes
    import mlflow
    from mlflow.exceptions import MlflowException
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    try:
        mlflow.MlflowClient(uri).search_experiments(max_results=1)
    except MlflowException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--mlflow {uri}: cannot be reached ({reason}); start it with: mlflow server") from None
    return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=experiment)]


def main() -> None:
    """`python tuning/search.py ...` is `msrn search ...`."""
    from msrn_ray.__main__ import main as msrn

    sys.argv[1:1] = ["search"]
    msrn()


if __name__ == "__main__":
    main()
