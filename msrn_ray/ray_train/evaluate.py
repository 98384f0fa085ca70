"""`evaluate_checkpoint`: scores a split with Ray Train workers, every image exactly once whatever their number."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.torch import TorchTrainer

from ..config import ExperimentConfig
from ..datasets.protocol import load_splits
from ..errors import UserError
from ..inference.predictor import build_from_checkpoint
from ..model import choose_attention_kernels
from ..ray_cluster.allocation import allocate, decode_cpus
from ..ray_cluster.connection import connect
from ..ray_data.pipeline import limit_ray_data
from ..runs.checkpoint import Checkpoint, load_checkpoint
from ..runs.folder import absolute_paths
from ..training.bad_images import BadImages, check_bad_images
from ..training.evaluate import split_metrics
from .scoring import score_split
from .torch_trainer import plain_errors, run_config, scaling_config
from .worker_input import StoredSplit


@dataclass(frozen=True)
class _EvaluationInput:
    """What each worker gets: how to evaluate, what, on which images."""

    config: ExperimentConfig
    checkpoint: ray.ObjectRef[Checkpoint]
    name: str
    split: StoredSplit


@dataclass(frozen=True)
class _EvaluationOutput:
    """What rank 0 returns: metrics by name, bad images as `uri (reason)`, the attention kernels that ran."""

    metrics: dict[str, Any]
    bad: list[str]
    kernels: str


def evaluate_checkpoint(path: Path, config: ExperimentConfig, split: str) -> dict[str, Any]:
    """Score one split.

    Args:
        path: checkpoint folder, `model.pt` or run folder.
        config: data, protocol, resources, and batch size of the evaluation; the model is the checkpoint's.
        split: `train`, `val` or `test`.

    Returns:
        `split/mAP`, ..., `split/AP/<label>`, `split/images`, `split/bad_images`; `protocol`; `notes` on the data, `bad` images.

    Raises:
        UserError: if the checkpoint cannot be read, or its labels differ from the data set's.
    """
    checkpoint = load_checkpoint(path)
    config = absolute_paths(config)
    splits = load_splits(config)
    table = splits.named(split)
    check_labels(checkpoint, table.label_names, str(path))
    print(f"scoring {len(table)} {split} images; starting Ray and the workers", flush=True)
    connect(config.resources)
    allocation = replace(allocate(config.resources), elastic=None)  # an evaluation cannot resume, so its workers stay
    stored = StoredSplit(ray.put(table.table), len(table))
    with tempfile.TemporaryDirectory(prefix="msrn_evaluate_") as storage:
        trainer = TorchTrainer(
            _evaluate_worker,  # type: ignore[arg-type]  # typed as Train V1, which returned nothing
            train_loop_config={"input": _EvaluationInput(config, ray.put(checkpoint), split, stored)},
            scaling_config=scaling_config(allocation),
            run_config=run_config("evaluate", storage),
        )
        with plain_errors():
            output: _EvaluationOutput = trainer.fit().return_value  # type: ignore[attr-defined]  # typed as Train V1
    notes = [*splits.notes, *filter(None, [output.kernels])]
    trained = checkpoint.config
    if split != "test" and (trained.protocol, trained.data.val_fraction, trained.data.split_seed) != (
        config.protocol,
        config.data.val_fraction,
        config.data.split_seed,
    ):
        notes.append(f"the checkpoint was trained under another split: {split} may hold images of its train split")
    return output.metrics | {"bad": output.bad, "notes": notes, "protocol": config.protocol}


def check_labels(checkpoint: Checkpoint, label_names: tuple[str, ...], name: str) -> None:
    """Refuse a checkpoint of other labels, or of the same labels in another order.

    Raises:
        UserError: with the difference.
    """
    if checkpoint.label_names == label_names:
        return
    trained, found = set(checkpoint.label_names), set(label_names)
    if trained == found:
        raise UserError(
            f"checkpoint {name} has the data set's labels in another order; use the reader it was trained with"
        )
    raise UserError(
        f"checkpoint {name} has {len(trained)} labels, the data set {len(found)};"
        f" only in the checkpoint: {', '.join(sorted(trained - found)[:5]) or 'none'};"
        f" only in the data set: {', '.join(sorted(found - trained)[:5]) or 'none'}"
    )


def _evaluate_worker(loop_config: dict[str, Any]) -> _EvaluationOutput:
    """Score on one rank; the driver gets rank 0's value."""
    evaluation: _EvaluationInput = loop_config["input"]
    config, split = evaluation.config, evaluation.split
    context = ray.train.get_context()
    limit_ray_data(decode_cpus(context.get_world_size(), config.resources.cpus_per_worker))
    checkpoint = ray.get(evaluation.checkpoint)
    device = ray.train.torch.get_device()
    network = build_from_checkpoint(checkpoint).to(device)
    # a checkpoint that was trained with `on` must also score on machines without a compiler
    compile_mode = "off" if checkpoint.config.model.compile == "off" else "auto"
    settings = checkpoint.config.model.model_copy(update={"compile": compile_mode})
    kernels = choose_attention_kernels(network, settings, device, context.get_world_rank())
    bad = BadImages()
    scores = score_split(split, network, config, bad)
    images = bad.gather()
    check_bad_images(images, evaluation.name, split.size, config.data.max_bad_fraction)
    metrics = split_metrics(evaluation.name, scores, checkpoint.label_names)
    metrics[f"{evaluation.name}/bad_images"] = len(images)
    return _EvaluationOutput(metrics, [f"{image.uri} ({image.reason})" for image in images], kernels)
