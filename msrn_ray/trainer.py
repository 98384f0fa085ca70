"""Ray Train around the engine: `build_trainer` is the one builder that training, evaluation and search use.

Data: sample tables go into the object store once; each worker streams its share through `pipeline`; rank 0 sends plain events to the
driver and reports metrics and checkpoints to Ray Train.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from torch import Tensor

from . import distributed
from .checkpoint import Checkpoint, TrainState, find_model_file, load_checkpoint, load_train_state, save_checkpoint
from .config import ExperimentConfig, load_config
from .ema import build_ema, copy_buffers
from .engine import Progress, Scores, Trainee, evaluate, gather_scores, train_one_epoch
from .errors import BadImagesError, UserError
from .label_graph import LabelCounts, attend_mask, count_labels
from .metrics import MultiLabelMetrics
from .model import build_model, set_prior_bias
from .model.backbone import build_resnet, read_pretrained
from .optim import build_optimizer, build_scheduler
from .pipeline import BadImages, eval_batches, limit_ray_data, train_epochs
from .resources import Allocation, allocate, connect
from .run_log import RunLog
from .sampling import EvalPlan, TrainPlan
from .splits import Splits, fingerprint, load_splits
from .word_vectors import load_word_vectors

_BLOCK_ROWS = 64  # rows of a train decode task: larger ones start later, smaller ones cost more in scheduling
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Materials:
    """What the driver gathers before any worker starts; all of it plain data that travels to the workers.

    Attributes:
        splits: train, val, test.
        counts: label counts of train.
        word_vectors: [C, V] float32.
        frequency: [C] float32 in (0, 1), how often a label is present among train images where it is known (add-one smoothed).
    """

    splits: Splits
    counts: LabelCounts
    word_vectors: Tensor
    frequency: Tensor

    @property
    def label_names(self) -> tuple[str, ...]:
        """C names in the order of the logits."""
        return self.splits.train.label_names


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


def gather_materials(config: ExperimentConfig) -> Materials:
    """Reads labels, label graph and word vectors, and checks that the backbone's weights can be had.

    Raises:
        UserError: for anything wrong with them.
    """
    splits = load_splits(config)
    targets = splits.train.targets
    counts = count_labels(targets, splits.train.label_names)
    vectors = load_word_vectors(
        splits.train.label_names,
        config.data.word_vectors,
        missing=config.data.missing_words,
        seed=config.train.seed,
    )
    build_resnet(config.model.backbone)
    if config.model.pretrained is not None:
        read_pretrained(config.model.backbone, config.model.pretrained)
    frequency = ((targets == 1).sum(0) + 1) / ((targets >= 0).sum(0) + 2)
    return Materials(splits, counts, vectors, torch.from_numpy(frequency).float())


def describe(materials: Materials, config: ExperimentConfig) -> Iterator[str]:
    """Lines that say what is about to be trained on."""
    splits = materials.splits
    yield from splits.notes
    sizes = [f"train {len(splits.train)}", f"val {len(splits.val)}", f"test {len(splits.test)}" if splits.test else ""]
    yield f"{config.data.dataset}: {len(materials.label_names)} labels, images: {', '.join(filter(None, sizes))}"
    edges = int(attend_mask(materials.counts, config.model.tau).sum()) - len(materials.label_names)
    alone = "" if edges else " (labels only see themselves; a lower model.tau adds edges)"
    yield f"label graph at tau {config.model.tau}: {edges} edges{alone}"
    for name, table in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if table is not None:
            empty = [
                label
                for label, present in zip(table.label_names, (table.targets == 1).any(0), strict=True)
                if not present
            ]
            if empty:
                more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
                what = "cannot be learnt" if name == "train" else "AP is nan and left out of mAP"
                yield f"{name}: no image with {', '.join(empty[:8])}{more}; {what}"


def build_trainer(
    config: ExperimentConfig,
    materials: Materials,
    allocation: Allocation,
    *,
    run_name: str,
    events: Queue | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> TorchTrainer:
    """The TorchTrainer of a training run; Ray must be up.

    Args:
        config: the experiment; `train.storage` holds the run folder.
        materials: what `gather_materials` gave.
        allocation: workers.
        run_name: name of the run folder; the same name again goes on from its last checkpoint.
        events: gets rank 0's progress events.
        callbacks: passed to Ray Train (Tune's reporting, for one).
    """
    splits = materials.splits
    tables = {
        name: ray.put(table.table)
        for name, table in (("train", splits.train), ("val", splits.val), ("test", splits.test))
        if table is not None
    }
    loop_config = {
        "config": config.to_dict(),
        "tables": tables,
        "sizes": {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test) if splits.test else 0},
        "counts": materials.counts,
        "word_vectors": materials.word_vectors,
        "frequency": materials.frequency,
        "fingerprint": fingerprint(splits.train),
        "data_cpus": allocation.data_cpus,
        "events": events,
    }
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config=loop_config,
        scaling_config=scaling(allocation),
        run_config=run_config(
            run_name,
            config.train.storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="val/mAP"),
            callbacks=list(callbacks),
        ),
    )


def run_config(name: str, storage: str, **settings: Any) -> ray.train.RunConfig:
    """Ray Train's run settings, with its own log lines quieted: a user sees the project's."""
    quiet = ray.train.LoggingConfig(log_level="ERROR")
    return ray.train.RunConfig(name=name, storage_path=storage, logging_config=quiet, **settings)  # type: ignore[call-arg]  # typed as Train V1


def scaling(allocation: Allocation) -> ray.train.ScalingConfig:
    """Ray Train's scaling for an allocation."""
    return ray.train.ScalingConfig(
        num_workers=allocation.num_workers,
        use_gpu=allocation.use_gpu,
        resources_per_worker={"CPU": allocation.cpus_per_worker} | ({"GPU": 1} if allocation.use_gpu else {}),
    )


class _Worker:
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
        mask = attend_mask(self.counts, config.model.tau)
        network = build_model(config.model, self.loop["word_vectors"], mask)
        if config.model.prior_bias:
            set_prior_bias(network, self.loop["frequency"])
        amp = amp_dtype(config.train.amp, self.device)
        model = ray.train.torch.prepare_model(
            network, parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True}
        )
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
        if state.data != self.loop["fingerprint"]:
            raise UserError(
                "the run was trained on other images or labels than those that the data set holds now; start a new run"
            )
        self.trainee.network.load_state_dict(state.model)
        self.trainee.optimizer.load_state_dict(dict(state.optimizer))
        self.trainee.scheduler.load_state_dict(dict(state.scheduler))
        self.trainee.scaler.load_state_dict(dict(state.scaler))
        if self.trainee.ema is not None and state.ema is not None:
            self.trainee.ema.load_state_dict(dict(state.ema))
        return state.epoch

    def run(self) -> None:
        first_epoch = self.resume()
        plan = self.plan(first_epoch)
        self.send(
            "start",
            first_epoch=first_epoch,
            epochs=plan.epochs,
            steps_per_epoch=plan.num_steps,
            text=f"training on {self.world} x {self.device.type}, epochs {first_epoch + 1} to {plan.epochs}, {plan.num_steps} steps each"
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
                "train/loss": stats.loss_sum / stats.steps,
                "train/lr": self.trainee.optimizer.param_groups[-1]["lr"],
                "train/images": int(images),
                "train/images_per_second": images / stats.seconds,
                "train/data_wait_fraction": wait / self.world / stats.seconds,
                "train/first_batch_seconds": stats.first_batch_seconds,
                "train/bad_images": self.collect_bad("train"),
            } | self.score("val", self.evaluated)
            metrics["epoch_seconds"] = time.perf_counter() - start
            self.report(metrics, epoch)
        if self.loop["sizes"]["test"]:
            self.score_test()

    def on_progress(self, epoch: int, progress: Progress) -> None:
        self.send("progress", epoch=epoch, **vars(progress))
        self.check_bad("train", progress.num_bad)

    def check_bad(self, split: str, num_bad: int) -> None:
        """Stops all ranks alike, with the names, once too many images of a split are bad."""
        limit = self.config.data.max_bad_fraction * self.loop["sizes"][split]
        if num_bad > limit:
            images = list(self.bad[split].gather().values())
            self.send("bad", split=split, images=[(image.uri, image.reason) for image in images])
            names = "; ".join(f"{image.uri} ({image.reason})" for image in images[:5])
            more = f"; and {len(images) - 5} more" if len(images) > 5 else ""
            raise BadImagesError(
                f"{len(images)} of {self.loop['sizes'][split]} {split} images cannot be decoded, more than"
                f" data.max_bad_fraction={self.config.data.max_bad_fraction} allows: {names}{more}"
            )

    def collect_bad(self, split: str) -> int:
        """Images of the split found bad so far, over all ranks; new ones are sent to the driver."""
        images = self.bad[split].gather()
        fresh = [image for row, image in sorted(images.items()) if row not in self.told[split]]
        self.told[split].update(images)
        if fresh:
            self.send("bad", split=split, images=[(image.uri, image.reason) for image in fresh])
        return len(images)

    def score(self, split: str, network: torch.nn.Module) -> dict[str, Any]:
        """Metrics of a split, over every image exactly once; the same on every rank."""
        scores = score_split(
            self.loop["tables"][split], self.loop["sizes"][split], network, self.config, self.device, self.bad[split]
        )
        num_bad = self.collect_bad(split)
        self.check_bad(split, num_bad)
        return split_metrics(split, scores, self.counts.names) | {f"{split}/bad_images": num_bad}

    def report(self, metrics: dict[str, Any], epoch: int) -> None:
        """Hands metrics and the checkpoint to Ray Train; the name is unique over restarts, as Ray asks."""
        name = f"epoch_{epoch:04d}_{int(time.time()):x}"
        if self.rank > 0:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory(prefix="msrn_") as folder:
            trainee = self.trainee
            numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
            checkpoint = Checkpoint(
                self.config,
                self.counts.names,
                self.counts,
                self.evaluated.state_dict(),
                (0.5,) * len(self.counts.names),
                numbers,
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
        self.send("epoch", metrics=numbers, checkpoint=name)

    def score_test(self) -> None:
        """Scores the test split once, with the weights of the best epoch on val."""
        reported = ray.train.get_all_reported_checkpoints()
        best = max(reported, key=lambda one: one.metrics["val/mAP"])
        with best.checkpoint.as_directory() as folder:
            weights = load_checkpoint(Path(folder)).weights
        network = self.trainee.network
        network.load_state_dict(dict(weights))
        metrics = self.score("test", network)
        self.send("test", metrics=metrics)


def train_loop_per_worker(loop_config: dict[str, Any]) -> None:
    """Ray Train's entry of each worker; see `build_trainer` for what `loop_config` holds."""
    _Worker(loop_config).run()


def amp_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of a setting: `auto` is bf16 on a GPU that has it; None means float32."""
    if choice == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


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
        amp_dtype=amp_dtype(config.train.amp, device),
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


@contextmanager
def listening(events: Queue, log: RunLog) -> Iterator[None]:
    """Hands events to the log from a thread until the block ends and the queue is empty."""
    stop = threading.Event()

    def pump() -> None:
        while True:
            last = stop.is_set()
            for event in events.get_nowait_batch(min(events.qsize(), 64)):
                log.handle(event)
            if last and events.empty():
                return
            stop.wait(0.1)

    thread = threading.Thread(target=pump, name="run-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)
        log.close()


def absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """The config with absolute local paths: workers may have another working directory, and a saved config is run from anywhere."""
    changes: dict[str, str] = {"train.storage": _absolute(config.train.storage)}
    for name, value in (("data.root", config.data.root), ("data.word_vectors", config.data.word_vectors)):
        if value is not None and "://" not in value:
            changes[name] = _absolute(value)
    weights = config.model.pretrained
    if weights is not None and Path(weights).expanduser().exists():
        changes["model.pretrained"] = _absolute(weights)
    return config.with_overrides(changes)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


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
    if resume and not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: no run to resume, it holds no {CONFIG_FILE}")
    if not resume and folder.exists():
        raise UserError(f"{folder} exists already; give another train.run_name, or --resume {folder}")
    materials = gather_materials(config)
    for line in describe(materials, config):
        print(line, flush=True)
    connect(config.resources)
    allocation = allocate(config.resources)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"train.storage {folder}: cannot be written ({error.strerror})") from None
    log = RunLog(folder)
    events = Queue(actor_options={"num_cpus": 0})
    with listening(events, log):
        run_trainer(build_trainer(config, materials, allocation, run_name=name, events=events))
    best = find_model_file(folder).parent
    metrics = {key: value for key, value in load_checkpoint(best).metrics.items() if key.startswith("val/")} | log.test
    return TrainResult(folder, best, metrics)


def run_trainer(trainer: TorchTrainer) -> ray.train.Result:
    """`fit`, with a worker's UserError raised as itself instead of inside Ray's."""
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as failure:
        for error in getattr(failure, "worker_failures", {}).values():
            cause = getattr(error, "cause", error)
            if isinstance(cause, UserError):
                raise cause from None
        raise


def resume_config(run: Path) -> ExperimentConfig:
    """The config of a run folder, set to write into that folder again.

    Raises:
        UserError: if the folder is not a run.
    """
    folder = run.expanduser().resolve()
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{run}: not a run folder, it holds no {CONFIG_FILE}")
    return load_config(folder / CONFIG_FILE).with_overrides(
        {"train.storage": str(folder.parent), "train.run_name": folder.name}
    )
