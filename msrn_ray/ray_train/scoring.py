"""Scores a split over all ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ray
import torch

from ..config import ExperimentConfig
from ..ray_data.pipeline import eval_batches
from ..training import distributed
from ..training.bad_images import BadImages
from ..training.evaluate import Scores, evaluate, gather_scores
from ..training.sampling import EvalPlan
from ..types import Batch
from .worker_input import StoredSplit


def score_split(
    split: StoredSplit,
    network: torch.nn.Module,
    config: ExperimentConfig,
    bad: BadImages,
    watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Scores:
    """Score a split over all ranks, each image exactly once; the same on every rank, which must all call it.

    Args:
        split: what to score.
        network: on this rank's device.
        config: batch size and image settings.
        bad: collects images that could not be decoded.
        watch: wraps the batches; it sees them arrive.
    """
    plan = EvalPlan(split.size, distributed.rank(), distributed.world_size(), config.train.eval_batch_size)
    scores = evaluate(
        network,
        watch(eval_batches(split.table, plan, config.data, bad)),
        device=next(network.parameters()).device,
        num_classes=int(ray.get(split.table).schema.field("target").type.list_size),
    )
    return gather_scores(scores)
