"""`fit` of Ray Train: with errors that a user can mend raised as themselves, room found again, and a run that stops when it is told to."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from ..config import ResourceSettings
from ..errors import AccountingError, NoDecodeCpuError, UserError
from ..ray_cluster.allocation import Allocation, with_fewer

# Ray Train's view of the cluster is up to 20 s old: how long it tries to start workers before it looks again, and how often it looks
# whether there is room for more
ROOM_SECONDS = 20.0


# A run that is told to stop gets so long for that before it only ends: Ray Train hears of it when it has started its workers, or given
# up; `cluster/*.yaml` have `ray job stop` wait for 30 s
_STOP_SECONDS = ROOM_SECONDS + 5


def run_elastic(
    build: Callable[[Allocation], TorchTrainer],
    settings: ResourceSettings,
    allocation: Allocation,
    say: Callable[[str], None],
) -> ray.train.Result:
    """`run_trainer`, again with fewer workers where Ray Train has started one for every CPU, as it does after the loss of a node.

    Args:
        build: the trainer for an allocation; it goes on from the last checkpoint.
        settings, allocation: what was asked for, and what the run takes at first.
        say: prints a line for the user.

    Raises:
        NoDecodeCpuError: where fewer workers would not help.
    """
    while True:
        try:
            return run_trainer(build(allocation))
        except NoDecodeCpuError:
            fewer = with_fewer(allocation, settings)
            if fewer is None:
                raise
            allocation = fewer
            say(f"every CPU left is held by a worker; going on with {allocation.num_workers}, so that one decodes")


def run_trainer(trainer: TorchTrainer) -> ray.train.Result:
    """`fit`, with a worker's error that the user can mend raised as itself instead of inside Ray's, and Ctrl-C and SIGTERM (as
    `ray job stop` sends) as KeyboardInterrupt."""
    try:
        with _stopping():
            return trainer.fit()
    except ray.train.TrainingFailedError as failure:
        errors = [getattr(failure, "controller_failure", None), *getattr(failure, "worker_failures", {}).values()]
        for error in errors:
            if isinstance(error, (UserError, AccountingError)):
                raise error from None
            if isinstance(error, WorkerGroupStartupTimeoutError):
                there = ray.cluster_resources()
                raise UserError(
                    f"no room for {error.num_workers} workers for longer than resources.wait_minutes: the cluster has"
                    f" {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs now; bring its machines back, or lower"
                    " resources.num_workers, and go on with --resume"
                ) from None
        raise
    except SystemExit:  # Ray's handler of SIGINT stops the workers and then exits
        raise KeyboardInterrupt from None


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM is as Ctrl-C, so that Ray Train gives back what the run has asked of the cluster, which would else be held for three minutes.

    Where that takes long, or Ray is gone as well (`timeout` ends both), the run stops without.
    """
    if threading.current_thread() is not threading.main_thread():  # elsewhere Ray sets no handler
        yield
        return
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    again = threading.Timer(_STOP_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))

    def stop(_: int, frame: FrameType | None) -> None:
        as_ctrl_c = signal.getsignal(signal.SIGINT)
        if again.ident is not None or not callable(as_ctrl_c):  # a shell's background jobs ignore SIGINT
            sys.exit()
        again.start()
        as_ctrl_c(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        again.cancel()
        for which, handler in before.items():
            signal.signal(which, handler)
