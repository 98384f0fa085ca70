"""Estimates how long a run takes on GPUs that you do not have yet: arithmetic on counted operations and stated assumptions, no Ray.

A step computes the GPU's images, updates the weights, and waits for the part of the gradient exchange (a ring all-reduce) that does not
hide behind the backward pass. `python -m tests.benchmarks.plan` compares the same formula with 1, 2 and 4 workers on CPUs. The formula
cannot know three things: which part of its peak a GPU reaches (`efficiency` is an assumption, not a measurement), how well the exchange
really hides, and how long a step waits for images if too few CPUs decode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import ExperimentConfig
from ..errors import UserError
from ..model import build_model
from ..presets import PRESETS

ATTENTION = 0.1  # of the backbone's time: measured on CPUs with the elementwise head
BACKWARD = 2 / 3  # of a step's computing: workers exchange the gradients that are ready during the backward pass
# memory traffic per weight and step: clipping reads the gradient twice; SGD reads 3 numbers and writes 2
UPDATE_BYTES = 28


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        weights: trained weights.
        flops: floating-point operations of the forward pass of one image; an addition and a multiplication count as two.
    """

    weights: int
    flops: float


@dataclass(frozen=True)
class Hardware:
    """What the network runs on: a GPU, or threads of a CPU, per worker.

    Attributes:
        workers: data-parallel workers.
        flops: peak of a worker, operations per second.
        link: bytes per second of the slowest link between two workers.
        memory: bytes per second of a worker's memory.
        efficiency: part of the peak that a worker reaches, in (0, 1].
        overlap: part of a step's computing behind which the exchange can hide.
    """

    workers: int
    flops: float
    link: float
    memory: float
    efficiency: float = 1.0
    overlap: float = BACKWARD


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    compute: float
    update: float
    exchange: float
    waiting: float

    @property
    def total(self) -> float:
        """Seconds of the whole step. Of the exchange, only the waiting counts."""
        return self.compute + self.update + self.waiting


def count_cost(config: ExperimentConfig, num_labels: int) -> Cost:
    """Return the cost of a network. It is built without memory for its weights."""
    with torch.device("meta"):
        network = build_model(config.model, torch.randn(num_labels, 50), torch.eye(num_labels).bool(), pretrained=False)
        side = config.data.image_size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.backbone(torch.zeros(1, 3, side, side))
    weights = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    head_weights = weights - sum(weight.numel() for weight in network.backbone.parameters() if weight.requires_grad)
    return Cost(weights, counter.get_total_flops() * (1 + ATTENTION) + 2.0 * head_weights)


def predict_step(cost: Cost, hardware: Hardware, images: float, gradient_bytes: int = 4) -> Step:
    """Return the time of a step.

    Args:
        cost: of the network.
        hardware: what it runs on.
        images: images per worker.
        gradient_bytes: bytes per weight that workers exchange.
    """
    # the backward pass costs twice the forward pass
    compute = 3 * images * cost.flops / (hardware.flops * hardware.efficiency)
    update = UPDATE_BYTES * cost.weights / hardware.memory
    sent = 2 * (hardware.workers - 1) / hardware.workers * gradient_bytes * cost.weights
    exchange = sent / hardware.link
    return Step(compute, update, exchange, max(0.0, exchange - hardware.overlap * compute))


def describe_plan(
    config: ExperimentConfig,
    hardware: Hardware,
    *,
    decode_rate: float,
    images: int | None,
    labels: int | None,
    dollars: float | None,
) -> list[str]:
    """Return the plan as lines for a person: both heads side by side, then the preset's head.

    Args:
        config: the experiment.
        hardware: the GPUs.
        decode_rate: images per second that a CPU decodes.
        images: train images, or None for those of the benchmark.
        labels: number of labels, or None for that of the benchmark.
        dollars: price of a GPU per hour, or None.

    Raises:
        UserError: if the size of the data set is not known, or the batch leaves GPUs without an image.
    """
    images, labels = _data_size(config, images, labels)
    batch, gpus = config.train.batch_size, hardware.workers
    if gpus > batch:
        raise UserError(f"train.batch_size={batch} leaves some of {gpus} GPUs without an image; raise it")
    gradient_bytes = 2 if config.optim.compress_gradients else 4
    lines = [
        f"{config.preset}: {gpus} GPUs, batch {batch} ({batch / gpus:g} images per GPU), {config.data.image_size} pixels, {labels} labels",
        f"{'head':<13}{'weights':>9}{'computing':>11}{'update':>9}{'exchange':>10}{'waited for':>12}{'step':>9}{'images/s':>10}",
    ]
    costs = {head: count_cost(config.with_overrides({"model.head": head}), labels) for head in ("mlp", "elementwise")}
    steps = {head: predict_step(cost, hardware, batch / gpus, gradient_bytes) for head, cost in costs.items()}
    lines += [_describe_step(head, costs[head], step, batch) for head, step in steps.items()]
    head = config.model.head
    step, rate = steps[head], batch / steps[head].total
    lines.append(f"{head} head: {step.waiting / step.total:.0%} of a step waits for gradients of other GPUs")
    if gpus > 1:
        alone = batch / predict_step(costs[head], replace(hardware, workers=1), batch, gradient_bytes).total
        lines.append(f"one GPU alone would do {alone:.0f} images/s{_advice(rate / alone)}")
    epoch = images / rate
    run = config.train.epochs * epoch
    price = ""
    if dollars is not None:
        price = f", {run / 3600 * gpus * dollars:,.0f} dollars at {dollars:g} per GPU and hour"
    return [
        *lines,
        f"decoding: {rate / gpus / decode_rate:.2f} CPUs per GPU besides its worker's, {decode_rate:g} images/s each",
        f"an epoch of {images:,} images: {_time(epoch)}; {config.train.epochs} epochs: {_time(run)}{price}",
        f"assumed: a GPU reaches {hardware.efficiency:.0%} of its peak; attention takes {ATTENTION:.0%} of the backbone's time;",
        f"the exchange hides behind the backward pass; {hardware.memory / 1e9:g} GB/s of GPU memory; not counted: scoring, the head node",
    ]


def _data_size(config: ExperimentConfig, images: int | None, labels: int | None) -> tuple[int, int]:
    """Return the given number of train images and of labels, or those of the benchmark."""
    preset = PRESETS[config.preset]
    val_fraction = 0.0 if config.preset == "scenes" or config.protocol == "paper" else config.data.val_fraction
    if images is None and preset.num_train is not None:
        images = round(preset.num_train * (1 - val_fraction))
    labels = labels or preset.num_labels
    if images is None or labels is None:
        raise UserError(f"{config.preset}: the size of the data set depends on yours; say --images and --labels")
    return images, labels


def _describe_step(head: str, cost: Cost, step: Step, batch: int) -> str:
    columns = ((step.compute, 8), (step.update, 6), (step.exchange, 7), (step.waiting, 9), (step.total, 6))
    numbers = "".join(f"{1e3 * seconds:>{width}.0f} ms" for seconds, width in columns)
    return f"{head:<13}{cost.weights / 1e6:>7.1f} M{numbers}{batch / step.total:>10.0f}"


def _advice(gain: float) -> str:
    if gain > 1.2:
        return f": {gain:.1f} times as many with all"
    return f", so more do not pay off ({gain:.1f} times): raise --batch-size, or take model.head elementwise or optim.compress_gradients"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
