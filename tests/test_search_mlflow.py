"""The search's log in MLflow, against a real server on this machine with SQLite behind it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from msrn_ray.errors import UserError
from tuning.search import mlflow_callbacks

mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


class FakeTrial:
    """What the callback looks at of a trial of Tune's."""

    def __init__(self, number: int) -> None:
        self.config: dict[str, Any] = {
            "number": number,
            "overrides": {"model.tau": 0.1 * number, "model.levels": ["layer4"]},
        }

    def __str__(self) -> str:
        return f"trial_{self.config['number']}"


def test_each_trial_is_a_run_with_its_parameters_and_every_epoch(server: str) -> None:
    (callback,) = mlflow_callbacks(server, "my-search")
    callback.setup()
    for number, failed in ((1, False), (2, True)):
        trial = FakeTrial(number)
        callback.log_trial_start(trial)
        for epoch in (1, 2):
            result = {
                "training_iteration": epoch,
                "epoch": epoch,
                "val/mAP": 0.1 * number * epoch,
                "protocol": "honest",
            }
            callback.log_trial_result(epoch, trial, result)
        callback.log_trial_end(trial, failed=failed)
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("my-search")
    runs = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.data.params["number"])
    assert [run.info.status for run in runs] == ["FINISHED", "FAILED"]
    for number, run in enumerate(runs, 1):
        assert float(run.data.params["overrides/model.tau"]) == pytest.approx(0.1 * number)
        history = client.get_metric_history(run.info.run_id, "val/mAP")
        assert [(one.step, one.value) for one in history] == [(1, 0.1 * number), (2, 0.2 * number)]


def test_an_address_where_nothing_answers_is_said_before_the_search_starts() -> None:
    with pytest.raises(UserError, match=r"--mlflow http://127\.0\.0\.1:9: cannot be reached .*mlflow server"):
        mlflow_callbacks("http://127.0.0.1:9", "my-search")


def test_nothing_is_logged_unless_asked_for() -> None:
    assert mlflow_callbacks(None, "my-search") == []
