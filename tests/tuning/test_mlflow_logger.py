"""The search's log in MLflow, on a real server on this machine with an SQLite database."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from msrn_ray.errors import UserError
from tuning.mlflow_logger import MlflowRuns, open_mlflow

mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running MLflow server."""
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


def trial(number: int) -> Any:
    """Return the part of a Tune trial that the callback reads."""
    return SimpleNamespace(
        config={"number": number, "overrides": {"model.tau": 0.1 * number, "model.levels": ["layer4"]}}
    )


def epoch_of(number: int, epoch: int) -> dict[str, Any]:
    return {"training_iteration": 1, "epoch": epoch, "val/mAP": 0.1 * number * epoch, "protocol": "honest"}


def test_resumed_trial_is_one_run_with_every_epoch(server: str) -> None:
    first = open_mlflow(server, "my-search")
    for number in (1, 2, 3):
        first.on_trial_start(0, [], trial(number))
        first.on_trial_result(0, [], trial(number), epoch_of(number, 1))
    first.on_trial_error(0, [], trial(2))
    first.on_trial_complete(0, [], trial(3))
    first.close()  # the time is up
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("my-search").experiment_id

    def runs() -> list[Any]:
        return sorted(client.search_runs([experiment]), key=lambda run: run.info.run_name)

    assert [run.info.status for run in runs()] == ["KILLED", "FAILED", "FINISHED"]

    again = open_mlflow(server, "my-search")
    again.on_trial_start(0, [], trial(1))
    assert runs()[0].info.status == "RUNNING"
    again.on_trial_result(0, [], trial(1), epoch_of(1, 2))
    again.on_trial_complete(0, [], trial(1))
    again.close()
    assert [(run.info.run_name, run.info.status) for run in runs()] == [
        ("trial_0001", "FINISHED"),
        ("trial_0002", "FAILED"),
        ("trial_0003", "FINISHED"),
    ]
    run = runs()[0]
    assert run.data.params == {"model.tau": "0.1", "model.levels": "['layer4']"}
    history = client.get_metric_history(run.info.run_id, "val/mAP")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.1), (2, 0.2)]


def test_search_survives_a_lost_server_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    runs = MlflowRuns(mlflow.MlflowClient("http://127.0.0.1:9"), "1")
    for number in (1, 2):
        runs.on_trial_start(0, [], trial(number))
        runs.on_trial_result(0, [], trial(number), epoch_of(number, 1))
        runs.on_trial_complete(0, [], trial(number))
    assert capsys.readouterr().err.count("MLflow does not answer") == 1


def test_unreachable_server_is_refused_before_the_search() -> None:
    with pytest.raises(UserError, match=r"--mlflow http://127\.0\.0\.1:9: cannot be reached .*mlflow server"):
        open_mlflow("http://127.0.0.1:9", "my-search")
