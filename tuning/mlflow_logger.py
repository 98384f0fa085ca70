"""The search in MLflow: an experiment for the search, a run for each trial, also over interruptions.

Ray's own callback begins a second run where a trial goes on, leaves runs open where a search is stopped, and ends a search whose server is
started again.
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

from .trial import trial_name
from .tune_adapters import Live

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TRIAL = "msrn.trial"  # tag of a run: the trial's number


def open_mlflow(uri: str, search: str) -> MlflowRuns:
    """The runs of a search on an MLflow server, or in a folder or database.

    Raises:
        UserError: if the package is missing or nothing answers at the address.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise UserError("--mlflow needs the package mlflow; install it with: pip install 'msrn-ray[mlflow]'")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own 7 make a wrong address a wait of minutes
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(uri)
        client.get_experiment_by_name(search)
    except MlflowException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--mlflow {uri}: cannot be reached ({reason}); start it with: mlflow server") from None
    return MlflowRuns(client, search)


class MlflowRuns(Live, Callback):
    """Logs each trial's parameters, epochs and end. A server that does not answer is said once, and the search goes on.

    Args:
        client: of the server.
        search: names the experiment, which is made with the first trial.
    """

    def __init__(self, client: MlflowClient, search: str) -> None:
        self._client = client
        self._search = search
        self._open: dict[int, str] = {}  # trial -> run
        self._silent = False

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial starts, or goes on."""
        self._try(lambda: self._begin(trial.config["number"], trial.config["overrides"]))

    def _begin(self, number: int, overrides: dict[str, Any]) -> None:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(self._search)
        experiment = found.experiment_id if found else self._client.create_experiment(self._search)
        known = self._client.search_runs([experiment], f"tags.`{_TRIAL}` = '{number}'")
        if known:
            self._client.update_run(known[0].info.run_id, status="RUNNING")
            self._open[number] = known[0].info.run_id
            return
        run = self._client.create_run(experiment, run_name=trial_name(number), tags={_TRIAL: str(number)})
        self._open[number] = run.info.run_id
        self._client.log_batch(run.info.run_id, params=[Param(path, str(value)) for path, value in overrides.items()])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial ends an epoch, which is the step of its metrics."""
        run = self._open.get(trial.config["number"])
        if run is not None:
            self._try(lambda: self._log(run, result))

    def _log(self, run: str, result: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(name, float(value), now, result["epoch"])
            for name, value in result.items()
            if "/" in name and isinstance(value, (int, float))
        ]
        self._client.log_batch(run, metrics)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended, of itself or early."""
        self._end(trial.config["number"], "FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed."""
        self._end(trial.config["number"], "FAILED")

    def close(self) -> None:
        """The search ends; trials that have not ended go on with it."""
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
            self._silent = False
        except MlflowException as error:
            if not self._silent:
                print(
                    f"MLflow does not answer ({' '.join(str(error).split())[:120]}); the search goes on",
                    file=sys.stderr,
                )
            self._silent = True
