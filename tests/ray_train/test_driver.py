"""What the driver does when a worker fails, without workers. Whole runs are in test_train and test_interruptions."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from msrn_ray.config import ExperimentConfig, load_config
from msrn_ray.errors import AccountingError, BadImagesError, NoDecodeCpuError, UserError
from msrn_ray.presets import PRESETS
from msrn_ray.ray_cluster.allocation import Allocation
from msrn_ray.ray_cluster.private_api import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from msrn_ray.ray_train import driver, torch_trainer
from msrn_ray.ray_train.driver import fit_elastic, train
from msrn_ray.ray_train.event_pump import event_pump
from msrn_ray.ray_train.failures import FailureCallback
from msrn_ray.runs import state as run_state
from msrn_ray.runs.events import BadImagesFound, Event, WorkerFailed
from msrn_ray.runs.folder import CONFIG_FILE, make_folder
from msrn_ray.runs.state import list_runs
from msrn_ray.settings import ResourceSettings
from tests.ray_cluster.test_allocation import cluster
from tests.tiny import make_coco


def fit(trainer: Any) -> None:
    fit_elastic(lambda _: trainer, ResourceSettings(), Allocation(2, False, 1), print)


class RecordingQueue:
    """Stands in for the queue of events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.actor = SimpleNamespace(put=SimpleNamespace(remote=self.events.append))


@pytest.mark.parametrize("error", [UserError("fix it"), BadImagesError("too many"), AccountingError("twice")])
def test_final_error_is_not_retried(error: Exception) -> None:
    """Nothing is retried, whichever rank raises the error and whatever the other ranks raise."""
    queue = RecordingQueue()
    with pytest.raises(type(error), match=str(error)):
        FailureCallback(queue).after_exception(None, {0: RuntimeError("connection closed"), 1: error})
    assert queue.events == []


def test_lost_worker_is_named_before_the_others() -> None:
    queue = RecordingQueue()
    lost = WorkerHealthCheckFailedError("health check failed", RuntimeError("The actor died unexpectedly\nand more"))
    FailureCallback(queue).after_exception(None, {0: RuntimeError("connection closed"), 1: lost})
    FailureCallback(queue).after_exception(None, {2: MemoryError()})
    assert queue.events == [
        WorkerFailed("worker 1 failed: The actor died unexpectedly"),
        WorkerFailed("worker 2 failed: MemoryError"),
    ]


def test_run_folder_never_exists_without_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill that interrupts making the folder, the run can start anew. An existing folder stays as it is."""
    save = ExperimentConfig.save

    def save_and_be_killed(config: ExperimentConfig, path: Path) -> None:
        save(config, path)
        raise SystemExit

    run = tmp_path / "runs/run"
    with monkeypatch.context() as patch:
        patch.setattr(ExperimentConfig, "save", save_and_be_killed)
        with pytest.raises(SystemExit):
            make_folder(run, ExperimentConfig())
    assert not run.exists()
    make_folder(run, ExperimentConfig())
    assert load_config(run / CONFIG_FILE) == ExperimentConfig()
    with pytest.raises(OSError, match="not empty"):
        make_folder(run, ExperimentConfig(preset="voc2007"))
    assert load_config(run / CONFIG_FILE) == ExperimentConfig()
    assert len(list(tmp_path.glob("runs/*"))) == 2, "the leftover of the kill, and the run"


def test_run_waiting_for_nodes_is_not_resumed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_coco(tmp_path / "data", {"train": [[0], [1], [2], [0, 1]] * 4, "val": [[0], [1, 2]]})
    config = PRESETS["scenes"].config.with_overrides(
        {"data.dataset": "coco", "data.root": str(root), "train.storage": str(tmp_path), "train.run_name": "run"}
    )
    make_folder(tmp_path / "run", config)

    def wait_for_nodes(_: object) -> None:
        (run,) = list_runs(tmp_path)
        assert run.state == "running"
        monkeypatch.setattr(run_state, "socket", SimpleNamespace(gethostname=lambda: "another machine"))
        with pytest.raises(UserError, match=r"run: process \d+ on .* still trains this run"):
            train(config, resume=True)
        raise UserError("no node came")

    monkeypatch.setattr(driver, "connect", lambda _: None)
    monkeypatch.setattr(driver, "allocate", wait_for_nodes)
    with pytest.raises(UserError, match="no node came"):
        train(config, resume=True)
    (run,) = list_runs(tmp_path)
    assert (run.state, run.reason) == ("failed", "no node came")


def trainer_that_raises(failure: Exception) -> Any:
    def raise_failure() -> None:
        raise failure

    return SimpleNamespace(fit=raise_failure)


@pytest.mark.parametrize(
    "wrap",
    [ControllerError, lambda error: WorkerGroupError("failed", {0: RuntimeError("connection closed"), 1: error})],
)
def test_user_error_is_raised_unwrapped(wrap: Any) -> None:
    with pytest.raises(UserError, match="fix it"):
        fit(trainer_that_raises(wrap(UserError("fix it"))))


def test_other_failures_stay_wrapped() -> None:
    with pytest.raises(TrainingFailedError, match="lost"):
        fit(trainer_that_raises(WorkerGroupError("lost", {0: RuntimeError("lost")})))


def test_too_few_resources_are_reported_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0, "GPU": 1.0})
    with pytest.raises(UserError, match=r"no room for 2 workers .* 3 CPUs and 1 GPUs now.*num_workers.*--resume"):
        fit(trainer_that_raises(ControllerError(WorkerGroupStartupTimeoutError(2))))


@pytest.mark.parametrize("hangs", [False, True])
def test_sigterm_stops_like_ctrl_c(monkeypatch: pytest.MonkeyPatch, hangs: bool) -> None:
    """Ray's handler of SIGINT gives back the resources of the run and exits, or hangs."""
    monkeypatch.setattr("msrn_ray.ray_train.torch_trainer._STOP_SECONDS", 0.2)
    stop_signals = signal.SIGINT, signal.SIGTERM
    old_handlers = [signal.getsignal(number) for number in stop_signals]
    had_timer = signal.getitimer(signal.ITIMER_REAL)[0] > 0
    stopped = []

    def abort(*_: object) -> None:
        stopped.append(True)
        if hangs:
            time.sleep(100)
        sys.exit(0)

    def stop_itself() -> None:
        signal.signal(signal.SIGINT, abort)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)

    with pytest.raises(KeyboardInterrupt):
        fit(cast(Any, SimpleNamespace(fit=stop_itself)))
    assert stopped == [True]
    assert [signal.getsignal(number) for number in stop_signals] == old_handlers
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == had_timer, (
        "the caller's timer, such as a test's time limit, stays"
    )


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_before_ray_installs_its_handler(handler: Any) -> None:
    """Background jobs of a shell ignore SIGINT, but not SIGTERM."""
    old_handler = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(cast(Any, SimpleNamespace(fit=lambda: os.kill(os.getpid(), signal.SIGTERM))))
    finally:
        signal.signal(signal.SIGINT, old_handler)


@pytest.mark.parametrize(
    ("remaining", "settings", "initial", "tried"),
    [
        ({"CPU": 2.0}, {"num_workers": "1..3"}, Allocation(3, False, 1, (1, 3)), [1]),
        ({"CPU": 5.0}, {"num_workers": "2..6"}, Allocation(6, False, 1, (2, 6)), [4]),
        ({"CPU": 6.0}, {"num_workers": "1..3"}, Allocation(3, False, 1, (1, 3), runs=2), [2]),
        (
            {"CPU": 64.0, "GPU": 8.0},
            {"num_workers": "1..8", "cpus_per_worker": 8},
            Allocation(7, True, 8, (1, 8)),
            [7],
        ),
        (
            {"CPU": 4.0},
            {"num_workers": "1..3"},
            Allocation(3, False, 1, (1, 3)),
            [],
        ),  # three workers fit: no reason to try fewer
        ({"CPU": 2.0}, {"num_workers": 3}, Allocation(3, False, 1), []),
    ],
)
def test_fewer_workers_until_a_cpu_decodes(
    monkeypatch: pytest.MonkeyPatch,
    remaining: dict[str, float],
    settings: dict[str, Any],
    initial: Allocation,
    tried: list[int],
) -> None:
    """Fewer workers never suffice in this test: every attempt takes fewer than the previous attempt, until the error."""
    cluster(monkeypatch, cpus=remaining["CPU"], gpus=remaining.get("GPU"))
    attempts: list[Allocation] = []
    logged: list[str] = []

    def build(allocation: Allocation) -> Any:
        attempts.append(allocation)
        return trainer_that_raises(ControllerError(NoDecodeCpuError("no CPU")))

    with pytest.raises(NoDecodeCpuError):
        fit_elastic(build, ResourceSettings(**settings), initial, logged.append)
    assert attempts[0] == initial
    assert [attempt.num_workers for attempt in attempts[1:]] == tried
    assert all(attempt.runs == initial.runs for attempt in attempts)
    assert [attempt.elastic[1] for attempt in attempts[1:] if attempt.elastic] == [
        attempt.num_workers for attempt in attempts[1:] if attempt.elastic
    ]
    assert len(logged) == len(tried)


@pytest.mark.parametrize(("user_policy", "policy"), [(None, "passive"), ("active", "active")])
def test_waiting_worker_threads_sleep(monkeypatch: pytest.MonkeyPatch, user_policy: str | None, policy: str) -> None:
    """The user's environment takes precedence."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if user_policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", user_policy)
    environment = torch_trainer.run_config("run", "runs").worker_runtime_env
    assert cast(Any, environment)["env_vars"]["OMP_WAIT_POLICY"] == policy


class LocalQueue(list[Event]):
    """Stands in for the queue of events, in this process."""

    def qsize(self) -> int:
        return len(self)

    def empty(self) -> bool:
        return not self

    def get_nowait_batch(self, number: int) -> list[Event]:
        batch = self[:number]
        del self[:number]
        return batch


def test_failing_log_ends_the_log_not_the_training(tmp_path: Path) -> None:
    """The watchdog gets the later events, the log none; the error comes when the training ends."""
    handled: list[Event] = []
    forgotten: list[bool] = []

    def fail(event: Event) -> None:
        handled.append(event)
        raise OSError(errno.ENOSPC, "No space left on device")

    log: Any = SimpleNamespace(folder=tmp_path, handle=fail, close=lambda: None)
    watchdog: Any = SimpleNamespace(check=lambda: None, forget_workers=lambda: forgotten.append(True))
    first, second = BadImagesFound("train", ()), WorkerFailed("lost")
    events: Any = LocalQueue([first, second])
    message = r"cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=message), event_pump(events, log, watchdog):
        pass
    assert handled == [first]
    assert forgotten == [True]
