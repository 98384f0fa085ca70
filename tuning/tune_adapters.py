"""Ray Tune's side of a study: gets trials from the study actor and reports failures to it.

Tune runs the trials, places them on the cluster and notices when one dies; it decides nothing. We do not use its `OptunaSearch` and
`Tuner.restore`. A restored Tuner takes its trials from a periodic snapshot, so finished trials ran again, and its state and the study's
drifted apart. A new Tuner over the same study has no state to get wrong. ASHA is Optuna's: its rungs are in the study too, so they
outlive the driver. Trials ask the study actor themselves whether they continue (`trial_callback.TrialCallback`).
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from msrn_ray.ray_train.failures import describe_failure

from .live_table import LiveTable
from .trial_callback import StudyClient


class NotPickled:
    """Base of objects that hold the study or the terminal: Tune pickles its callbacks for `Tuner.restore`, of these it gets nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class StudySearcher(NotPickled, Searcher):
    """Gives Tune the trials of a study."""

    def __init__(self, study_client: StudyClient) -> None:
        super().__init__()
        self._study_client = study_client

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]  # Tune's type lacks FINISHED
        """Return the point of the next trial as Tune's config, or FINISHED."""
        point = self._study_client.next_trial()
        return Searcher.FINISHED if point is None else asdict(point)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: the trial has reported to the study itself."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study is saved at every step."""


class SearchStopper(NotPickled, Stopper):
    """Stops all trials once the time is up or `stop` is set; a resumed search resumes those that were running.

    Args:
        seconds: time budget from the construction on, or None.

    Attributes:
        stop: set it to stop all trials.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self.stop = False

    @property
    def time_is_up(self) -> bool:
        """Whether the budget is spent."""
        return self._end is not None and time.monotonic() >= self._end

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: this stopper never stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether all trials are to stop."""
        return self.stop or self.time_is_up


class SearchProgress(NotPickled, Callback):
    """Shows the trials' progress, and reports failures to the study.

    Args:
        study_client: of the search's study.
        table: shows it.
        stopper: stops the search where the study has stopped because of failures.
    """

    def __init__(self, study_client: StudyClient, table: LiveTable, stopper: SearchStopper) -> None:
        self._study_client = study_client
        self._table = table
        self._stopper = stopper

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, *_: Any, **info: Any
    ) -> None:  # `_`: a result
        """Show that a trial starts, reports an epoch, or ends, after its last epoch or early; the study has it already."""
        self._table.update(trial.config["number"])

    on_trial_result = on_trial_complete = on_trial_start

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Report a failed trial to the study and show it."""
        self._study_client.fail(trial.config["number"], *describe_failure(_error_of(trial)))
        self._stopper.stop = self._study_client.stopped_because() is not None
        self._table.update(trial.config["number"])


def _error_of(trial: Trial) -> BaseException:
    """Return the error that Tune has just written on this node; `trial.get_pickled_error` reads a copy that is made later."""
    if trial.pickled_error_file:
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return error
    file = trial.error_file
    return RuntimeError(Path(file).read_text("utf-8", "replace") if file else "no reason is known")
