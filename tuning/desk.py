"""The study of a running search, in a Ray actor beside the driver: the driver asks it for trials, trials tell it their epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .study import open_study


class Desk:
    """The one writer of a study while its search runs.

    Args:
        url, name: of the study, which must exist.
    """

    def __init__(self, url: str, name: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = open_study(url, name)

    def next_trial(self) -> tuple[int, dict[str, Any]] | None:
        """See `SearchStudy.next_trial`."""
        return self._study.next_trial()

    def record(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """See `SearchStudy.record`."""
        return self._study.record(number, metrics)

    def fail(self, number: int, kind: str, reason: str) -> None:
        """See `SearchStudy.fail`."""
        self._study.fail(number, kind, reason)

    def stopped_because(self) -> str | None:
        """See `SearchStudy`."""
        return self._study.stopped_because


class DeskClient:
    """Calls a desk from any process of the cluster; plain data, so it travels with a trial."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def next_trial(self) -> tuple[int, dict[str, Any]] | None:
        """See `Desk`."""
        drawn: tuple[int, dict[str, Any]] | None = self._ask(self._actor.next_trial)
        return drawn

    def record(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """See `Desk`."""
        return bool(self._ask(self._actor.record, number, metrics))

    def fail(self, number: int, kind: str, reason: str) -> None:
        """See `Desk`."""
        self._ask(self._actor.fail, number, kind, reason)

    def stopped_because(self) -> str | None:
        """See `Desk`."""
        reason: str | None = self._ask(self._actor.stopped_because)
        return reason

    @staticmethod
    def _ask(method: Any, *arguments: Any) -> Any:
        return ray.get(method.remote(*arguments))


def open_desk(url: str, name: str) -> DeskClient:
    """Starts the desk on this machine, where a study in a file lies."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return DeskClient(ray.remote(num_cpus=0)(Desk).options(scheduling_strategy=here).remote(url, name))
