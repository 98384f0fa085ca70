"""What each Ray Train worker does: wires pipeline, engine, metrics and checkpoint of one rank.

Rank 0 sends plain events to the driver and hands metrics and checkpoints to Ray Train; every rank raises alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train.torch
import torch

from ..config import ExperimentConfig
from ..errors import BadImagesError, UserError
from ..labels.graph import LabelCounts, attend_mask, choose_tau
from ..ray_cluster.allocation import decode_cpus
from ..ray_data.pipeline import limit_ray_data, train_epochs
from ..runs.checkpoint import Checkpoint, load_checkpoint, load_train_state
from ..runs.history import best_index
from ..runs.snapshot import capture, restore
from ..training import distributed
from ..training.bad_images import RECALLED, BadImage, BadImages
from ..training.build import build_learner, build_network
from ..training.ema import copy_buffers
from ..training.engine import EpochStats, Progress, SavePoints, train_one_epoch
from ..training.evaluate import split_metrics
from ..training.learner import Learner
from ..training.row_ledger import Account, Ledger
from ..training.sampling import TrainPlan
from .checkpoints import NO_SCORE, SCORE, WITHIN_EPOCH, clear_leftovers, report_checkpoint, scored_checkpoints
from .gauges import EPOCH_GAUGES, Gauges
from .heartbeat import Pulse, beat_seconds
from .object_store import StoreMeter
from .scoring import score_split

BLOCK_ROWS = 64  # rows of a train decode task: larger ones start later, smaller ones cost more in scheduling


@dataclass(frozen=True)
class _Start:
    """Where a worker takes the run up: 0-based epoch, its finished steps, and what it has behind it."""

    epoch: int
    stats: EpochStats
    account: Account


class Worker:
    """One rank of a training run.

    Args:
        loop_config: see `build_trainer`.
        pulse: where it notes what it does.
    """

    def __init__(self, loop_config: dict[str, Any], pulse: Pulse) -> None:
        self.loop, self.pulse = loop_config, pulse
        pulse.note("building the model")
        self.config = ExperimentConfig.model_validate(loop_config["config"])
        self.counts: LabelCounts = loop_config["counts"]
        self.folder = Path(loop_config["folder"])
        self.device = ray.train.torch.get_device()
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.samples: dict[str, pa.Table] = {}
        self.bad = {split: BadImages() for split in loop_config["tables"]}
        self.told: dict[str, dict[int, str]] = {split: {} for split in loop_config["tables"]}
        self.gauges = Gauges(loop_config["run_name"], self.rank)
        self.store: StoreMeter | None = None
        limit_ray_data(decode_cpus(self.world, self.config.resources.cpus_per_worker, loop_config["runs"]))
        torch.manual_seed(self.config.train.seed)
        self.learner = self._build()
        train = self.config.train
        self.save_points = SavePoints(self.save_within, train.checkpoint_steps, train.checkpoint_seconds)
        if train.checkpoint_every is not None:
            self.save_points.is_warned = lambda: ray.train.get_preemption_info() is not None

    def _build(self) -> Learner:
        config, counts = self.config, self.counts
        network, self.kernels = build_network(
            config,
            self.loop["word_vectors"],
            attend_mask(counts, choose_tau(counts, config.model.tau, config.model.tau_degree)),
            self.loop["frequency"],
            device=self.device,
            rank=self.rank,
        )
        model = ray.train.torch.prepare_model(
            network, parallel_strategy_kwargs=distributed.parallel_settings(config.optim.accumulation)
        )
        return build_learner(config, model, self.device, self.plan(0, 0).num_steps)

    def plan(self, first_epoch: int, first_step: int) -> TrainPlan:
        train = self.config.train
        return TrainPlan(
            self.loop["sizes"]["train"],
            train.batch_size,
            self.rank,
            self.world,
            train.seed,
            first_epoch,
            train.epochs,
            BLOCK_ROWS,
            first_step,
            self.config.data.drop_last,
        )

    def send(self, kind: str, **content: Any) -> None:
        if self.rank == 0:
            self.loop["events"].put({"kind": kind, **content})

    def image_ids(self, rows: list[int]) -> list[str]:
        ids: list[str] = ray.get(self.loop["tables"]["train"])["image_id"].take(pa.array(rows)).to_pylist()
        return ids

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network that is scored and saved."""
        return self.learner.ema.module if self.learner.ema is not None else self.learner.network

    def resume(self) -> _Start:
        """Takes up the latest checkpoint, if there is one.

        Raises:
            UserError: if it is of other data, or another label graph, or its images are not those that the plan has before its step.
        """
        num_rows = self.loop["sizes"]["train"]
        latest = ray.train.get_checkpoint()
        if latest is None:
            return _Start(0, EpochStats(), Account.empty(num_rows))
        with latest.as_directory() as folder:
            state = load_train_state(Path(folder))
        if state.data != self.loop["fingerprint"]:
            raise UserError(
                f"checkpoint {latest.path} is of other images or labels than data.root holds; start a new run"
            )
        restore(self.learner, state, self.rank, self.device)
        if state.step == 0:
            return _Start(state.epoch, EpochStats(), Account.empty(num_rows))
        account = Account.unpack(state.account, num_rows)
        difference = account.difference(self.plan(state.epoch, 0), state.epoch, state.step)
        if difference:
            raise UserError(
                f"checkpoint {latest.path}: its images do not fit the order of epoch {state.epoch + 1} ({difference}); another version of"
                " numpy may shuffle otherwise: go on with the one that it was trained with, or start a new run"
            )
        self.recall_bad(account)
        return _Start(state.epoch, EpochStats(**state.stats), account)  # type: ignore[arg-type]  # whole numbers stay whole

    def recall_bad(self, account: Account) -> None:
        """Counts the images again that could not be decoded before the interruption; the driver tells of those that it had not."""
        if self.rank == 0:
            rows = np.flatnonzero(account.unreadable).tolist()
            uris = ray.get(self.loop["tables"]["train"])["uri"].take(pa.array(rows, pa.int64())).to_pylist()
            for row, uri in zip(rows, uris, strict=True):
                self.bad["train"].add(BadImage(row, uri, RECALLED))

    def reported(self) -> list[dict[str, Any]]:
        """Metrics of the epochs whose checkpoints Ray Train holds, as lines of metrics.jsonl."""
        return [
            {**plain_metrics(one.metrics), "checkpoint": Path(one.checkpoint.path).name} for one in scored_checkpoints()
        ]

    def run(self) -> None:
        """Trains, with figures of the object store."""
        with StoreMeter() if self.rank == 0 else nullcontext() as self.store:
            self.train()

    def train(self) -> None:
        """Takes up the latest checkpoint, trains what is left, scores test once."""
        self.pulse.note("taking up the checkpoint")
        start = self.resume()
        if self.rank == 0:
            clear_leftovers(self.folder)
        plan = self.plan(start.epoch, start.stats.steps)
        self.send(
            "start",
            first_epoch=start.epoch,
            first_step=start.stats.steps,
            epochs=plan.epochs,
            reported=self.reported(),
            steps_per_epoch=plan.num_steps,
            text=self.describe(plan),
        )
        left: float | None = None  # when the last step of the epoch before ended, what scoring and saving took added
        epochs = train_epochs(self.loop["tables"]["train"], plan, self.config.data, self.bad["train"])
        for epoch, batches in enumerate(epochs, start=start.epoch):
            began = time.perf_counter()
            resumed = epoch == start.epoch
            self.epoch = epoch
            self.ledger = Ledger(plan, epoch, start.account if resumed else Account.empty(plan.num_rows))
            stats = start.stats if resumed else EpochStats()
            before = stats.seconds
            if not resumed:
                self.bad["train"].begin_epoch()
            train_one_epoch(
                self.learner,
                self.pulse.watch(batches, epoch + 1, "in a step", stats.steps + 1),
                stats,
                num_steps=plan.num_steps,
                step_rows=plan.step_rows,
                device=self.device,
                log_every=self.config.train.log_every,
                save_points=self.save_points,
                on_rows=self.ledger.add,
                on_progress=partial(self.on_progress, epoch + 1),
                count_bad=lambda: len(self.bad["train"].seen),
                name_rows=self.image_ids,
            )
            trained = time.perf_counter()
            self.ledger.balance(stats.steps, self.bad["train"].gather_epoch())
            distributed.average_buffers(self.learner.network)
            if self.learner.ema is not None:
                copy_buffers(self.learner.ema, self.learner.network)
            metrics = {
                "epoch": epoch + 1,
                "train/loss": (stats.classification_sum + stats.group_sum) / stats.steps,
                "train/classification_loss": stats.classification_sum / stats.steps,
                "train/group_loss": stats.group_sum / stats.steps,
                "train/lr": self.learner.optimizer.param_groups[-1]["lr"],
                "train/images": stats.images,
                "train/images_per_second": stats.images / stats.seconds,
                "train/data_wait_fraction": stats.wait_seconds / stats.seconds,
                "train/first_batch_seconds": stats.first_batch_seconds,
                "train/bad_images": self.collect_bad("train"),
                "protocol": self.config.protocol,
            }
            if left is not None:
                metrics["train/epoch_gap_seconds"] = began + stats.first_batch_seconds - left
            left, paused = trained, time.perf_counter()
            metrics |= self.score("val", self.evaluated, epoch + 1) | self.store_figures()
            metrics["epoch_seconds"] = before + time.perf_counter() - began
            self.gauges.set({name: metrics[name] for name in EPOCH_GAUGES if name in metrics})
            self.pulse.note("saving the checkpoint")
            self.save_epoch(metrics, epoch + 1)
            left += time.perf_counter() - paused
        if self.loop["sizes"]["test"]:
            self.score_test()

    def store_figures(self) -> dict[str, int]:
        """Object store use since the workers started, over all nodes; on rank 0, whose metrics are kept."""
        if self.store is None:
            return {}
        return {
            "train/object_store_peak_bytes": self.store.peak_bytes,
            "train/object_store_spilled_bytes": self.store.spilled_bytes,
        }

    def describe(self, plan: TrainPlan) -> str:
        """What is about to be trained, for the user."""
        if plan.first_epoch == plan.epochs:
            return f"all {plan.epochs} epochs are done"
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[self.learner.amp_dtype]
        kernels = f", {self.kernels}" if self.kernels else ""
        inside = f", going on after step {plan.first_step} of epoch {plan.first_epoch + 1}" if plan.first_step else ""
        left_out = plan.num_rows - len(plan.rows_before(plan.first_epoch, plan.num_steps))
        dropped = f", {left_out} images of each epoch left out (data.drop_last)" if left_out else ""
        return (
            f"training on {self.world} x {self.device.type} in {precision}{kernels},"
            f" epochs {plan.first_epoch + 1} to {plan.epochs}, {plan.num_steps} steps each{inside}{dropped}"
        )

    def on_progress(self, epoch: int, progress: Progress) -> None:
        self.send("progress", epoch=epoch, **vars(progress))
        self.gauges.set(
            {
                "loss": progress.loss,
                "images_per_second": progress.images_per_second,
                "data_wait_fraction": progress.data_wait_fraction,
                "epoch": epoch,
                "bad_images": len(self.bad["train"].seen),
            }
        )
        if self.device.type == "cuda":
            self.gauges.set({"gpu_memory_bytes": torch.cuda.max_memory_allocated(self.device)})
        if progress.bad_reports > self.bad_limit(
            "train"
        ):  # ranks may have met the same image, so this only asks for a count
            self.collect_bad("train")

    def bad_limit(self, split: str) -> float:
        """Images of the split that may be bad before the run stops."""
        return self.config.data.max_bad_fraction * int(self.loop["sizes"][split])

    def collect_bad(self, split: str) -> int:
        """Images of the split found bad so far over all ranks, each counted once; new ones are sent to the driver.

        Raises:
            BadImagesError: on all ranks alike, with the names, once there are too many.
        """
        images = self.bad[split].gather()
        fresh = [image for row, image in sorted(images.items()) if self.told[split].get(row) != image.reason]
        self.told[split] = {row: image.reason for row, image in images.items()}
        if fresh:
            self.send("bad", split=split, images=[(image.uri, image.reason) for image in fresh])
        if len(images) > self.bad_limit(split):
            names = "; ".join(f"{image.uri} ({image.reason})" for _, image in sorted(images.items())[:5])
            more = f"; and {len(images) - 5} more" if len(images) > 5 else ""
            raise BadImagesError(
                f"{len(images)} of {self.loop['sizes'][split]} {split} images cannot be decoded, more than"
                f" data.max_bad_fraction={self.config.data.max_bad_fraction} allows: {names}{more}"
            )
        return len(images)

    def score(self, split: str, network: torch.nn.Module, epoch: int) -> dict[str, Any]:
        """Metrics of a split, over every image exactly once; the same on every rank."""
        scores = score_split(
            self.loop["tables"][split],
            self.loop["sizes"][split],
            network,
            self.config,
            self.device,
            self.bad[split],
            watch=partial(self.pulse.watch, epoch=epoch, doing=f"scoring {split}"),
        )
        num_bad = self.collect_bad(split)
        return split_metrics(split, scores, self.counts.names) | {f"{split}/bad_images": num_bad}

    def save_within(self, stats: EpochStats) -> None:
        """A checkpoint within an epoch: what going on needs, and which images are done.

        BatchNorm statistics become the mean over ranks, so that all go on with what is saved. Each is a running mean, so this is the
        same as the mean at the epoch's end, but for rounding.
        """
        self.collect_bad("train")
        account = self.ledger.balance(stats.steps, self.bad["train"].gather_epoch())
        distributed.average_buffers(self.learner.network)
        within = {"step": stats.steps, "account": account.pack(), "stats": asdict(stats)}
        state = capture(self.learner, self.device, epoch=self.epoch, data=self.loop["fingerprint"], **within)
        report_checkpoint(self.folder, {"epoch": self.epoch + 1, SCORE: WITHIN_EPOCH}, None, state)

    def save_epoch(self, metrics: dict[str, Any], epoch: int) -> None:
        """The checkpoint at an epoch's end, with weights to predict with and their scores; `epoch` are finished."""
        state = capture(self.learner, self.device, epoch=epoch, data=self.loop["fingerprint"])
        checkpoint = Checkpoint(
            self.config,
            self.counts.names,
            self.counts,
            self.evaluated.state_dict(),
            (0.5,) * len(self.counts.names),
            {key: value for key, value in metrics.items() if isinstance(value, (int, float))},
            epoch,
        )
        score = NO_SCORE if math.isnan(metrics["val/mAP"]) else metrics["val/mAP"]
        name = report_checkpoint(self.folder, metrics | {SCORE: score}, checkpoint, state)
        self.save_points.restart()
        self.send("epoch", metrics=plain_metrics(metrics), checkpoint=name)

    def score_test(self) -> None:
        """Scores the test split once, with the weights of the best epoch on val."""
        kept = scored_checkpoints()
        best = kept[best_index([one.metrics["val/mAP"] for one in kept])]
        with best.checkpoint.as_directory() as folder:
            weights = load_checkpoint(Path(folder)).weights
        network = self.learner.network
        network.load_state_dict(dict(weights))
        metrics = self.score("test", network, best.metrics["epoch"])
        self.send("test", metrics=metrics)


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers or text, but for what only Ray Train needs."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float, str)) and name != SCORE}


def train_loop_per_worker(loop_config: dict[str, Any], worker: type[Worker] = Worker) -> None:
    """Ray Train's entry of each worker, with signs of life for the driver from the start; see `build_trainer` for `loop_config`."""
    seconds = beat_seconds(loop_config["config"]["train"]["hang_minutes"])
    with Pulse(loop_config["events"], distributed.rank(), seconds) as pulse:
        worker(loop_config, pulse).run()
