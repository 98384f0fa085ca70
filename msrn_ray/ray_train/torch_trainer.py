"""Builds the TorchTrainer that training and search share, and turns what ends its `fit` into plain errors."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from ..errors import UserError
from ..ray_cluster.allocation import Allocation
from ..ray_cluster.connection import is_local_cluster
from ..ray_cluster.private_api import WorkerGroupStartupTimeoutError
from .checkpoints import SCORE
from .failures import FailureCallback, is_final, wrapped_errors
from .worker_input import WorkerInput

# Ray Train's view of the cluster is up to 20 s stale. So it tries that long to start workers before it counts the cluster again, and
# checks that often whether there is room for more
_ROOM_SECONDS = 20.0
# Grace period before the run exits: Ray Train notices a stop only after it has started its workers, or given up. `cluster/*.yaml` let
# `ray job stop` wait for 30 s
_STOP_SECONDS = _ROOM_SECONDS + 5


def build_trainer(
    train_worker: Callable[[dict[str, Any]], None],
    worker_input: WorkerInput,
    callbacks: Sequence[ray.train.UserCallback],
    allocation: Allocation,
) -> TorchTrainer:
    """Build the TorchTrainer of a training run; Ray must be up.

    Args:
        train_worker: what each worker runs, with `{"input": worker_input}`.
        worker_input: the run. A run folder that exists resumes from its last checkpoint.
        callbacks: passed to Ray Train (Tune's reporting, for example).
        allocation: workers.
    """
    config = worker_input.config
    # how soon Ray Train lists a checkpoint and notices a lost worker or the end; its default is 2 s
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # after the loss of a node Ray Train requests as many workers as before once more, for 60 s by default
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{_ROOM_SECONDS:g}")
    # this process listens for preemption notices; a cluster that was started for this run gets none
    if is_local_cluster():
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # The whole run may search for room without limit, because the watchdog limits each wait. Outside the main thread the watchdog cannot
    # interrupt Ray Train, so its own count limits each wait
    is_main = threading.current_thread() is threading.main_thread()
    room_failures = -1 if is_main else math.ceil(60 * config.resources.wait_minutes / _ROOM_SECONDS)
    return TorchTrainer(
        train_worker,
        train_loop_config={"input": worker_input},
        scaling_config=scaling_config(allocation),
        run_config=run_config(
            worker_input.folder.name,
            config.train.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=SCORE),
            failure_config=ray.train.FailureConfig(
                max_failures=config.train.max_failures,
                controller_failure_limit=room_failures,  # type: ignore[call-arg]  # typed as Train V1
            ),
            callbacks=[FailureCallback(worker_input.events), *callbacks],
        ),
    )


def run_config(name: str, storage: str, **settings: Any) -> ray.train.RunConfig:
    """Return Ray Train's run settings without its own log lines.

    Workers take large tensors from the system in pages of 2 MB, which it provides much faster than 512 small ones. Their threads sleep
    while they wait for each other: spinning threads would steal CPU time from decoding and from the thread that they wait for.
    """
    quiet = ray.train.LoggingConfig(log_level="ERROR")
    wait_policy = os.environ.get("OMP_WAIT_POLICY", "passive")
    environment = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "1", "OMP_WAIT_POLICY": wait_policy}}
    return ray.train.RunConfig(
        name=name, storage_path=storage, logging_config=quiet, worker_runtime_env=environment, **settings
    )  # type: ignore[call-arg]  # typed as Train V1


def scaling_config(allocation: Allocation) -> ray.train.ScalingConfig:
    """Return Ray Train's scaling settings for an allocation."""
    resources = {"CPU": float(allocation.cpus_per_worker)}
    if allocation.use_gpu:
        resources["GPU"] = allocation.gpus_per_worker
    return ray.train.ScalingConfig(
        num_workers=allocation.elastic or allocation.num_workers,  # type: ignore[arg-type]  # typed as Train V1
        elastic_resize_monitor_interval_s=_ROOM_SECONDS,  # type: ignore[call-arg]  # typed as Train V1
        use_gpu=allocation.use_gpu,
        resources_per_worker=resources,
    )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what ends `trainer.fit()`, run as the block, as plain errors.

    Raises:
        UserError, AccountingError: of a worker, unwrapped.
        ray.train.TrainingFailedError: for any other failure.
        KeyboardInterrupt: after Ctrl-C and after SIGTERM, which `ray job stop` sends.
    """
    try:
        with _sigterm_as_ctrl_c():
            yield
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
