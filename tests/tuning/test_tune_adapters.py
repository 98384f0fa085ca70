"""Between Ray Tune and the study: trials, failures and their causes, early stopping, the time budget."""

from __future__ import annotations

from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.exceptions
import ray.train
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from rich.console import Console

from msrn_ray.errors import NonFiniteLossError, StoppedEarlyError, UserError
from msrn_ray.ray_cluster.private_api import WorkerHealthCheckFailedError
from msrn_ray.ray_train.failures import describe_failure
from tests.tuning.studies import plan_of
from tuning.live_table import LiveTable
from tuning.study import SearchStudy
from tuning.study_storage import create_study
from tuning.trial_callback import StudyClient, TrialCallback
from tuning.tune_adapters import SearchProgress, SearchStopper, StudySearcher


class LocalTrial(Trial):
    """A trial of Ray Tune that writes its errors into a given folder, without a Ray cluster and its session folder."""

    def __init__(self, config: dict[str, Any], folder: Path) -> None:
        super().__init__("run_trial", stub=True, config=config)
        self._folder = folder

    @property
    def local_path(self) -> str:
        return str(self._folder)


class LocalStudyClient(StudyClient):
    """Calls a study in this process."""

    def __init__(self, study: SearchStudy) -> None:
        super().__init__(study)

    def stopped_because(self) -> str | None:
        return self._actor.stopped_because

    def _call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._actor, method)(*arguments)


def wrapped(cause: Exception) -> Exception:
    """Return what Ray raises for an error of a worker's function."""
    return ray.exceptions.RayTaskError("run_trial", f"Traceback ...\n{type(cause).__name__}: {cause}", cause)


def test_tune_runs_the_study_and_reports_failures(url: str, tmp_path: Path) -> None:
    study = create_study(url, "s", plan_of(sampler="random"), 5)
    study_client, stopper = LocalStudyClient(study), SearchStopper(None)
    searcher = StudySearcher(study_client)
    progress = SearchProgress(study_client, LiveTable(study, Console(file=StringIO())), stopper)
    for number in range(3):
        assert not stopper.stop_all()
        config = searcher.suggest("id")
        assert isinstance(config, dict)
        assert config["number"] == number
        trial = LocalTrial(config, tmp_path)
        trial.handle_error(wrapped(NonFiniteLossError(f"the loss is not finite at step {number}")))
        progress.on_trial_error(1, [], trial)
    assert [trial.user_attrs["failure"] for trial in study.drawn_trials(TrialState.FAIL)] == [
        f"NonFiniteLossError: the loss is not finite at step {number}" for number in range(3)
    ]
    assert stopper.stop_all()
    assert searcher.suggest("id") == "FINISHED"


def test_trial_ends_itself_where_the_study_says(url: str) -> None:
    study = create_study(url, "s", plan_of(sampler="random"), 2)
    for number, score in ((0, 0.9), (1, 0.1)):
        study.next_trial()
        reported: list[Any] = []
        tune = SimpleNamespace(after_report=lambda run, metrics, checkpoint, to=reported: to.append(metrics[0]))
        callback = TrialCallback(LocalStudyClient(study), number, tune)
        callback.after_report(None, [{"epoch": 1, "loss": 1.0}], None)
        with pytest.raises(StoppedEarlyError) if number else nullcontext():
            callback.after_report(None, [{"epoch": 1, "val/mAP": score}, {"val/mAP": 1.0}], None)
        assert reported == [{"epoch": 1, "val/mAP": score}], "Tune gets the epoch that ends a trial too"
    assert [trial.state for trial in study.study.get_trials()] == [TrialState.RUNNING, TrialState.PRUNED]


def test_search_stops_when_its_time_is_up() -> None:
    assert not SearchStopper(None).stop_all()
    assert not SearchStopper(1000).stop_all()
    assert SearchStopper(0).stop_all()


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (NonFiniteLossError("not finite at step 4"), "NonFiniteLossError", "NonFiniteLossError: not finite at step 4"),
        (wrapped(MemoryError("12 GB")), "OutOfMemoryError", "OutOfMemoryError: 12 GB"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: 8 GB"),
            "OutOfMemoryError",
            "DefaultCPUAllocator: can't allocate memory: 8 GB",
        ),
        (
            UserError("rank 1 hangs for 12 min"),
            "UserError: rank 0 hangs for 0 min",
            "UserError: rank 1 hangs for 12 min",
        ),
        (
            wrapped(
                ray.train.WorkerGroupError(
                    "2 of 2 failed",
                    {
                        0: RuntimeError("Connection closed by peer"),
                        1: WorkerHealthCheckFailedError("lost", ray.exceptions.WorkerCrashedError()),
                    },
                )
            ),
            "WorkerCrashedError",
            "The worker died unexpectedly",
        ),
        (ray.exceptions.OutOfMemoryError("killed"), "OutOfMemoryError", "killed"),
        (RuntimeError(""), "RuntimeError: ", "RuntimeError"),
        (
            wrapped(ray.train.WorkerGroupError("2 of 2 failed", {1: ray.exceptions.NodeDiedError("the node is lost")})),
            "NodeDiedError",
            "the node is lost",
        ),
        (ray.train.ControllerError(KeyError("no rendezvous")), "KeyError", "KeyError: 'no rendezvous'"),
    ],
)
def test_failure_is_described_by_its_cause(error: BaseException, kind: str, reason: str) -> None:
    assert describe_failure(error)[0] == kind
    assert reason in describe_failure(error)[1]
    assert "\n" not in describe_failure(error)[1]


def test_memory_comes_before_the_lost_worker() -> None:
    lost = WorkerHealthCheckFailedError("lost", ray.exceptions.WorkerCrashedError())
    error = ray.train.WorkerGroupError("2 of 2 failed", {0: lost, 1: MemoryError("12 GB")})
    assert describe_failure(error)[0] == "OutOfMemoryError"


@pytest.mark.parametrize(
    "error", [MemoryError(), WorkerHealthCheckFailedError("lost", ray.exceptions.OutOfMemoryError("killed"))]
)
def test_trial_out_of_memory_is_not_restarted(error: Exception) -> None:
    callback = TrialCallback(cast(Any, None), 0, cast(Any, None))
    callback.after_exception(None, {0: RuntimeError("connection closed")})
    with pytest.raises((MemoryError, ray.exceptions.OutOfMemoryError)):
        callback.after_exception(None, {0: RuntimeError("connection closed"), 1: error})
