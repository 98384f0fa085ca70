"""What the driver does with a worker's failure, without workers; whole runs are in test_train and test_interruptions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

from msrn_ray.errors import AccountingError, BadImagesError, UserError
from msrn_ray.trainer import Failures, run_trainer


class Told:
    """In place of the queue of events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.actor = SimpleNamespace(put=SimpleNamespace(remote=self.events.append))


@pytest.mark.parametrize("error", [UserError("mend it"), BadImagesError("too many"), AccountingError("twice")])
def test_an_error_that_would_come_again_is_not_tried_again(error: Exception) -> None:
    """Whichever rank has it, and whatever the others say meanwhile."""
    told = Told()
    with pytest.raises(type(error), match=str(error)):
        Failures(told).after_exception(None, {0: RuntimeError("connection closed"), 1: error})
    assert told.events == []


def test_a_lost_worker_is_named_before_those_that_miss_it() -> None:
    told = Told()
    lost = WorkerHealthCheckFailedError("health check failed", RuntimeError("The actor died unexpectedly\nand more"))
    Failures(told).after_exception(None, {0: RuntimeError("connection closed"), 1: lost})
    Failures(told).after_exception(None, {2: MemoryError()})
    assert told.events == [
        {"kind": "failure", "text": "worker 1 failed: The actor died unexpectedly"},
        {"kind": "failure", "text": "worker 2 failed: MemoryError"},
    ]
    Failures(None).after_exception(None, {0: RuntimeError("nobody listens, as in a search")})


def failing(failure: Exception) -> Any:
    def fit() -> None:
        raise failure

    return SimpleNamespace(fit=fit)


@pytest.mark.parametrize(
    "wrap",
    [ControllerError, lambda error: WorkerGroupError("failed", {0: RuntimeError("connection closed"), 1: error})],
)
def test_an_error_that_the_user_can_mend_is_raised_as_itself(wrap: Any) -> None:
    with pytest.raises(UserError, match="mend it"):
        run_trainer(failing(wrap(UserError("mend it"))))


def test_other_failures_stay_ray_trains() -> None:
    with pytest.raises(TrainingFailedError, match="lost"):
        run_trainer(failing(WorkerGroupError("lost", {0: RuntimeError("lost")})))


def test_room_that_never_comes_back_is_told_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 3.0, "GPU": 1.0})
    with pytest.raises(UserError, match=r"no room for 2 workers .* 3 CPUs and 1 GPUs now.*num_workers.*--resume"):
        run_trainer(failing(ControllerError(WorkerGroupStartupTimeoutError(2))))
