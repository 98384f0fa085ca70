"""Searches hyper-parameters with Ray Tune and Optuna: `msrn search [PRESET] [options]`, or `python tuning/search.py`.

`study.py` holds the points and what became of them, `space.py` where they are drawn from, `trial.py` one training run, `tune.py` what Ray
Tune does with them, `report.py` and `view.py` what a person looks at. This file wires them.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optuna
import ray
import ray.tune
from rich.console import Console

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.materials import Materials, gather_materials
from msrn_ray.resources import Allocation, allocate, connect
from msrn_ray.resuming import check_batch, describe_data, flatten
from msrn_ray.run_state import CONFIG_FILE
from msrn_ray.trainer import Placed, absolute_paths, place
from tuning.desk import open_desk
from tuning.options import Search
from tuning.plan import Plan
from tuning.report import write_results
from tuning.room import own_machine_runs, share
from tuning.space_file import DEFAULT_SPACE, build_space, read_space
from tuning.study import SearchStudy, create_study, open_storage, open_study
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
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # tracebacks of failed trials, which are in tune-*/*/error.txt
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
    if options.study_storage is not None:
        open_storage(options.study_storage)
    materials, data = _gather(config)
    url = options.study_storage or f"sqlite:///{folder / STUDY_FILE}"
    with ExitStack() as stack:
        if options.resume is not None:
            stack.enter_context(_alone(folder))
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
            stack.enter_context(_alone(folder))
            study = create_study(url, name, plan, options.trials or (None if options.sampler == "grid" else _TRIALS))
        stopper = SearchStopper(None if options.time_budget is None else 60 * options.time_budget)
        trial_config = config.with_overrides({"train.storage": str(folder)})
        _tune(study, url, trial_config, place(materials, data), allocation, stopper, loggers)
    return folder


def _tune(
    study: SearchStudy,
    url: str,
    config: ExperimentConfig,
    placed: Placed,
    allocation: Allocation,
    stopper: SearchStopper,
    loggers: list[Any],
) -> None:
    """Runs the trials of a study that are left, shows them and writes the results into the search folder, `train.storage`.

    Raises:
        UserError: if trials are left for another reason than the time, or none was scored.
    """
    folder = Path(config.train.storage)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    _announce(console, study, allocation, folder)
    desk = open_desk(url, study.study.study_name)
    trainable = ray.tune.with_parameters(run_trial, config=config, placed=placed, allocation=allocation, desk=desk)
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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other drivers from the search of a folder; the system lets go of it when this one dies, however that happens.

    Raises:
        UserError: if another driver has it.
    """
    with (folder / ".driver").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder} is being searched by another process; wait for its end, or start a new search"
            ) from None
        yield


def _make_folder(folder: Path, config: ExperimentConfig) -> None:
    try:
        folder.mkdir(parents=True)
        config.save(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None


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
