"""The study of a running search, in a Ray actor beside the driver: the driver gets trials from it, trials report their epochs to it."""

from __future__ import annotations

import time
from typing import Any

import optuna
import ray
from optuna.exceptions import StorageInternalError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .study_storage import open_study
from .trial_callback import StudyClient

_PATIENCE_SECONDS = 60.0


class StudyActor:
    """The only writer of a study while its search runs.

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
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return StudyClient(ray.remote(num_cpus=0)(StudyActor).options(scheduling_strategy=here).remote(url, name))
