"""Runs a TorchTrainer to its end: unwraps errors, retries with fewer workers, and stops cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import ray
import ray.train
from ray.train.torch import TorchTrainer

from ..errors import NoDecodeCpuError, UserError
from ..ray_cluster.allocation import Allocation, with_fewer
from ..ray_cluster.private_api import WorkerGroupStartupTimeoutError
from ..settings import ResourceSettings
from .failures import is_final, wrapped_errors

# Ray Train's view of the cluster is up to 20 s stale. So it tries that long to start workers before it counts the cluster again, and
# checks that often whether there is room for more
ROOM_SECONDS = 20.0
# Grace period before the run exits: Ray Train notices a stop only after it has started its workers, or given up. `cluster/*.yaml` let
# `ray job stop` wait for 30 s
_STOP_SECONDS = ROOM_SECONDS + 5


def fit_elastic(
    build: Callable[[Allocation], TorchTrainer],
    settings: ResourceSettings,
    allocation: Allocation,
    log: Callable[[str], None],
) -> ray.train.Result:
    """Call `fit`, again with fewer workers if Ray Train has started one per CPU, as it does after the loss of a node.

    Args:
        build: makes the trainer for an allocation; it resumes from the last checkpoint.
        settings, allocation: what was requested, and what the run takes at first.
        log: prints a line for the user.

    Raises:
        NoDecodeCpuError: if fewer workers would not help.
    """
    while True:
        try:
            return fit(build(allocation))
        except NoDecodeCpuError:
            fewer = with_fewer(allocation, settings)
            if fewer is None:
                raise
            allocation = fewer
            log(
                f"the workers hold every CPU that is left; continuing with {allocation.num_workers} workers, so that one CPU"
                " decodes images"
            )


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Run `trainer.fit()` with plain errors.

    Raises:
        UserError, AccountingError: of a worker, unwrapped.
        ray.train.TrainingFailedError: for any other failure.
        KeyboardInterrupt: after Ctrl-C and after SIGTERM, which `ray job stop` sends.
    """
    try:
        with _sigterm_as_ctrl_c():
            return trainer.fit()
    except ray.train.TrainingFailedError as failure:
        for error in wrapped_errors(failure):
            if is_final(error):
                raise error from None
            if isinstance(error, WorkerGroupStartupTimeoutError):
                resources = ray.cluster_resources()
                raise UserError(
                    f"no room for {error.num_workers} workers for longer than resources.wait_minutes: the cluster has"
                    f" {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs now; bring its nodes back, or lower"
                    " resources.num_workers, and resume with --resume"
                ) from None
        raise
    except SystemExit:  # Ray's handler of SIGINT stops the workers and then exits
        raise KeyboardInterrupt from None


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that Ray Train returns the resources that the run requested; else Ray holds them for three minutes.

    If that takes long, or Ray is gone as well (`timeout` ends both), the run exits without it.
    """
    if threading.current_thread() is not threading.main_thread():  # Ray sets no handler in other threads
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    second_sigterm = threading.Timer(_STOP_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))

    def stop(_: int, frame: FrameType | None) -> None:
        ctrl_c = signal.getsignal(signal.SIGINT)
        if second_sigterm.ident is not None or not callable(ctrl_c):  # a shell's background jobs ignore SIGINT
            sys.exit()
        second_sigterm.start()
        ctrl_c(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        second_sigterm.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
