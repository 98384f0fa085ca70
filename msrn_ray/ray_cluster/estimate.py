"""How long a run will take on GPUs that one does not have yet: arithmetic on counted operations and stated assumptions; no Ray.

A step is the computing of a GPU's images, the update of the weights, and what of the exchange of gradients (ring all-reduce) does not
hide behind the backward pass. `python -m tests.benchmarks.plan` compares the same formula with 1, 2 and 4 workers on CPUs. What it cannot
know: which part of its peak a GPU reaches (`efficiency` is an assumption, not a measurement), how well the exchange really hides, and
waiting for images where decoding is short of CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..config import ExperimentConfig
from ..errors import UserError
from ..model import build_model

# labels and images of train, as published; only scenes has a val beside it, of the others the protocol takes some for val
SIZES = {
    "scenes": (16, 2_000),
    "voc2007": (20, 5_011),
    "coco2014": (80, 82_081),
    "nuswide": (81, 161_789),
}
ATTENTION = 0.1  # of the backbone's time: measured on CPUs with the elementwise head
BACKWARD = 2 / 3  # of a step's computing: gradients that are ready are exchanged meanwhile
UPDATE_BYTES = (
    28  # moved in memory for each weight and step: clipping reads the gradient twice; SGD reads 3 numbers and writes 2
)


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        weights: that are trained.
        flops: floating-point operations of the forward pass of one image, additions and multiplications counted apart.
    """

    weights: int
    flops: float


@dataclass(frozen=True)
class Machine:
    """What the network runs on.

    Attributes:
        workers: data-parallel ones.
        flops: operations a second that a worker really does.
        link: bytes a second of the slowest link between two workers.
        memory: bytes a second of a worker's memory.
        overlap: part of a step's computing behind which the exchange can hide.
    """

    workers: int
    flops: float
    link: float
    memory: float
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
        """All of it; the exchange counts where it is waited for."""
        return self.compute + self.update + self.waiting


def count(config: ExperimentConfig, num_labels: int) -> Cost:
    """Builds the network without memory for its weights, and counts."""
    with FakeTensorMode():
        network = build_model(config.model, torch.randn(num_labels, 50), torch.eye(num_labels).bool(), pretrained=False)
        side = config.data.image_size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.backbone(torch.zeros(1, 3, side, side))
    trained = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    behind = trained - sum(weight.numel() for weight in network.backbone.parameters() if weight.requires_grad)
    return Cost(trained, counter.get_total_flops() * (1 + ATTENTION) + 2.0 * behind)


def predict_step(cost: Cost, machine: Machine, images: float, gradient_bytes: int = 4) -> Step:
    """A step with so many images for each worker; `gradient_bytes` a weight are exchanged."""
    compute = 3 * images * cost.flops / machine.flops  # the backward pass costs twice the forward pass
    update = UPDATE_BYTES * cost.weights / machine.memory
    sent = 2 * (machine.workers - 1) / machine.workers * gradient_bytes * cost.weights
    exchange = sent / machine.link
    return Step(compute, update, exchange, max(0.0, exchange - machine.overlap * compute))


@dataclass(frozen=True)
class Request:
    """What is planned; see `msrn plan --help`."""

    config: ExperimentConfig
    gpus: int
    gpu_tflops: float
    network_gbps: float
    memory_gbs: float
    efficiency: float
    decode_rate: float
    images: int | None
    labels: int | None
    dollars: float | None


def describe_plan(request: Request) -> list[str]:
    """The plan as lines for a person: both heads side by side, then the preset's own.

    Raises:
        UserError: if the size of the data set is not known, or the batch leaves GPUs without an image.
    """
    config, gpus = request.config, request.gpus
    known = SIZES.get(config.preset)
    labels = request.labels or (known[0] if known else None)
    images = request.images or (_train_images(config, known[1]) if known else None)
    if labels is None or images is None:
        raise UserError(f"{config.preset}: how large the data set is depends on yours; say --images and --labels")
    batch = config.train.batch_size
    if gpus > batch:
        raise UserError(f"train.batch_size={batch} leaves some of {gpus} GPUs without an image; raise it")
    machine = Machine(
        gpus, request.gpu_tflops * 1e12 * request.efficiency, request.network_gbps / 8 * 1e9, request.memory_gbs * 1e9
    )
    sent = 2 if config.optim.compress_gradients else 4
    lines = [
        f"{config.preset}: {gpus} GPUs, batch {batch} ({batch / gpus:g} images a GPU), {config.data.image_size} pixels, {labels} labels",
        f"{'head':<13}{'weights':>9}{'computing':>11}{'update':>9}{'exchange':>10}{'waited for':>12}{'step':>9}{'images/s':>10}",
    ]
    costs, steps = {}, {}
    for head in ("mlp", "elementwise"):
        cost = costs[head] = count(config.with_overrides({"model.head": head}), labels)
        step = steps[head] = predict_step(cost, machine, batch / gpus, sent)
        numbers = "".join(
            f"{1e3 * seconds:>{width}.0f} ms"
            for seconds, width in (
                (step.compute, 8),
                (step.update, 6),
                (step.exchange, 7),
                (step.waiting, 9),
                (step.total, 6),
            )
        )
        lines.append(f"{head:<13}{cost.weights / 1e6:>7.1f} M{numbers}{batch / step.total:>10.0f}")
    step = steps[config.model.head]
    rate = batch / step.total
    epoch = images / rate
    hours = config.train.epochs * epoch / 3600
    price = (
        ""
        if request.dollars is None
        else f", {hours * gpus * request.dollars:,.0f} dollars at {request.dollars:g} a GPU and hour"
    )
    lines.append(
        f"{config.model.head} head: {step.waiting / step.total:.0%} of a step waits for gradients of other GPUs"
    )
    if gpus > 1:
        alone = batch / predict_step(costs[config.model.head], replace(machine, workers=1), batch, sent).total
        lines.append(f"one GPU alone would do {alone:.0f} images/s{_advice(rate / alone)}")
    lines += [
        f"decoding: {rate / gpus / request.decode_rate:.2f} CPUs a GPU beside the one of its worker, {request.decode_rate:g} images/s each",
        f"an epoch of {images:,} images: {_time(epoch)}; {config.train.epochs} epochs: {_time(3600 * hours)}{price}",
        f"assumed: {request.efficiency:.0%} of the GPUs' peak is reached; attention takes {ATTENTION:.0%} of the backbone's time;",
        f"the exchange hides behind the backward pass; {request.memory_gbs:g} GB/s of GPU memory; not counted: scoring, the cluster's head",
    ]
    return lines


def _train_images(config: ExperimentConfig, published: int) -> int:
    if config.preset == "scenes" or config.protocol == "paper":
        return published
    return round(published * (1 - config.data.val_fraction))


def _advice(gain: float) -> str:
    if gain > 1.2:
        return f": {gain:.1f} times as many with all"
    return f", so more do not pay off ({gain:.1f} times): raise --batch-size, or take model.head elementwise or optim.compress_gradients"


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 7200
        else f"{seconds / 60:.1f} min"
        if seconds >= 120
        else f"{seconds:.0f} s"
    )
