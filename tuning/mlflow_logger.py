"""The search in MLflow: an experiment per search, a run per trial, also across interruptions.

We do not use Ray's MLflow callback: it begins a second run for a trial that is resumed, leaves runs open when a search is stopped, and
ends a search whose server restarts.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from msrn_ray.errors import UserError

from .trial_point import TrialPoint, trial_name
from .tune_adapters import NotPickled

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TRIAL = "msrn.trial"  # tag of a run: the trial's number


def open_mlflow(uri: str, search: str) -> MlflowRuns:
    """Open the runs of a search on an MLflow server, or in a folder or database.

    Raises:
        UserError: if the package is missing or nothing answers at the address.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("--mlflow needs the package mlflow; install it with: pip install 'msrn-ray[mlflow]'")
    # MLflow's default of 7 waits minutes at a wrong address
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(uri)
        client.get_experiment_by_name(search)
    except MlflowException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--mlflow {uri}: cannot be reached ({reason}); start it with: mlflow server") from None
    return MlflowRuns(client, search)


class MlflowRuns(NotPickled, Callback):
    """Logs each trial's parameters, epochs and end. The search continues without a server that does not answer, and warns once.

    Args:
        client: of the server.
        search: name of the experiment, which is created with the first trial.
    """

    def __init__(self, client: MlflowClient, search: str) -> None:
        self._client = client
        self._search = search
        self._open: dict[int, str] = {}  # trial -> run
        self._warned = False

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Open the run of a trial that starts or is resumed."""
        self._try(lambda: self._begin(TrialPoint(**trial.config)))

    def _begin(self, point: TrialPoint) -> None:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(self._search)
        experiment = found.experiment_id if found else self._client.create_experiment(self._search)
        known = self._client.search_runs([experiment], f"tags.`{_TRIAL}` = '{point.number}'")
        if known:
            run = known[0].info.run_id
            self._client.update_run(run, status="RUNNING")
        else:
            tags = {_TRIAL: str(point.number)}
            run = self._client.create_run(experiment, run_name=trial_name(point.number), tags=tags).info.run_id
        self._open[point.number] = run
        # of a run that is open again too: its server may not have got them
        self._client.log_batch(run, params=[Param(path, str(value)) for path, value in point.overrides.items()])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Log the metrics of an epoch; MLflow's step is the epoch."""
        run = self._open.get(trial.config["number"])
        if run is not None:
            self._try(lambda: self._log(run, result))

    def _log(self, run: str, result: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        milliseconds = int(1000 * time.time())
        metrics = [
            Metric(name, float(value), milliseconds, result["epoch"])
            for name, value in result.items()
            if "/" in name and isinstance(value, (int, float))
        ]
        self._client.log_batch(run, metrics)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close the run of a trial that ended, after its last epoch or early."""
        self._end(trial.config["number"], "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close the run of a trial that failed."""
        self._end(trial.config["number"], "FAILED")

    def close(self) -> None:
        """Close the runs of the trials that have not ended; a resumed search opens them again."""
        for number in list(self._open):
            self._end(number, "KILLED")

    def _end(self, number: int, status: str) -> None:
        run = self._open.pop(number, None)
        if run is not None:
            self._try(lambda: self._client.set_terminated(run, status))

    def _try(self, call: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            call()
            self._warned = False
        except MlflowException as error:
            if not self._warned:
                reason = " ".join(str(error).split())[:120]
                print(f"MLflow does not answer ({reason}); the search continues without it", file=sys.stderr)
            self._warned = True
