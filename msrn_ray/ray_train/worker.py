"""One rank of a training run: wires data pipeline, engine, metrics and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch

from ..labels.graph import attend_mask, choose_tau
from ..ray_cluster.allocation import decode_cpus
from ..ray_data.pipeline import limit_ray_data, train_epochs
from ..runs.checkpoint import load_checkpoint
from ..runs.events import BadImagesFound, EpochFinished, Event, StepsTrained, TestScored, WorkersStarted
from ..training import distributed
from ..training.bad_images import BadImages, check_bad_images
from ..training.engine import train_one_epoch
from ..training.epoch import EpochSchedule, EpochStats, Progress
from ..training.evaluate import split_metrics
from ..training.learner import Learner, build_learner, build_network, copy_buffers
from ..training.row_ledger import Account, Ledger
from ..training.sampling import TrainPlan
from ..types import Batch
from .checkpoints import (
    CheckpointWriter,
    StartPoint,
    best_checkpoint,
    clear_leftovers,
    load_start,
    plain_metrics,
    reported_epochs,
)
from .gauges import Gauges
from .heartbeat import HeartbeatSender, heartbeat_seconds
from .object_store import StoreMeter
from .scoring import score_split
from .worker_input import WorkerInput

BLOCK_ROWS = 64  # rows of a train decode task: larger blocks start later, smaller ones cost more scheduling


class Worker:
    """One rank of a training run, and the hooks of its epochs (`epoch.EpochHooks`). Rank 0 sends the events.

    Args:
        worker_input: the run.
        heartbeat: reports what this rank is doing.
    """

    def __init__(self, worker_input: WorkerInput, heartbeat: HeartbeatSender) -> None:
        self.input, self.config, self.heartbeat = worker_input, worker_input.config, heartbeat
        self.splits, self.counts = worker_input.stored.splits, worker_input.stored.counts
        heartbeat.note("building the model")
        self.plan = _whole_plan(worker_input)
        self.bad = {name: BadImages() for name in self.splits}
        self.gauges = Gauges(worker_input.folder.name, self.plan.rank)
        cpus = decode_cpus(self.plan.world_size, self.config.resources.cpus_per_worker, worker_input.runs)
        limit_ray_data(cpus)
        torch.manual_seed(self.config.train.seed)
        self.learner, self.kernels = _build_learner(worker_input, self.plan)
        self.writer = CheckpointWriter(worker_input, self.learner)
        train = self.config.train
        self.schedule = EpochSchedule(train.log_every, train.checkpoint_steps, train.checkpoint_seconds)
        if train.checkpoint_every is not None:
            self.schedule.is_preempted = lambda: ray.train.get_preemption_info() is not None

    def train(self) -> None:
        """Resume from the latest checkpoint, train the rest of the epochs, and score the test split once."""
        self.heartbeat.note("loading the checkpoint")
        start = load_start(self.learner, self.plan, self.input.stored.data["fingerprint"])
        if self.plan.rank == 0:
            # the driver may not have listed the images that could not be decoded before the interruption
            self.bad["train"].recall(start.account.unreadable, ray.get(self.splits["train"].table)["uri"])
            clear_leftovers(self.input.folder)
        self.plan = replace(self.plan, first_epoch=start.epoch, first_step=start.stats.steps)
        self.send(
            WorkersStarted(
                first_epoch=start.epoch,
                first_step=start.stats.steps,
                epochs=self.plan.epochs,
                steps_per_epoch=self.plan.num_steps,
                reported=reported_epochs(),
                description=_describe(self.plan, self.learner, self.kernels),
            )
        )
        train = self.splits["train"]
        self.gap_start: float | None = None  # end of the last step of the previous epoch, without scoring and saving
        with StoreMeter() if self.plan.rank == 0 else nullcontext() as self.store:
            epochs = train_epochs(train.table, self.plan, self.config.data, self.bad["train"])
            for self.epoch, batches in enumerate(epochs, start=start.epoch):
                if self.epoch > start.epoch:
                    self.bad["train"].begin_epoch()
                    start = StartPoint(start.epoch, Account.empty(train.size))
                self.train_epoch(batches, start)
            if "test" in self.splits:
                self.score_test()

    def train_epoch(self, batches: Iterator[Batch], start: StartPoint) -> None:
        """Train, score and save one epoch, or the rest of one after `start`."""
        began, epoch, stats = time.perf_counter(), self.epoch + 1, start.stats
        seconds_before = stats.seconds
        self.ledger = Ledger(self.plan, self.epoch, start.account)
        batches = self.heartbeat.watch(batches, epoch, "in a step", stats.steps + 1)
        train_one_epoch(self.learner, batches, stats, self.plan, self.schedule, self)
        last_step = time.perf_counter()
        self.ledger.balance(stats.steps, self.bad["train"].gather_epoch())
        distributed.average_buffers(self.learner.network)
        if self.learner.ema is not None:
            copy_buffers(self.learner.ema, self.learner.network)
        metrics: dict[str, Any] = {"epoch": epoch, "protocol": self.config.protocol, **stats.metrics()}
        metrics["train/lr"] = self.learner.optimizer.param_groups[-1]["lr"]
        metrics["train/bad_images"] = self.check_bad_images("train")
        if self.gap_start is not None:
            metrics["train/epoch_gap_seconds"] = began + stats.first_batch_seconds - self.gap_start
        pause = time.perf_counter()
        metrics |= self.score("val", self.learner.evaluated, epoch)
        if self.store is not None:
            metrics["train/object_store_peak_bytes"] = self.store.peak_bytes
            metrics["train/object_store_spilled_bytes"] = self.store.spilled_bytes
        metrics["epoch_seconds"] = seconds_before + time.perf_counter() - began
        self.gauges.set_epoch(metrics)
        self.heartbeat.note("saving the checkpoint")
        name = self.writer.save_epoch(metrics)
        self.schedule.restart()
        self.send(EpochFinished(plain_metrics(metrics), name))
        self.gap_start = last_step + time.perf_counter() - pause

    def send(self, event: Event) -> None:
        """Send an event to the driver, from rank 0."""
        if self.plan.rank == 0:
            self.input.events.put(event)

    def rows_trained(self, rows: npt.NDArray[np.int64]) -> None:
        """See `EpochHooks`."""
        self.ledger.add(rows)

    def progress_made(self, progress: Progress) -> None:
        """See `EpochHooks`."""
        self.send(StepsTrained(self.epoch + 1, progress))
        self.gauges.set_progress(progress, self.epoch + 1, self.count_bad_images(), self.learner.device)
        # ranks may have met the same image, so a sum above the limit only asks for a count
        if progress.bad_reports > self.config.data.max_bad_fraction * self.splits["train"].size:
            self.check_bad_images("train")

    def count_bad_images(self) -> int:
        """See `EpochHooks`."""
        return len(self.bad["train"].seen)

    def image_ids(self, rows: list[int]) -> list[str]:
        """See `EpochHooks`."""
        ids: list[str] = ray.get(self.splits["train"].table)["image_id"].take(pa.array(rows)).to_pylist()
        return ids

    def check_bad_images(self, split: str) -> int:
        """Return how many images of the split are bad over all ranks, each counted once; send new ones to the driver.

        Raises:
            BadImagesError: on all ranks, once there are too many.
        """
        images = self.bad[split].gather()
        new = self.bad[split].take_new(images)
        if new:
            self.send(BadImagesFound(split, tuple((image.uri, image.reason) for image in new)))
        check_bad_images(images, split, self.splits[split].size, self.config.data.max_bad_fraction)
        return len(images)

    def score(self, split: str, network: torch.nn.Module, epoch: int) -> dict[str, Any]:
        """Return the metrics of a split over every image exactly once; the same on every rank."""
        watch = partial(self.heartbeat.watch, epoch=epoch, activity=f"scoring {split}")
        scores = score_split(self.splits[split], network, self.config, self.bad[split], watch)
        metrics = split_metrics(split, scores, self.counts.names)
        return metrics | {f"{split}/bad_images": self.check_bad_images(split)}

    def score_test(self) -> None:
        """Score the test split with the weights of the best epoch on val."""
        best = best_checkpoint()
        with best.checkpoint.as_directory() as folder:
            weights = load_checkpoint(Path(folder)).weights
        self.learner.network.load_state_dict(dict(weights))
        self.send(TestScored(self.score("test", self.learner.network, best.metrics["epoch"])))

    def save(self, stats: EpochStats) -> None:
        """Save within an epoch: what resuming needs, and which images are done.

        BatchNorm statistics become the mean over ranks, so that all ranks continue with what is saved. Each is a running mean, so apart
        from rounding the mean at the epoch's end stays the same.
        """
        self.check_bad_images("train")
        account = self.ledger.balance(stats.steps, self.bad["train"].gather_epoch())
        distributed.average_buffers(self.learner.network)
        self.writer.save_within_epoch(self.epoch, stats, account)


def train_worker(loop_config: dict[str, Any], worker: type[Worker] = Worker) -> None:
    """Train on one rank, with heartbeats from the start; Ray Train calls this in each worker with `{"input": WorkerInput}`."""
    worker_input: WorkerInput = loop_config["input"]
    seconds = heartbeat_seconds(worker_input.config.train.hang_minutes)
    with HeartbeatSender(worker_input.events, distributed.rank(), seconds) as heartbeat:
        worker(worker_input, heartbeat).train()


def _whole_plan(worker_input: WorkerInput) -> TrainPlan:
    """Return this rank's plan of the whole run."""
    config = worker_input.config
    return TrainPlan(
        num_rows=worker_input.stored.splits["train"].size,
        batch_size=config.train.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=config.train.seed,
        first_epoch=0,
        epochs=config.train.epochs,
        block_size=BLOCK_ROWS,
        drop_last=config.data.drop_last,
    )


def _build_learner(worker_input: WorkerInput, plan: TrainPlan) -> tuple[Learner, str]:
    """Return what the rank trains, and the attention kernels that were chosen."""
    config, stored = worker_input.config, worker_input.stored
    device = ray.train.torch.get_device()
    tau = choose_tau(stored.counts, config.model.tau, config.model.tau_degree)
    mask = attend_mask(stored.counts, tau)
    network, kernels = build_network(config, stored.word_vectors, mask, stored.frequency, device=device)
    parallel = distributed.parallel_settings(config.optim.accumulation)
    model = ray.train.torch.prepare_model(network, parallel_strategy_kwargs=parallel)
    return build_learner(config, model, device, plan.num_steps), kernels


def _describe(plan: TrainPlan, learner: Learner, kernels: str) -> str:
    """Return what is about to be trained, for the user."""
    if plan.first_epoch == plan.epochs:
        return f"all {plan.epochs} epochs are done"
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[learner.amp_dtype]
    parts = [f"training on {plan.world_size} x {learner.device.type} in {precision}", *filter(None, [kernels])]
    parts.append(f"epochs {plan.first_epoch + 1} to {plan.epochs}")
    parts.append(f"{plan.num_steps} steps each")
    if plan.first_step:
        parts.append(f"resuming after step {plan.first_step} of epoch {plan.first_epoch + 1}")
    dropped = plan.num_rows - len(plan.rows_before(plan.first_epoch, plan.num_steps))
    if dropped:
        parts.append(f"{dropped} images of each epoch dropped (data.drop_last)")
    return ", ".join(parts)
