"""What each Ray Train worker does: wires pipeline, engine, metrics and checkpoint of one rank.

Rank 0 sends plain events to the driver and hands metrics and checkpoints to Ray Train; every rank raises alike.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch

from . import distributed
from .checkpoint import Checkpoint, TrainState, load_checkpoint, load_train_state, save_checkpoint
from .config import ExperimentConfig
from .ema import build_ema, copy_buffers
from .engine import Progress, Scores, Trainee, evaluate, gather_scores, train_one_epoch
from .errors import BadImagesError, UserError
from .label_graph import LabelCounts, attend_mask, choose_tau
from .losses import build_loss
from .metrics import MultiLabelMetrics
from .model import build_model, choose_attention_kernels, set_prior_bias
from .optim import build_optimizer, build_scheduler
from .pipeline import BadImages, eval_batches, limit_ray_data, train_epochs
from .sampling import EvalPlan, TrainPlan
from .word_vectors import LEARNED

_BLOCK_ROWS = 64  # rows of a train decode task: larger ones start later, smaller ones cost more in scheduling


class Worker:
    """One rank of a training run."""

    def __init__(self, loop_config: dict[str, Any]) -> None:
        self.loop = loop_config
        self.config = ExperimentConfig.model_validate(loop_config["config"])
        self.counts: LabelCounts = loop_config["counts"]
        self.device = ray.train.torch.get_device()
        self.rank, self.world = distributed.rank(), distributed.world_size()
        self.samples: dict[str, pa.Table] = {}
        self.bad = {split: BadImages() for split in loop_config["tables"]}
        self.told: dict[str, set[int]] = {split: set() for split in loop_config["tables"]}
        limit_ray_data(loop_config["data_cpus"])
        torch.manual_seed(self.config.train.seed)
        self.trainee = self._build()

    def _build(self) -> Trainee:
        config = self.config
        mask = attend_mask(self.counts, choose_tau(self.counts, config.model.tau, config.model.tau_degree))
        learned = config.data.word_vectors == LEARNED
        network = build_model(config.model, self.loop["word_vectors"], mask, train_vectors=learned)
        network.to(
            memory_format=torch.channels_last
        )  # convolutions run about a sixth faster on the CPU, and in half precision on a GPU
        if config.model.prior_bias:
            set_prior_bias(network, self.loop["frequency"])
        amp = amp_dtype(config.train.amp, self.device)
        self.precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[amp]
        self.kernels = choose_attention_kernels(network, config.model, self.device, self.rank)
        model = ray.train.torch.prepare_model(
            network, parallel_strategy_kwargs=distributed.parallel_settings(config.optim.accumulation)
        )
        if config.optim.compress_gradients:
            distributed.compress_gradients(model)
        optimizer = build_optimizer(network, config.optim)
        plan = self.plan(0)
        return Trainee(
            model,
            optimizer,
            build_scheduler(optimizer, config.optim, plan.num_steps, config.train.epochs),
            torch.amp.GradScaler(self.device.type, enabled=amp == torch.float16),
            build_ema(network, config.optim.ema_decay) if config.optim.ema_decay else None,
            amp,
            config.optim.clip_norm,
            config.optim.accumulation,
            config.loss.group_weight,
            build_loss(config.loss),
        )

    def plan(self, first_epoch: int) -> TrainPlan:
        train = self.config.train
        return TrainPlan(
            self.loop["sizes"]["train"],
            train.batch_size,
            self.rank,
            self.world,
            train.seed,
            first_epoch,
            train.epochs,
            _BLOCK_ROWS,
        )

    def send(self, kind: str, **content: Any) -> None:
        if self.rank == 0 and self.loop["events"] is not None:
            self.loop["events"].put({"kind": kind, **content})

    def image_ids(self, rows: list[int]) -> list[str]:
        ids: list[str] = ray.get(self.loop["tables"]["train"])["image_id"].take(pa.array(rows)).to_pylist()
        return ids

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network that is scored and saved."""
        return self.trainee.ema.module if self.trainee.ema is not None else self.trainee.network

    def resume(self) -> int:
        """Takes up the latest checkpoint, if there is one; -> finished epochs."""
        latest = ray.train.get_checkpoint()
        if latest is None:
            return 0
        with latest.as_directory() as folder:
            state = load_train_state(Path(folder))
        assert state.data == self.loop["fingerprint"], "the driver has compared the data"
        check_graph(state.model, self.trainee.network.state_dict())
        self.trainee.network.load_state_dict(state.model)
        self.trainee.optimizer.load_state_dict(dict(state.optimizer))
        self.trainee.scheduler.load_state_dict(dict(state.scheduler))
        self.trainee.scaler.load_state_dict(dict(state.scaler))
        if self.trainee.ema is not None and state.ema is not None:
            self.trainee.ema.load_state_dict(dict(state.ema))
        return state.epoch

    def reported(self) -> list[dict[str, Any]]:
        """Metrics of the checkpoints that Ray Train holds, as lines of metrics.jsonl."""
        return [
            {**plain_metrics(one.metrics), "checkpoint": Path(one.checkpoint.path).name}
            for one in ray.train.get_all_reported_checkpoints()
        ]

    def run(self) -> None:
        """Takes up the latest checkpoint, trains what is left, scores test once."""
        first_epoch = self.resume()
        plan = self.plan(first_epoch)
        self.send(
            "start",
            first_epoch=first_epoch,
            epochs=plan.epochs,
            reported=self.reported(),
            steps_per_epoch=plan.num_steps,
            text=f"training on {self.world} x {self.device.type} in {self.precision}{self.kernels and f', {self.kernels}'},"
            f" epochs {first_epoch + 1} to {plan.epochs}, {plan.num_steps} steps each"
            if first_epoch < plan.epochs
            else f"all {plan.epochs} epochs are done",
        )
        epochs = train_epochs(self.loop["tables"]["train"], plan, self.config.data, self.bad["train"])
        for epoch, batches in enumerate(epochs, start=first_epoch + 1):
            start = time.perf_counter()
            stats = train_one_epoch(
                self.trainee,
                batches,
                step_rows=plan.step_rows,
                device=self.device,
                log_every=self.config.train.log_every,
                on_progress=partial(self.on_progress, epoch),
                count_bad=lambda: len(self.bad["train"].seen),
                name_rows=self.image_ids,
            )
            distributed.average_buffers(self.trainee.network)
            if self.trainee.ema is not None:
                copy_buffers(self.trainee.ema, self.trainee.network)
            sums = torch.tensor([stats.images, stats.wait_seconds], dtype=torch.float64, device=self.device)
            images, wait = distributed.all_reduce(sums, "sum").tolist()
            metrics = {
                "epoch": epoch,
                "train/loss": (stats.classification_sum + stats.group_sum) / stats.steps,
                "train/classification_loss": stats.classification_sum / stats.steps,
                "train/group_loss": stats.group_sum / stats.steps,
                "train/lr": self.trainee.optimizer.param_groups[-1]["lr"],
                "train/images": int(images),
                "train/images_per_second": images / stats.seconds,
                "train/data_wait_fraction": wait / self.world / stats.seconds,
                "train/first_batch_seconds": stats.first_batch_seconds,
                "train/bad_images": self.collect_bad("train"),
                "protocol": self.config.protocol,
            } | self.score("val", self.evaluated)
            metrics["epoch_seconds"] = time.perf_counter() - start
            self.report(metrics, epoch)
        if self.loop["sizes"]["test"]:
            self.score_test()

    def on_progress(self, epoch: int, progress: Progress) -> None:
        self.send("progress", epoch=epoch, **vars(progress))
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
        fresh = [image for row, image in sorted(images.items()) if row not in self.told[split]]
        self.told[split].update(images)
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

    def score(self, split: str, network: torch.nn.Module) -> dict[str, Any]:
        """Metrics of a split, over every image exactly once; the same on every rank."""
        scores = score_split(
            self.loop["tables"][split], self.loop["sizes"][split], network, self.config, self.device, self.bad[split]
        )
        num_bad = self.collect_bad(split)
        return split_metrics(split, scores, self.counts.names) | {f"{split}/bad_images": num_bad}

    def report(self, metrics: dict[str, Any], epoch: int) -> None:
        """Hands metrics and the checkpoint to Ray Train; the name is unique over restarts, as Ray asks."""
        name = f"epoch_{epoch:04d}_{int(time.time()):x}"
        if self.rank > 0:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory(prefix="msrn_") as folder:
            trainee = self.trainee
            checkpoint = Checkpoint(
                self.config,
                self.counts.names,
                self.counts,
                self.evaluated.state_dict(),
                (0.5,) * len(self.counts.names),
                {key: value for key, value in metrics.items() if isinstance(value, (int, float))},
                epoch,
            )
            state = TrainState(
                trainee.network.state_dict(),
                trainee.optimizer.state_dict(),
                trainee.scheduler.state_dict(),
                trainee.scaler.state_dict(),
                trainee.ema.state_dict() if trainee.ema is not None else None,
                epoch,
                self.loop["fingerprint"],
            )
            save_checkpoint(Path(folder), checkpoint, state)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)
        self.send("epoch", metrics=plain_metrics(metrics), checkpoint=name)

    def score_test(self) -> None:
        """Scores the test split once, with the weights of the best epoch on val."""
        kept = ray.train.get_all_reported_checkpoints()
        best = kept[best_index([one.metrics["val/mAP"] for one in kept])]
        with best.checkpoint.as_directory() as folder:
            weights = load_checkpoint(Path(folder)).weights
        network = self.trainee.network
        network.load_state_dict(dict(weights))
        metrics = self.score("test", network)
        self.send("test", metrics=metrics)


def check_graph(saved: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> None:
    """Refuses to go on with another label graph than the run was trained with; both are state dicts of the network.

    Raises:
        UserError: if their masks differ.
    """
    key = "label_semantics.attend_mask"
    if key in saved and not torch.equal(saved[key].cpu(), now[key].cpu()):
        raise UserError(
            "data.label_counts: gives another label graph than the run was trained with; give the file that it started with"
        )


def best_index(scores: Sequence[float]) -> int:
    """The place of the largest score, the last of equals as Ray Train keeps it; nan loses to any number."""
    return max(range(len(scores)), key=lambda index: (not math.isnan(scores[index]), scores[index], index))


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers or text."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float, str))}


def train_loop_per_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train's entry of each worker; see `build_trainer` for what `loop_config` holds."""
    Worker(loop_config).run()


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of a setting: `auto` is bf16 where the device computes in it; None means float32."""
    if choice == "auto":
        return torch.bfloat16 if has_bf16(device) else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies in bf16; a CPU without the instructions would only convert to and fro."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = (
        torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    )  # older torch does not say
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def score_split(
    table: ray.ObjectRef[pa.Table],
    size: int,
    network: torch.nn.Module,
    config: ExperimentConfig,
    device: torch.device,
    bad: BadImages,
) -> Scores:
    """Scores a split over all ranks, each image exactly once; the same on every rank."""
    plan = EvalPlan(size, distributed.rank(), distributed.world_size(), config.train.eval_batch_size)
    own = evaluate(
        network,
        eval_batches(table, plan, config.data, bad),
        device=device,
        num_classes=int(ray.get(table).schema.field("target").type.list_size),
    )
    return gather_scores(own)


def split_metrics(split: str, scores: Scores, label_names: Sequence[str]) -> dict[str, Any]:
    """All metrics of a split as `split/name`; per-class AP as `split/AP/label`."""
    metric = MultiLabelMetrics(len(label_names))
    metric.update(scores.scores, scores.target)
    values = metric.compute()
    per_class = values.pop("AP")
    assert isinstance(per_class, list)
    return (
        {f"{split}/{name}": value for name, value in values.items()}
        | {f"{split}/AP/{label}": value for label, value in zip(label_names, per_class, strict=True)}
        | {f"{split}/loss": float(scores.loss.mean()), f"{split}/images": len(scores.row)}
    )
