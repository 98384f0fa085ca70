"""Trains a model from a config: gathers the inputs, starts Ray, runs the workers and keeps the run folder."""

from __future__ import annotations

import _thread
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue

from ..config import ExperimentConfig
from ..errors import NoDecodeCpuError, UserError
from ..ray_cluster.allocation import Allocation, allocate, with_fewer
from ..ray_cluster.connection import check_shared, connect, on_node
from ..ray_cluster.private_api import get_or_create_stats_actor
from ..runs.checkpoint import find_model_file, load_checkpoint
from ..runs.folder import FAILURE_FILE, absolute_paths, cannot_be_written, open_folder
from ..runs.log import RunLog, read_test
from ..runs.resume import check_data, check_list, check_resumable, describe_data
from ..runs.split_file import RecordedSplits, save_splits
from ..runs.state import check_stopped, is_complete, kept_state
from ..settings import ResourceSettings
from ..training.inputs import check_batch, describe_inputs, gather_inputs
from .event_pump import event_pump
from .torch_trainer import build_trainer, plain_errors
from .watchdog import Watchdog, WatchdogActions, end_process
from .worker import train_worker
from .worker_input import StoredInputs, WorkerInput, store_inputs


@dataclass(frozen=True)
class TrainResult:
    """Where a run is and how good it is.

    Attributes:
        run_folder: config, metrics, curves, checkpoints.
        best_checkpoint: folder of the best epoch.
        metrics: `val/...` of the best epoch, and `test/...` of the same weights if the protocol has a test split.
    """

    run_folder: Path
    best_checkpoint: Path
    metrics: dict[str, float]


def train(config: ExperimentConfig, *, resume: bool = False) -> TrainResult:
    """Train from start to end, with progress on the terminal and a run folder as the result.

    Args:
        config: the experiment. The run folder is `train.storage`/`train.run_name`.
        resume: resume that run from its last checkpoint instead of refusing its folder.

    Raises:
        UserError: for input that the user can fix, before anything is written if possible.
    """
    config = absolute_paths(config)
    name = config.train.run_name or f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.with_overrides({"train.run_name": name})
    folder = Path(config.train.storage) / name
    if resume:
        check_resumable(folder, config)
        check_stopped(folder)
        if is_complete(folder, config.train.epochs):
            print(f"{folder}: all {config.train.epochs} epochs are done; raise train.epochs to train more", flush=True)
            return _result(folder, read_test(folder))
    elif folder.exists():
        raise UserError(
            f"{folder} exists already; give another train.run_name, or resume it: --resume {folder}, or --or-resume"
        )
    inputs = gather_inputs(config)
    check_batch(config, len(inputs.splits.train))
    data = describe_data(inputs.splits, config)
    if resume:
        check_data(folder, data)
        if check_list(folder):
            print(
                "its first checkpoint was cut off before Ray Train listed it; the run starts from the beginning",
                flush=True,
            )
    for line in describe_inputs(inputs, config):
        print(line, flush=True)
    print("starting Ray and the workers (the first run on a machine also compiles kernels)", flush=True)
    # a second driver that resumes this run must see that this one is alive, even while it still waits for nodes
    with kept_state(folder) if resume else nullcontext():
        connect(config.resources)
        allocation = allocate(config.resources)
        try:
            log, _ = run_in_folder(config, store_inputs(inputs, data), allocation, fresh=not resume)
        except KeyboardInterrupt:
            print(f"interrupted; resume with: msrn train --resume {folder}", file=sys.stderr)
            raise
        except ray.train.TrainingFailedError:
            print(f"the run stopped; fix the cause, then resume with: msrn train --resume {folder}", file=sys.stderr)
            raise
    return _result(folder, log.test)


def _result(folder: Path, test: Mapping[str, float]) -> TrainResult:
    best = find_model_file(folder).parent
    metrics = {name: value for name, value in load_checkpoint(best).metrics.items() if name.startswith("val/")}
    return TrainResult(folder, best, metrics | dict(test))


def run_in_folder(
    config: ExperimentConfig,
    stored: StoredInputs,
    allocation: Allocation,
    callbacks: Sequence[ray.train.UserCallback] = (),
    *,
    fresh: bool = False,
) -> tuple[RunLog, ray.train.Result]:
    """Train into the run folder `train.storage`/`train.run_name`, and end workers that hang.

    Args:
        config: the experiment.
        stored: its data.
        allocation: its workers.
        callbacks: passed to Ray Train.
        fresh: the folder must not exist yet.

    Returns:
        The run's log, and Ray Train's result.

    Raises:
        UserError: for what the user can fix; the message is in the folder's FAILURE_FILE too.
        ray.train.TrainingFailedError: for any other failure.
    """
    assert config.train.run_name is not None
    folder = Path(config.train.storage) / config.train.run_name
    try:
        check_shared(folder.parent)
    except OSError as error:
        raise cannot_be_written(folder, error) from None
    open_folder(folder, config, stored.data, fresh=fresh)
    tables = {name: ray.get(split.table) for name, split in stored.splits.items()}
    save_splits(folder, RecordedSplits(tables, stored.counts.names, stored.data["fingerprint"]))
    # an actor on another node would be lost with that node
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": on_node()})
    # Ray Data's own actor starts where it is first used and outlives the run. On another node it would keep that node from becoming idle
    # after it was drained
    get_or_create_stats_actor()
    log = RunLog(folder)
    watchdog = _build_watchdog(config, log)
    worker_input = WorkerInput(config, stored, events, allocation.runs)
    build = partial(build_trainer, train_worker, worker_input, callbacks)
    try:
        # `train` keeps the state of a resumed run too; a trial of a search has only this
        with kept_state(folder), event_pump(events, log, watchdog):
            try:
                result = fit_elastic(build, config.resources, allocation, log.say)
            except KeyboardInterrupt:
                if watchdog.give_up_reason is None:
                    raise
                raise UserError(watchdog.give_up_reason) from None
    except ray.train.TrainingFailedError:
        if watchdog.hang is None:
            raise
        _write_failure(folder, watchdog.hang)
        raise UserError(watchdog.hang) from None
    except UserError as error:
        _write_failure(folder, str(error))
        raise
    return log, result


def fit_elastic(
    build: Callable[[Allocation], TorchTrainer],
    settings: ResourceSettings,
    allocation: Allocation,
    log: Callable[[str], None],
) -> ray.train.Result:
    """Train, again with fewer workers if Ray Train has started one per CPU, as it does after the loss of a node.

    Args:
        build: makes the trainer for an allocation; it resumes from the last checkpoint.
        settings, allocation: what was requested, and what the run takes at first.
        log: prints a line for the user.

    Raises:
        NoDecodeCpuError: if fewer workers would not help.
    """
    while True:
        trainer = build(allocation)
        try:
            with plain_errors():
                return trainer.fit()
        except NoDecodeCpuError:
            fewer = with_fewer(allocation, settings)
            if fewer is None:
                raise
            allocation = fewer
            log(
                f"the workers hold every CPU that is left; continuing with {allocation.num_workers} workers, so that one CPU"
                " decodes images"
            )


def _build_watchdog(config: ExperimentConfig, log: RunLog) -> Watchdog:
    """Return the run's watchdog. Only in the main thread it can interrupt Ray Train; a search runs trials in other threads."""
    is_main = threading.current_thread() is threading.main_thread()
    give_up = _thread.interrupt_main if is_main else lambda: None
    wait_minutes = config.resources.wait_minutes if is_main else math.inf
    actions = WatchdogActions(log.say, end_process, give_up)
    return Watchdog(config.train.hang_minutes, actions, wait_minutes=wait_minutes)


def _write_failure(folder: Path, reason: str) -> None:
    with suppress(OSError):  # a full disk may be the reason
        (folder / FAILURE_FILE).write_text(f"{reason}\n", encoding="utf-8")
