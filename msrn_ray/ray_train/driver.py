"""Ray Train around the engine: `build_trainer` is the one builder that training and search use.

Data: sample tables go into the object store once; each worker streams its share through `pipeline`; rank 0 sends plain events to the
driver and reports metrics and checkpoints to Ray Train.
"""

from __future__ import annotations

import _thread
import math
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray.train.torch
from ray.data._internal.stats import get_or_create_stats_actor
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..config import ExperimentConfig
from ..errors import UserError
from ..ray_cluster.allocation import Allocation, allocate
from ..ray_cluster.connection import check_shared, connect
from ..runs.checkpoint import find_model_file, load_checkpoint
from ..runs.folder import FAILURE_FILE, absolute_paths, open_folder
from ..runs.log import RunLog
from ..runs.resume import check_data, check_list, check_resumable, describe_data
from ..runs.state import check_stopped, kept_state
from ..training.inputs import check_batch, describe, gather_inputs
from .elastic_fit import run_elastic
from .event_pump import listening
from .torch_trainer import StoredInputs, build_trainer, store_inputs
from .watchdog import Watchdog


@dataclass(frozen=True)
class TrainResult:
    """Where a run lies and how good it is.

    Attributes:
        run_folder: config, metrics, curves, checkpoints.
        best_checkpoint: folder of the best epoch.
        metrics: `val/...` of the best epoch, `test/...` of the same weights where the protocol has a test split.
    """

    run_folder: Path
    best_checkpoint: Path
    metrics: dict[str, float]


def train(config: ExperimentConfig, *, resume: bool = False) -> TrainResult:
    """Trains from start to end, with progress on the terminal and a run folder as the result.

    Args:
        config: the experiment. The run folder is `train.storage`/`train.run_name`.
        resume: go on from the last checkpoint of that run folder instead of refusing it.

    Raises:
        UserError: for input that the user can mend, before anything is written where that is possible.
    """
    config = absolute_paths(config)
    name = config.train.run_name or f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.with_overrides({"train.run_name": name})
    folder = Path(config.train.storage) / name
    if resume:
        check_resumable(folder, config)
        check_stopped(folder)
    if not resume and folder.exists():
        raise UserError(f"{folder} exists already; give another train.run_name, or --resume {folder}")
    inputs = gather_inputs(config)
    check_batch(config, len(inputs.splits.train))
    data = describe_data(inputs.splits, config)
    if resume:
        check_data(folder, data)
        if check_list(folder):
            print("its first checkpoint was cut off before Ray Train knew of it; the run begins anew", flush=True)
    for line in describe(inputs, config):
        print(line, flush=True)
    print("starting Ray and the workers (the first run on a machine also compiles kernels)", flush=True)
    # whoever resumes the same run while this one still waits for machines must see that it goes on
    with kept_state(folder) if resume else nullcontext():
        connect(config.resources)
        allocation = allocate(config.resources)
        try:
            log, _ = run_in_folder(config, store_inputs(inputs, data), allocation, fresh=not resume)
        except KeyboardInterrupt:
            print(f"interrupted; go on with: msrn train --resume {folder}", file=sys.stderr)
            raise
        except ray.train.TrainingFailedError:
            print(
                f"the run stopped; once the cause is mended, go on with: msrn train --resume {folder}", file=sys.stderr
            )
            raise
    best = find_model_file(folder).parent
    metrics = {key: value for key, value in load_checkpoint(best).metrics.items() if key.startswith("val/")} | log.test
    return TrainResult(folder, best, metrics)


def run_in_folder(
    config: ExperimentConfig,
    stored: StoredInputs,
    allocation: Allocation,
    callbacks: Sequence[ray.train.UserCallback] = (),
    *,
    fresh: bool = False,
) -> tuple[RunLog, ray.train.Result]:
    """Trains into the run folder `train.storage`/`train.run_name`: keeps its files and ends workers that hang.

    Args:
        config, stored, allocation, callbacks: see `build_trainer`.
        fresh: the folder must not be there yet.

    Returns:
        The run's log, and what Ray Train says of the run.

    Raises:
        UserError: for what the user can mend; it is in the folder's FAILURE_FILE too.
        ray.train.TrainingFailedError: for anything else.
    """
    assert config.train.run_name is not None
    folder = Path(config.train.storage) / config.train.run_name
    _open_shared_folder(folder, config, stored.data, fresh=fresh)
    log = RunLog(folder)
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )  # else it is lost with another node
    events = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    # likewise Ray Data's own, if no job before has one: it lies where it is first used and outlives the run, and a machine with it that is
    # set aside never gets idle and leaves
    get_or_create_stats_actor()
    # elsewhere, as in a search, nothing can interrupt Ray Train
    in_main = threading.current_thread() is threading.main_thread()
    watchdog = Watchdog(
        config.train.hang_minutes,
        log.say,
        wait_minutes=config.resources.wait_minutes if in_main else math.inf,
        give_up=_thread.interrupt_main if in_main else lambda: None,
    )
    try:
        try:
            # of a run that is resumed the state is kept already, see `train`; one that a search starts has only this
            with kept_state(folder), listening(events, log, watchdog):
                build = partial(build_trainer, config, stored, run_name=folder.name, events=events, callbacks=callbacks)
                try:
                    result = run_elastic(build, config.resources, allocation, log.say)
                except KeyboardInterrupt:
                    if watchdog.abandoned is None:
                        raise
                    raise UserError(watchdog.abandoned) from None
        except ray.train.TrainingFailedError:
            if watchdog.verdict is None:
                raise
            raise UserError(watchdog.verdict) from None
    except UserError as error:
        with suppress(OSError):  # a full disk may be what is told of
            (folder / FAILURE_FILE).write_text(f"{error}\n", encoding="utf-8")
        raise
    return log, result


def _open_shared_folder(folder: Path, config: ExperimentConfig, data: dict[str, str], *, fresh: bool) -> None:
    """Checks that every node sees the storage, then opens the run folder.

    Raises:
        UserError: if a node does not see it, or it cannot be written.
    """
    try:
        check_shared(folder.parent)
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None
    open_folder(folder, config, data, fresh=fresh)
