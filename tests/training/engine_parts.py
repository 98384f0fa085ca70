"""What the tests of the engine share: small models, batches, a plain loop that computes the expected numbers, recording hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # the field's name for it

from msrn_ray.model import build_model
from msrn_ray.settings import ModelSettings
from msrn_ray.training.engine import train_one_epoch
from msrn_ray.training.epoch import EpochSchedule, EpochStats, Progress
from msrn_ray.training.learner import Learner
from msrn_ray.training.sampling import EvalPlan, TrainPlan
from msrn_ray.types import Batch, MSRNOutput

NUM_ROWS, NUM_LABELS, BATCH, SEED, LR, GROUP_WEIGHT = 10, 4, 4, 3, 0.02, 0.02
CPU = torch.device("cpu")


class Toy(nn.Module):
    """A linear layer on 2x2 pooled pixels with random label semantics and dropout. An all-white image gives nan."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.head = nn.Linear(12, NUM_LABELS)
        self.head.weight.data = torch.randn(NUM_LABELS, 12, generator=generator)
        self.head.bias.data.zero_()
        self.labels = nn.Parameter(torch.randn(NUM_LABELS, 5, generator=generator))
        self.groups = nn.Parameter(torch.randn(2, 5, generator=generator))
        self.register_buffer("assignment", torch.randn(NUM_LABELS, 2, generator=generator).softmax(1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> MSRNOutput:
        features = self.dropout(F.adaptive_avg_pool2d(images, 2).flatten(1))
        white = (images > 2.2).flatten(1).all(1, keepdim=True)
        logits = self.head(features).masked_fill(white, float("nan"))
        return MSRNOutput(logits, self.labels, self.groups, self.assignment)


def build_msrn() -> nn.Module:
    """Return the whole network. Its BatchNorm is frozen, so that the images of a batch do not depend on each other."""
    torch.manual_seed(0)
    mask = torch.eye(NUM_LABELS, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    settings = ModelSettings(
        backbone="resnet10",
        pretrained=None,
        head="elementwise",
        levels=("layer2", "layer3"),
        embed_dim=8,
        label_hidden_dim=8,
        graph_hidden_dim=8,
        group_ratio=0.5,
        frozen_batchnorm=True,
    )
    return build_model(settings, torch.randn(NUM_LABELS, 6), mask)


def images_and_targets(side: int = 64) -> tuple[Tensor, Tensor]:
    """Return images [n, 3, S, S] uint8 and targets [n, C] int8 in {1, 0, -1}."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_ROWS, 3, side, side), np.uint8)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(-1, 2, (NUM_ROWS, NUM_LABELS), np.int8))


def make_batch(rows: Sequence[int], valid: Sequence[bool] | None = None, side: int = 64) -> Batch:
    images, target = images_and_targets(side)
    index = torch.tensor(rows, dtype=torch.int64)
    return Batch(images[index], target[index], index, torch.tensor([True] * len(rows) if valid is None else valid))


def make_plan(rank: int = 0, world: int = 1) -> TrainPlan:
    return TrainPlan(NUM_ROWS, BATCH, rank, world, SEED, 0, 1, 5)


def step_batches(plan: TrainPlan, side: int = 64) -> list[Batch]:
    rows, valid, sizes = plan.epoch(0)
    ends = np.cumsum(sizes)
    return [
        make_batch(rows[end - size : end].tolist(), valid[end - size : end].tolist(), side)
        for size, end in zip(sizes, ends, strict=True)
    ]


def make_learner(model: nn.Module, lr: float = LR, **change: Any) -> Learner:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=lr)
    fields: dict[str, Any] = {
        "ema": None,
        "amp_dtype": None,
        "clip_norm": None,
        "accumulation": 1,
        "group_weight": GROUP_WEIGHT,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
    }
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Learner(model, optimizer, scheduler, **(fields | change))


def plain_losses(model: nn.Module, rows: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """Return the classification loss (mean over the rows) and the weighted group loss, written out."""
    images, target = images_and_targets(side)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    output = model((images[list(rows)].float() / 255 - mean) / std)
    row_losses = []
    for logits, labels in zip(output.logits, target[list(rows)], strict=True):
        known = [
            F.softplus(-logit if label == 1 else logit)
            for logit, label in zip(logits, labels, strict=True)
            if label >= 0
        ]
        row_losses.append(torch.stack(known).mean() if known else logits.sum() * 0)
    nearest = output.assignment.argmax(1)
    distance = [(output.label_embedding[i] - output.group_embedding[g]).norm() for i, g in enumerate(nearest)]
    return torch.stack(row_losses).mean(), GROUP_WEIGHT * torch.stack(distance).sum()


def plain_loop(model: nn.Module, steps: Sequence[Sequence[int]], side: int = 64, lr: float = LR) -> list[list[float]]:
    """Run gradient descent on whole batches without the engine. Return both losses of each step."""
    step_losses = []
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for rows in steps:
        losses = plain_losses(model, rows, side)
        step_losses.append([float(loss.detach()) for loss in losses])
        gradients = torch.autograd.grad(sum(losses), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= lr * gradient
    return step_losses


def rows_per_step() -> list[list[int]]:
    """Return the rows of each step of the epoch, over all ranks."""
    return [batch.row.tolist() for batch in step_batches(make_plan())]


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@dataclass
class Hooks:
    """Record the hooks that an epoch calls.

    Attributes:
        num_bad: the number of bad images that this rank reports.
        on_save: called with the statistics of the epoch so far.
        rows: the trained rows of each call.
        progress: the fields of each progress report.
    """

    num_bad: int = 0
    on_save: Callable[[EpochStats], None] = lambda stats: None
    rows: list[list[int]] = field(default_factory=list)
    progress: list[dict[str, Any]] = field(default_factory=list)

    def rows_trained(self, rows: Any) -> None:
        self.rows.append(rows.tolist())

    def progress_made(self, progress: Progress) -> None:
        self.progress.append(dict(vars(progress)))

    def save(self, stats: EpochStats) -> None:
        self.on_save(stats)

    def count_bad_images(self) -> int:
        return self.num_bad

    def image_ids(self, rows: list[int]) -> list[str]:
        return [f"image-{row}" for row in rows]


def run_epoch(
    learner: Learner,
    batches: Sequence[Batch],
    stats: EpochStats | None = None,
    *,
    schedule: EpochSchedule | None = None,
    hooks: Hooks | None = None,
    wait: float = 0.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run `train_one_epoch`. Return its statistics and its progress reports as plain data."""
    stats, hooks = stats or EpochStats(), hooks or Hooks()

    def deliver() -> Iterator[Batch]:
        for batch in batches:
            time.sleep(wait)
            yield batch

    train_one_epoch(learner, deliver(), stats, make_plan(), schedule or EpochSchedule(2), hooks)
    return dict(vars(stats)), hooks.progress


def update_norm(old_weights: dict[str, Tensor], model: nn.Module) -> Tensor:
    """Return the norm of the difference between the model's weights and the old ones."""
    return torch.cat([(value - old_weights[name]).flatten() for name, value in model.named_parameters()]).norm()


def whiten_image(batches: list[Batch], row: int) -> list[Batch]:
    """Make the image of `row` all white, so that `Toy` gives nan for it."""
    for batch in batches:
        batch.images[batch.row == row] = 255
    return batches


@torch.no_grad()
def expected_scores(model: nn.Module, rows: Sequence[int], side: int = 64) -> tuple[Tensor, list[float]]:
    model.eval()
    images, _ = images_and_targets(side)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits = model((images[list(rows)].float() / 255 - mean) / std).logits
    return 1 / (1 + (-logits).exp()), [float(plain_losses(model, [row], side)[0]) for row in rows]


def eval_batches(plan: EvalPlan, side: int = 64) -> list[Batch]:
    return [make_batch(plan.block(index)[0].tolist(), side=side) for index in range(plan.num_blocks)]
