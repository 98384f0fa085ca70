"""`evaluate_checkpoint`: scores a split with Ray Train workers, every image exactly once whatever their number."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train.torch
from ray.train.torch import TorchTrainer

from ..config import ExperimentConfig
from ..datasets.protocol import load_splits
from ..errors import BadImagesError, UserError
from ..inference.predictor import build_from_checkpoint
from ..model import choose_attention_kernels
from ..ray_cluster.allocation import allocate, decode_cpus
from ..ray_cluster.connection import connect
from ..ray_data.pipeline import limit_ray_data
from ..runs.checkpoint import Checkpoint, load_checkpoint
from ..runs.folder import absolute_paths
from ..training.bad_images import BadImages
from ..training.evaluate import split_metrics
from .elastic_fit import run_trainer
from .scoring import score_split
from .torch_trainer import run_config, scaling


def evaluate_checkpoint(path: Path, config: ExperimentConfig, split: str) -> dict[str, Any]:
    """All metrics of one split.

    Args:
        path: checkpoint folder, `model.pt` or run folder.
        config: data, protocol, resources, and batch size to evaluate with; its model is not used, the checkpoint's is.
        split: `train`, `val` or `test`.

    Returns:
        `split/mAP`, ..., `split/AP/<label>`, `split/images`, `split/bad_images`; `protocol`; `notes` on the data, `bad` images.

    Raises:
        UserError: if the checkpoint cannot be read, or its labels are not those of the data set.
    """
    checkpoint = load_checkpoint(path)
    config = absolute_paths(config)
    splits = load_splits(config)
    table = splits.named(split)
    check_labels(checkpoint, table.label_names, str(path))
    print(f"scoring {len(table)} {split} images; starting Ray and the workers", flush=True)
    connect(config.resources)
    allocation = replace(allocate(config.resources), elastic=None)  # a split is scored in one go
    loop_config = {
        "config": config.to_dict(),
        "checkpoint": ray.put(checkpoint),
        "table": ray.put(table.table),
        "size": len(table),
        "split": split,
    }
    with tempfile.TemporaryDirectory(prefix="msrn_evaluate_") as storage:
        trainer = TorchTrainer(
            _evaluate_loop,  # type: ignore[arg-type]  # typed as Train V1, which returned nothing
            train_loop_config=loop_config,
            scaling_config=scaling(allocation),
            run_config=run_config("evaluate", storage),
        )
        metrics: dict[str, Any] = run_trainer(trainer).return_value  # type: ignore[attr-defined]  # typed as Train V1
    trained = checkpoint.config
    notes = [*splits.notes, *filter(None, [metrics.pop("kernels")])]
    if split != "test" and (trained.protocol, trained.data.val_fraction, trained.data.split_seed) != (
        config.protocol,
        config.data.val_fraction,
        config.data.split_seed,
    ):
        notes.append(f"the checkpoint was trained under another split: {split} may hold images that it has learnt from")
    return metrics | {"notes": notes, "protocol": config.protocol}


def check_labels(checkpoint: Checkpoint, label_names: tuple[str, ...], name: str) -> None:
    """Refuses a checkpoint of other labels, or of the same ones in another order.

    Raises:
        UserError: with what differs.
    """
    if checkpoint.label_names == label_names:
        return
    theirs, ours = set(checkpoint.label_names), set(label_names)
    if theirs == ours:
        raise UserError(
            f"checkpoint {name} has the data set's labels in another order; use the reader it was trained with"
        )
    raise UserError(
        f"checkpoint {name} has {len(theirs)} labels, the data set {len(ours)};"
        f" only in the checkpoint: {', '.join(sorted(theirs - ours)[:5]) or 'none'};"
        f" only in the data set: {', '.join(sorted(ours - theirs)[:5]) or 'none'}"
    )


def _evaluate_loop(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry of each worker; rank 0's value is what the driver gets."""
    config = ExperimentConfig.model_validate(loop_config["config"])
    limit_ray_data(decode_cpus(ray.train.get_context().get_world_size(), config.resources.cpus_per_worker))
    checkpoint: Checkpoint = ray.get(loop_config["checkpoint"])
    device = ray.train.torch.get_device()
    network = build_from_checkpoint(checkpoint).to(device)
    # a checkpoint that was trained with `on` is scored where there is no compiler too
    settings = checkpoint.config.model.model_copy(
        update={"compile": "auto" if checkpoint.config.model.compile != "off" else "off"}
    )
    kernels = choose_attention_kernels(network, settings, device, ray.train.get_context().get_world_rank())
    bad = BadImages()
    split = loop_config["split"]
    scores = score_split(loop_config["table"], loop_config["size"], network, config, device, bad)
    images = sorted(bad.gather().values(), key=lambda image: image.row)
    listed = [f"{image.uri} ({image.reason})" for image in images]
    if len(images) > config.data.max_bad_fraction * loop_config["size"]:
        raise BadImagesError(
            f"{len(images)} of {loop_config['size']} {split} images cannot be decoded, more than"
            f" data.max_bad_fraction={config.data.max_bad_fraction} allows: {'; '.join(listed[:5])}"
        )
    metrics = split_metrics(split, scores, checkpoint.label_names)
    return metrics | {f"{split}/bad_images": len(images), "bad": listed, "kernels": kernels}
