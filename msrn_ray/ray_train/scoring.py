"""Scores of a split over all ranks, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa
import ray
import torch

from ..config import ExperimentConfig
from ..ray_data.pipeline import eval_batches
from ..training import distributed
from ..training.bad_images import BadImages
from ..training.evaluate import Scores, evaluate, gather_scores
from ..training.sampling import EvalPlan
from ..types import Batch


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
