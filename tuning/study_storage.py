"""Creates and opens Optuna studies in their storage. During a search, a Ray actor beside the driver is the only writer."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import optuna
import ray
from optuna.exceptions import StorageInternalError
from pydantic import ValidationError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from msrn_ray.errors import UserError
from msrn_ray.ray_cluster.connection import on_node

from .options import MINIMIZED, SearchPlan
from .study import NUM_TRIALS_KEY, PLAN_KEY, SearchStudy
from .trial_callback import StudyClient

_PATIENCE_SECONDS = 60.0


def create_study(url: str, name: str, plan: SearchPlan, num_trials: int | None) -> SearchStudy:
    """Create a study whose first point is the plan's config; a grid has all its points from the start.

    Args:
        url: storage, as SQLAlchemy writes it.
        name: of the study in that storage.
        plan: what is searched.
        num_trials: how many in all; None: the points of the grid.

    Raises:
        UserError: if the storage cannot be used or has a study of this name, or the grid is too large.
    """
    points = plan.first_points()
    random.Random(plan.config.train.seed).shuffle(points)  # a shortened grid then covers all of its range
    check_name(url, name)
    try:
        study = optuna.create_study(
            storage=open_storage(url),
            study_name=name,
            directions=["minimize" if objective in MINIMIZED else "maximize" for objective in plan.objectives],
        )
    except StorageInternalError as error:
        raise UserError(f"--study-storage {hide_password(url)}: cannot be written ({_reason(error)})") from None
    for point in points:
        study.enqueue_trial(point)
    most = len(points) if plan.sampler == "grid" else math.inf
    study.set_user_attr(NUM_TRIALS_KEY, int(min(most, len(points) if num_trials is None else num_trials)))
    study.set_user_attr(PLAN_KEY, plan.model_dump(mode="json"))  # last: a study without it was never completely created
    return SearchStudy(study)


def check_name(url: str, name: str) -> None:
    """Refuse the name of a study that the storage has already.

    Raises:
        UserError: if it has one, or cannot be used.
    """
    if name in optuna.get_all_study_names(open_storage(url)):
        raise UserError(
            f"{hide_password(url)} has a study {name} already; resume it with --resume, or give another --train.run-name"
        )


def open_study(url: str, name: str) -> SearchStudy:
    """Open the study of an earlier search.

    Raises:
        UserError: if there is none, or it was not completely created, or another version of this program wrote it.
    """
    try:
        study = optuna.load_study(storage=open_storage(url), study_name=name)
    except KeyError:
        raise UserError(f"{hide_password(url)} has no study {name}; name its storage with --study-storage") from None
    if PLAN_KEY not in study.user_attrs:
        raise UserError(f"{hide_password(url)}: study {name} was killed before its first trial; start a new search")
    try:
        return SearchStudy(study)
    except ValidationError as error:
        raise UserError(
            f"{hide_password(url)}: study {name} was written by another version of this program ({error.errors()[0]['msg']})"
        ) from None


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Open the storage of studies: creates the tables of an empty database, and renews a lost connection.

    Raises:
        UserError: if it cannot be used, or the driver of its database is not installed.
    """
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UserError(
            f"--study-storage {hide_password(url)}: needs its database driver ({error}); install it with pip"
        ) from None
    except SQLAlchemyError as error:
        raise UserError(f"--study-storage {hide_password(url)}: cannot be used ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())[:300]


def hide_password(url: str) -> str:
    """Return the URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url


class StudyActor:
    """The only writer of a study while its search runs: the driver gets trials from it, trials report their epochs to it.

    Args:
        url: storage of the study.
        name: of the study, which must exist.
    """

    def __init__(self, url: str, name: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = open_study(url, name)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the `SearchStudy`; repeat it for a minute while the study's database does not answer.

        Every method that trials and the driver call may be repeated.
        """
        end = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return getattr(self._study, method)(*arguments)
            except StorageInternalError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def stopped_because(self) -> str | None:
        """See `SearchStudy`."""
        return self._study.stopped_because


def start_study_actor(url: str, name: str) -> StudyClient:
    """Start the study actor on this node, where the file of a study in SQLite lies."""
    actor = ray.remote(num_cpus=0)(StudyActor).options(scheduling_strategy=on_node())
    return StudyClient(actor.remote(url, name))
