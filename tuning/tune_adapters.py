"""Ray Tune's side of a study: it asks the desk for trials and tells it which failed.

Tune runs the trials, places them on the cluster and notices when one dies; it decides nothing. Its own `OptunaSearch` and `Tuner.restore`
are not used: a restored Tuner takes its trials from a snapshot that is written now and then, so trials that had finished ran again and
its state and the study's drifted apart. A new Tuner over the same study has nothing to get wrong. ASHA is Optuna's, whose rungs are in
the study too, so they outlive the driver; trials ask the desk themselves whether they go on (`trial.TrialReports`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from msrn_ray.ray_train.failures import describe_failure

from .live_table import SearchView
from .trial_callback import DeskClient


class Live:
    """Tune pickles what it is given for `Tuner.restore`; of these, which hold the study and the terminal, it gets nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearcher(Live, Searcher):
    """Gives Tune the trials of a study."""

    def __init__(self, desk: DeskClient) -> None:
        super().__init__()
        self._desk = desk

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Tune's type lacks FINISHED
        """The point of the next trial, or FINISHED."""
        drawn = self._desk.next_trial()
        if drawn is None:
            return Searcher.FINISHED
        number, overrides = drawn
        return {"number": number, "overrides": overrides}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the trial has told the desk itself."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is saved at every step."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class SearchStopper(Live, Stopper):
    """Stops all trials once the time is up or it is told to; those that were running go on when the search is resumed.

    Args:
        seconds: time budget from now on, or None.

    Attributes:
        stop: set where all trials are to stop now.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self.stop = False

    @property
    def time_is_up(self) -> bool:
        """Whether the budget is spent."""
        return self._end is not None and time.monotonic() >= self._end

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped alone here."""
        return False

    def stop_all(self) -> bool:
        """Whether everything stops."""
        return self.stop or self.time_is_up


class SearchProgress(Live, Callback):
    """Shows what becomes of the trials, and tells the desk of failures.

    Args:
        desk: of the study.
        view: shows it.
        stopper: is told when failures are to stop the search.
    """

    def __init__(self, desk: DeskClient, view: SearchView, stopper: SearchStopper) -> None:
        self._desk = desk
        self._view = view
        self._stopper = stopper

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial starts."""
        self._view.update(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial ends an epoch; the study has it already."""
        self._view.update(trial.config["number"])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended, of itself or early."""
        self._view.update(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed."""
        self._desk.fail(trial.config["number"], *describe_failure(_error_of(trial)))
        self._stopper.stop = self._desk.stopped_because() is not None
        self._view.update(trial.config["number"])


def _error_of(trial: Trial) -> BaseException:
    """What Tune has just written of a failure on this machine; `trial.get_pickled_error` looks where it is copied to later."""
    file = trial.pickled_error_file or trial.error_file
    if file is None:
        return RuntimeError("no reason is known")
    content = Path(file).read_bytes()
    error: BaseException = (
        cloudpickle.loads(content) if trial.pickled_error_file else RuntimeError(content.decode(errors="replace"))
    )
    return error
