"""Ray Tune's side of a study: it asks the study for trials and hands it what they report.

Tune runs the trials, places them on the cluster and notices when one dies; it decides nothing. Its own `OptunaSearch` and `Tuner.restore`
are not used: a restored Tuner takes its trials from a snapshot that is written now and then, so trials that had finished ran again and
its state and the study's drifted apart. A new Tuner over the same study has nothing to get wrong. ASHA is Optuna's, whose rungs are in
the study too, so they outlive the driver.
"""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from .study import SearchStudy
from .trial import describe_failure
from .view import SearchView


class _Live:
    """Tune pickles what it is given for `Tuner.restore`; of these, which hold the study and the terminal, it gets nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearcher(_Live, Searcher):
    """Gives Tune the trials of a study."""

    def __init__(self, study: SearchStudy) -> None:
        super().__init__()
        self._study = study

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Tune's type lacks FINISHED
        """The point of the next trial, or FINISHED."""
        drawn = self._study.next_trial()
        if drawn is None:
            return Searcher.FINISHED
        number, overrides = drawn
        return {"number": number, "overrides": overrides}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the study has it from the scheduler, which knows the reason too."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is saved at every step."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


class StudyScheduler(_Live, FIFOScheduler):
    """Hands results and failures to the study, which decides whether a trial goes on."""

    def __init__(self, study: SearchStudy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._study = study

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stops the trial where the study says so."""
        return TrialScheduler.STOP if self._study.record(trial.config["number"], result) else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Tells the study why it failed."""
        error = trial.get_pickled_error() or RuntimeError(trial.get_error() or "no reason is known")
        self._study.fail(trial.config["number"], *describe_failure(error))


class StudyStopper(_Live, Stopper):
    """Stops all trials once the study has stopped or the time is up; those that were running go on when the search is resumed.

    Args:
        study: whose trials run.
        seconds: time budget from now on, or None.
    """

    def __init__(self, study: SearchStudy, seconds: float | None) -> None:
        self._study = study
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def time_is_up(self) -> bool:
        """Whether the budget is spent."""
        return self._end is not None and time.monotonic() >= self._end

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No trial is stopped alone here."""
        return False

    def stop_all(self) -> bool:
        """Whether everything stops."""
        return self._study.stopped_because is not None or self.time_is_up


class StudyProgress(_Live, Callback):
    """Shows what becomes of the trials."""

    def __init__(self, view: SearchView) -> None:
        self._view = view

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial starts."""
        self._view.update(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial ends an epoch; the study has it already."""
        self._view.update(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed; the study has the reason already."""
        self._view.update(trial.config["number"])
