"""Searches hyper-parameters with Ray Tune and Optuna: `msrn search [PRESET] [options]`, or `python tuning/search.py`.

`study.py` holds the points and what became of them, `space.py` where they are drawn from, `trial.py` one training run, `tune.py` what Ray
Tune does with them, `report.py` and `view.py` what a person looks at. This file wires them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryFile

import optuna
import ray.util
from optuna.trial import TrialState
from rich.console import Console

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.allocation import Allocation, allocate, own_machine_runs, share
from msrn_ray.ray_cluster.connection import connect
from msrn_ray.ray_train.torch_trainer import StoredInputs, store_inputs
from msrn_ray.runs.folder import CONFIG_FILE, absolute_paths
from msrn_ray.runs.resume import MAY_CHANGE, MAY_MOVE, changed_settings, describe_data, flatten
from msrn_ray.runs.state import check_stopped
from msrn_ray.training.inputs import TrainingInputs, check_batch, gather_inputs

from .live_table import SearchView
from .mlflow_logger import MlflowRuns, open_mlflow
from .options import Search
from .report import CSV, write_results
from .search_plan import Plan
from .space_file import DEFAULT_SPACE, build_space, read_space
from .study import SearchStudy
from .study_actor import open_desk
from .study_storage import check_name, create_study, open_study, shown
from .trial import run_trial, trial_name
from .tune_adapters import SearchProgress, SearchStopper, StudySearcher

STUDY_FILE = "study.db"
_TRIALS = 10


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
    mlflow = None if options.mlflow is None else open_mlflow(options.mlflow, name)
    url = _storage_url(options, folder)
    with ExitStack() as stack:
        if options.resume is not None:
            stack.enter_context(_alone(folder))
            study = _reopen(options, config, folder, url, name)
        else:
            plan = _plan(options, config)
            _check_new(options, plan, folder, url, name)
        inputs, data = _gather(config)
        if options.resume is not None:
            study.check_data(data["fingerprint"], data["data"])
            _change(options, study, folder)
        connect(
            config.resources.model_copy(update={"dashboard": True}),
            runs=options.max_concurrent or own_machine_runs(config.resources),
        )
        allocation = share(allocate(config.resources), options.max_concurrent, ray.nodes())
        if options.resume is None:
            plan = plan.model_copy(update={"data": data["fingerprint"], "source": data["data"]})
            _make_folder(folder, config.with_overrides({"train.run_name": name}))
            stack.enter_context(_alone(folder))
            study = _create(url, name, plan, options, folder)
        stopper = SearchStopper(None if options.time_budget is None else 60 * options.time_budget)
        trial_config = config.with_overrides({"train.storage": str(folder)})
        _tune(
            study, url, trial_config, store_inputs(inputs, data), allocation, stopper, mlflow, _go_on(options, folder)
        )
    return folder


def _tune(
    study: SearchStudy,
    url: str,
    config: ExperimentConfig,
    stored: StoredInputs,
    allocation: Allocation,
    stopper: SearchStopper,
    mlflow: MlflowRuns | None,
    go_on: str,
) -> None:
    """Runs the trials of a study that are left, shows them and writes the results into the search folder, `train.storage`.

    Raises:
        UserError: if trials are left for another reason than the time, or none was scored.
    """
    folder = Path(config.train.storage)
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)
    _announce(console, study, allocation, folder)
    desk = open_desk(url, study.study.study_name)
    # where this process runs: with it ends the search anyway, and a machine that is lost elsewhere takes only workers, which start again
    here = f"node:{ray.util.get_node_ip_address()}"
    trainable = ray.tune.with_parameters(run_trial, config=config, stored=stored, allocation=allocation, desk=desk)
    view = SearchView(study, console)
    tuner = ray.tune.Tuner(
        # it only waits for its workers, so it takes no CPU
        ray.tune.with_resources(trainable, {"CPU": 0, here: 0.001}),
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
            callbacks=[SearchProgress(desk, view, stopper), *([mlflow] if mlflow else [])],
            verbose=0,
        ),
    )
    view.start()
    try:
        tuner.fit()
    except KeyboardInterrupt:
        print(f"interrupted; {go_on}", file=sys.stderr)
        raise
    finally:
        view.stop()
        if mlflow is not None:
            mlflow.close()
        view.show()
        write_results(study, folder, console)
    _conclude(study, desk.stopped_because(), stopper, folder, go_on)


def _gather(config: ExperimentConfig) -> tuple[TrainingInputs, dict[str, str]]:
    """What all trials share, without the test split, which is scored by whoever trains the best config; and what it is."""
    inputs = gather_inputs(config)
    check_batch(config, len(inputs.splits.train))
    data = describe_data(inputs.splits, config)
    return replace(inputs, splits=replace(inputs.splits, test=None)), data


def _conclude(study: SearchStudy, because: str | None, stopper: SearchStopper, folder: Path, go_on: str) -> None:
    """Says how the search ended where it did not end well.

    Raises:
        UserError: if trials are left for another reason than the time, or none was scored.
    """
    failed = len(study.frozen(TrialState.FAIL))
    again = f", with --retry-failed for the {failed} that failed too" if failed else ""
    if because is not None:
        raise UserError(f"the search stopped: {because}; mend it and {go_on}{again}")
    if study.unfinished and not stopper.time_is_up:
        raise UserError(f"Tune gave up {study.unfinished} trials, see {folder}/tune-*; {go_on}")
    if study.unfinished:
        print(f"the time is up, {study.unfinished} trials are left; {go_on}")
    elif study.best() is None:
        raise UserError(f"none of the {study.trials} trials was scored; see {folder / CSV}; {go_on}{again}")


def _go_on(options: Search, folder: Path) -> str:
    """The command that takes the search up again, without the password of its storage."""
    storage = "" if options.study_storage is None else f" --study-storage {shown(options.study_storage)}"
    return f"go on with: msrn search --resume {folder}{storage}"


def _storage_url(options: Search, folder: Path) -> str:
    """Where the study lies, as any process of this machine finds it.

    Raises:
        UserError: for an SQLite database without a file.
    """
    url = options.study_storage
    if url is None:
        return f"sqlite:///{folder / STUDY_FILE}"
    if not url.startswith("sqlite:"):
        return url
    file = url.removeprefix("sqlite:///")
    if file in (url, "", ":memory:"):
        raise UserError(f"--study-storage {url}: names no file, and would be gone with the search; give sqlite:///FILE")
    return f"sqlite:///{Path(file).absolute()}"


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
    if options.retry_failed and options.resume is None:
        raise UserError("--retry-failed: needs --resume; a new search has no failed trials")
    if not options.objectives or len(set(options.objectives)) < len(options.objectives):
        raise UserError("--objectives: name at least one, each once")


def _plan(options: Search, config: ExperimentConfig) -> Plan:
    """What a new search is, but for its data; a space that does not fit the config is refused."""
    entries = read_space(options.space)
    build_space(entries, config, str(options.space or DEFAULT_SPACE.name))
    return Plan(
        config=config,
        entries=entries,
        sampler=options.sampler,
        objectives=options.objectives,
        early_stopping=options.early_stopping,
        data="",
        source="",
    )


def _check_new(options: Search, plan: Plan, folder: Path, url: str, name: str) -> None:
    """Refuses, before the data are read, what a new search would fail at after that.

    Raises:
        UserError: for a grid that is too large, a folder that cannot be written, a study of this name.
    """
    plan.first_points()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder.parent):
            pass
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None
    if options.study_storage is not None:
        check_name(url, name)


def _create(url: str, name: str, plan: Plan, options: Search, folder: Path) -> SearchStudy:
    """The new study; without one its folder is of no use."""
    try:
        return create_study(url, name, plan, options.trials or (None if options.sampler == "grid" else _TRIALS))
    except UserError:
        shutil.rmtree(folder)
        raise


def _reopen(options: Search, config: ExperimentConfig, folder: Path, url: str, name: str) -> SearchStudy:
    """The study of the search folder.

    Raises:
        UserError: if it is not there, or an option asks for another search.
    """
    if options.study_storage is None and not (folder / STUDY_FILE).is_file():
        raise UserError(f"{folder}: no {STUDY_FILE} in it; name the study's database with --study-storage")
    study = open_study(url, name)
    defaults = {one.name: one.default for one in fields(Search)}
    changed = [
        f"--{option.replace('_', '-')}"
        for option in ("sampler", "objectives", "early_stopping")
        if getattr(options, option) not in (defaults[option], getattr(study.plan, option))
    ]
    if options.space is not None and read_space(options.space) != study.plan.entries:
        changed.append("--space")
    saved, now = flatten(study.plan.config.to_dict()), flatten(config.to_dict())
    may_change = tuple(path for path in MAY_CHANGE + MAY_MOVE if path != "train.epochs")
    changed += changed_settings(saved, now, may_change)
    if changed:
        raise UserError(
            f"{folder}: a search goes on as it was ({', '.join(changed)}); start a new one for other settings"
        )
    study.config = config
    return study


def _change(options: Search, study: SearchStudy, folder: Path) -> None:
    """What a resumed search changes in its study, once nothing speaks against going on.

    Raises:
        UserError: for a number of trials that cannot be, or a trial that a process elsewhere still trains.
    """
    for trial in study.frozen(TrialState.RUNNING):
        check_stopped(folder / trial_name(trial.number))
    if options.trials is not None:
        study.set_trials(options.trials)
    if options.retry_failed:
        print(f"{study.retry_failed()} failed trials are tried again", flush=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other drivers from the search of a folder; the system lets go of it when this one dies, however that happens.

    Raises:
        UserError: if another driver has it.
    """
    try:
        file = (folder / ".driver").open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    with file:
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
