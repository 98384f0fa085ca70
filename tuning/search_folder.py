"""The search folder and its study: names them, refuses what cannot work, creates or reopens the study, keeps other drivers out."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from optuna.trial import TrialState

from msrn_ray.config import ExperimentConfig
from msrn_ray.errors import UserError
from msrn_ray.runs.folder import cannot_be_written, make_folder
from msrn_ray.runs.resume import MAY_CHANGE, changed_settings
from msrn_ray.runs.state import check_stopped

from .options import SearchOptions, SearchPlan
from .space_file import DEFAULT_SPACE, build_space, read_space
from .study import SearchStudy
from .study_storage import check_name, create_study, hide_password, open_study
from .trial_point import trial_name

STUDY_FILE = "study.db"
_DEFAULT_TRIALS = 10


@dataclass(frozen=True)
class SearchFolder:
    """Where a search lies.

    Attributes:
        path: the search folder, which holds the trials' run folders and the results; its name is the study's.
        study_url: storage of the study, as any process on this node finds it.
        resume_command: resumes the search; without the password of its storage.
    """

    path: Path
    study_url: str
    resume_command: str


def name_folder(options: SearchOptions, config: ExperimentConfig) -> SearchFolder:
    """Return the folder of a new or resumed search; nothing is written.

    Raises:
        UserError: for a new search if the folder exists; for an SQLite database without a file.
    """
    name = config.train.run_name or f"search-{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(config.train.storage) / name
    if options.resume is None and path.exists():
        raise UserError(f"{path} exists already; give another --train.run-name, or --resume {path}")
    url = options.study_storage
    storage = "" if url is None else f" --study-storage {hide_password(url)}"
    return SearchFolder(path, _study_url(url, path), f"msrn search --resume {path}{storage}")


def _study_url(url: str | None, path: Path) -> str:
    if url is None:
        return f"sqlite:///{path / STUDY_FILE}"
    if not url.startswith("sqlite:"):
        return url
    file = url.removeprefix("sqlite:///")
    if file in (url, "", ":memory:"):
        raise UserError(
            f"--study-storage {url}: names no file, and would be lost with the process; give sqlite:///FILE"
        )
    return f"sqlite:///{Path(file).absolute()}"


def plan_search(options: SearchOptions, config: ExperimentConfig, folder: SearchFolder) -> SearchPlan:
    """Return the plan of a new search, without its data, which are not read yet.

    Raises:
        UserError: for what would fail after reading the data: a space that does not fit the config, a grid that is too large, a folder
            that cannot be written, a study that exists already.
    """
    entries = read_space(options.space)
    build_space(entries, config, str(options.space or DEFAULT_SPACE.name))
    plan = SearchPlan(
        config=config,
        entries=entries,
        sampler=options.sampler,
        objectives=options.objectives,
        early_stopping=options.early_stopping,
        data="",
        source="",
    )
    plan.first_points()
    try:
        folder.path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder.path.parent).close()
    except OSError as error:
        raise cannot_be_written(folder.path, error) from None
    if options.study_storage is not None:
        check_name(folder.study_url, folder.path.name)
    return plan


def make_search_folder(folder: SearchFolder, config: ExperimentConfig) -> None:
    """Create the folder of a new search, with its config in it.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        make_folder(folder.path, config.with_overrides({"train.run_name": folder.path.name}))
    except OSError as error:
        raise cannot_be_written(folder.path, error) from None


def new_study(folder: SearchFolder, plan: SearchPlan, options: SearchOptions) -> SearchStudy:
    """Create the study of a new search, or delete its folder, which is of no use without one.

    Raises:
        UserError: see `create_study`.
    """
    try:
        num_trials = options.trials or (None if options.sampler == "grid" else _DEFAULT_TRIALS)
        return create_study(folder.study_url, folder.path.name, plan, num_trials)
    except UserError:
        shutil.rmtree(folder.path)
        raise


def reopen_study(folder: SearchFolder, options: SearchOptions, config: ExperimentConfig) -> SearchStudy:
    """Open the study of an earlier search.

    Raises:
        UserError: if it does not exist, or an option asks for another search.
    """
    if options.study_storage is None and not (folder.path / STUDY_FILE).is_file():
        raise UserError(f"{folder.path}: no {STUDY_FILE} in it; name the study's database with --study-storage")
    study = open_study(folder.study_url, folder.path.name)
    changed = [
        f"--{option.replace('_', '-')}"
        for option in ("sampler", "objectives", "early_stopping")
        if getattr(options, option) not in (getattr(SearchOptions, option), getattr(study.plan, option))
    ]
    if options.space is not None and read_space(options.space) != study.plan.entries:
        changed.append("--space")
    may_change = tuple(path for path in MAY_CHANGE if path != "train.epochs")
    changed += changed_settings(study.plan.config, config, may_change)
    if changed:
        raise UserError(
            f"{folder.path}: a resumed search keeps its settings ({', '.join(changed)}); start a new search for others"
        )
    study.config = config
    return study


def change_study(study: SearchStudy, folder: SearchFolder, options: SearchOptions) -> None:
    """Change the study of a resumed search as the options say; call it once all other checks have passed.

    Raises:
        UserError: for an impossible number of trials, or a trial that a process elsewhere still trains.
    """
    for trial in study.drawn_trials(TrialState.RUNNING):
        check_stopped(folder.path / trial_name(trial.number))
    if options.trials is not None:
        study.set_num_trials(options.trials)
    if options.retry_failed:
        print(f"{study.retry_failed()} failed trials run again", flush=True)


@contextmanager
def single_driver(folder: SearchFolder) -> Iterator[None]:
    """Keep other drivers from the search of a folder while the block runs.

    The kernel releases a flock when its process ends, however that happens, and no second driver fits in between. But flock may not
    reach other nodes on shared storage such as NFS. Between nodes the heartbeats of the trials protect them (`check_stopped`), which
    take seconds to watch and do not cover a search between two trials. So a search needs both.

    Raises:
        UserError: if another driver has the folder.
    """
    try:
        file = (folder.path / ".driver").open("w")
    except OSError as error:
        raise UserError(f"{folder.path}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder.path} is being searched by another process; wait for its end, or start a new search"
            ) from None
        yield
