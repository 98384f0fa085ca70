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
from ..errors import UserError
from ..inference.predictor import build_from_checkpoint
from ..model import choose_attention_kernels
from ..ray_cluster.allocation import allocate, decode_cpus
from ..ray_cluster.connection import connect
from ..ray_data.pipeline import limit_ray_data
from ..runs.checkpoint import Checkpoint, find_model_file, load_checkpoint
from ..runs.folder import absolute_paths
from ..runs.scored_images import Request, choose_images
from ..runs.split_file import load_splits_of
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


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: `split/mAP`, ..., `split/AP/<label>`, `split/images`, `split/bad_images`; `split/images_trained_on`, how many of the
            scored images the run trained on, if that is known.
        protocol: how the data set was split.
        notes: lines for the user.
        bad: images that could not be decoded, as `uri (reason)`.
    """

    metrics: dict[str, Any]
    protocol: str
    notes: tuple[str, ...]
    bad: tuple[str, ...]


def evaluate_checkpoint(
    path: Path,
    config: ExperimentConfig,
    split: str,
    *,
    allow_train_images: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Evaluation:
    """Score one split, as the checkpoint's run recorded it.

    Args:
        path: checkpoint folder, `model.pt` or run folder.
        config: data, protocol, resources, and batch size of the evaluation; the model is the checkpoint's.
        split: `train`, `val` or `test`.
        allow_train_images: score other data even if the run trained on some of its images.
        checkpoint: the content of `path`, if it has been read already.

    Raises:
        UserError: if the checkpoint cannot be read, its labels differ from the data set's, or the run trained on images of the split.
    """
    checkpoint = checkpoint or load_checkpoint(path)
    config = absolute_paths(config)
    request = Request(config, split, allow_train_images)
    images = choose_images(request, checkpoint, load_splits_of(find_model_file(path)))
    table = images.table
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
    metrics = dict(output.metrics)
    if images.num_trained is not None:
        metrics[f"{split}/images_trained_on"] = images.num_trained
    notes = (*images.notes, *filter(None, [output.kernels]))
    return Evaluation(metrics, config.protocol, notes, tuple(output.bad))


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
