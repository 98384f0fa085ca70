"""Scores of a split over all ranks, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch

from . import distributed
from .config import ExperimentConfig
from .engine import Scores, evaluate, gather_scores
from .metrics import MultiLabelMetrics
from .pipeline import BadImages, eval_batches
from .sampling import EvalPlan
from .types import Batch


def score_split(
    table: ray.ObjectRef[pa.Table],
    size: int,
    network: torch.nn.Module,
    config: ExperimentConfig,
    device: torch.device,
    bad: BadImages,
    watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Scores:
    """Scores a split over all ranks, each image exactly once; the same on every rank. `watch` sees the batches come."""
    plan = EvalPlan(size, distributed.rank(), distributed.world_size(), config.train.eval_batch_size)
    own = evaluate(
        network,
        watch(eval_batches(table, plan, config.data, bad)),
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
