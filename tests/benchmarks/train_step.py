"""Time and memory of a train step, beside its bare backbone and beside the step with the direct form of the attention.

    python -m tests.benchmarks.train_step [single|workers|curve ...]

`single`: one process. Forms take turns and show medians. The step is forward, backward, clipping and SGD with momentum, as in the presets.
`workers`: two processes with a core each share the batch through DistributedDataParallel, with and without compressed gradients, beside
one process with both cores. `curve`: the losses of 40 steps with the direct form and with the compiled kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from msrn_ray.model import MSRN
from msrn_ray.presets import PRESETS
from msrn_ray.settings import OptimSettings
from msrn_ray.training import distributed
from msrn_ray.training.engine import train_step
from msrn_ray.training.learner import Learner, build_learner, build_network
from msrn_ray.types import Batch

from .attention import direct
from .measure import Phases, alternate, peak_bytes, stopwatch


class Shape(NamedTuple):
    """A preset's network and the size of its batch."""

    preset: str
    labels: int
    images: int


SHAPES = {
    "COCO": Shape("coco2014", 80, 2),
    "VOC": Shape("voc2007", 20, 4),
    "NUS-WIDE": Shape("nuswide", 81, 2),
}
SIDE, ROUNDS, STEPS = 448, 5, 40
CPU = torch.device("cpu")
CURVE_LR = 2e-4  # random weights and batches of 2 amplify rounding: at 1e-3 two runs of the direct form differ by 2e-3


class DirectAttention(nn.Module):
    """Stands in for the model's attention."""

    def forward(self, levels: list[Tensor], semantics: Tensor) -> Tensor:
        return direct(levels, semantics)


def make_batch(images: int, labels: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        (torch.rand(images, labels, generator=generator) < 0.05).to(torch.int8),
        torch.arange(images),
        torch.ones(images, dtype=torch.bool),
    )


def make_learner(preset: str, labels: int, *, lr: float | None = None, **model: Any) -> Learner:
    """Return the preset's learner with random weights in full precision, as a worker builds it."""
    torch.manual_seed(0)
    changes = {f"model.{name}": value for name, value in model.items()}
    config = PRESETS[preset].config.with_overrides(
        changes | {"train.amp": "off", "model.compile": "on", "model.pretrained": None}
    )
    if lr is not None:
        config = config.model_copy(update={"optim": OptimSettings(lr=lr)})
    vectors, mask = torch.randn(labels, 50), torch.eye(labels, dtype=torch.bool)
    network, _ = build_network(config, vectors, mask, torch.full((labels,), 0.05), device=CPU)
    return build_learner(config, network.train(), CPU, steps_per_epoch=1000)


def single(name: str) -> None:
    """Print the table of a shape."""
    preset, labels, images = SHAPES[name]
    batch = make_batch(images, labels)
    floats = batch.images.float().contiguous(memory_format=torch.channels_last)
    bare = torchvision.models.resnet101().to(memory_format=torch.channels_last).train()
    mlp = make_learner(preset, labels)
    elementwise = make_learner(preset, labels, head="elementwise")
    assert isinstance(mlp.network, MSRN)
    kernels, written_out = mlp.network.attention, DirectAttention()

    def backbone() -> Phases:
        bare.zero_grad(set_to_none=True)
        output: list[Tensor] = []
        return stopwatch(lambda: output.append(bare(floats).sum()), lambda: output[0].backward())

    def step(learner: Learner, attention: nn.Module | None = None) -> Phases:
        if attention is not None:
            learner.network.attention = attention
        return stopwatch(lambda: train_step(learner, batch, images))

    forms: dict[str, Callable[[], Phases]] = {
        "ResNet-101, forward + backward": backbone,
        "step, elementwise head": lambda: step(elementwise),
        "step, mlp head": lambda: step(mlp, kernels),
        "step, mlp head, direct attention": lambda: step(mlp, written_out),
    }
    times = {form: sum(phases) for form, phases in alternate(forms, ROUNDS).items()}
    memory = {}
    for form, run in forms.items():
        for network in (bare, mlp.network, elementwise.network):
            network.zero_grad(set_to_none=True)  # so that every form starts with only weights and optimizer state
        memory[form] = peak_bytes(run)
    bare_seconds, bare_bytes = times["ResNet-101, forward + backward"], memory["ResNet-101, forward + backward"]
    direct_bytes = memory["step, mlp head, direct attention"]
    print(
        f"{name}: {labels} labels, {images} images of {SIDE} x {SIDE}; memory over the start of a step, optimizer state made before"
    )
    for form, seconds in times.items():
        print(
            f"  {form:34s}{seconds:7.2f} s {seconds / bare_seconds:6.2f} x backbone"
            f"{memory[form] / 2**20:9.0f} MiB{memory[form] / bare_bytes:6.2f} x backbone{memory[form] / direct_bytes:6.2f} x direct"
        )


def worker_seconds(world: int, shape: Shape, head: str, *, compress: bool = False) -> float:
    """Return the seconds of a step that `world` new processes share."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, (world, folder, shape, head, compress), nprocs=world)  # type: ignore[attr-defined,no-untyped-call]  # untyped in torch
        return float((Path(folder) / "seconds").read_text(encoding="utf-8"))


def _worker(rank: int, world: int, folder: str, shape: Shape, head: str, compress: bool) -> None:
    """Run one process of a data-parallel step; rank 0 writes its median seconds to a file."""
    preset, labels, images = shape
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    learner = make_learner(preset, labels, head=head)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), world_size=world, rank=rank)
        learner.model = DistributedDataParallel(learner.model, **distributed.parallel_settings(1))
        if compress:
            distributed.compress_gradients(learner.model)
    batch = make_batch(images // world, labels, rank)
    for _ in range(2):
        train_step(learner, batch, images)
    seconds = [stopwatch(lambda: train_step(learner, batch, images))[0] for _ in range(ROUNDS)]
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(seconds)), encoding="utf-8")
    if world > 1:
        dist.destroy_process_group()


def workers(name: str) -> None:
    """Print one process against two, for both heads. They do not take turns: a process group needs separate processes."""
    for head in ("elementwise", "mlp"):
        base = 0.0
        for world, compress in ((1, False), (2, False), (2, True)):
            seconds = worker_seconds(world, SHAPES[name], head, compress=compress)
            base = base or seconds
            how = f"{world} process{'es' if world > 1 else ''}{', bf16 gradients' if compress else ''}"
            print(f"  {name}, {head} head, {how:32s}{seconds:7.2f} s {seconds / base:6.2f} x one process")


def curve(name: str) -> None:
    """Print how far the losses of the two forms differ, and how far the direct form differs from itself on one thread."""
    preset, labels, images = SHAPES[name]
    losses: dict[str, list[float]] = {}
    threads = torch.get_num_threads()
    for form in ("direct", "compiled", "direct, one thread"):
        learner = make_learner(preset, labels, lr=CURVE_LR, head="elementwise")
        if form != "compiled":
            learner.network.attention = DirectAttention()
        torch.set_num_threads(1 if form.endswith("one thread") else threads)
        losses[form] = [
            float(train_step(learner, make_batch(images, labels, seed=step), images).sum()) for step in range(STEPS)
        ]
        torch.set_num_threads(threads)
    for form in ("compiled", "direct, one thread"):
        differences = [
            abs(loss - expected) / abs(expected) for expected, loss in zip(losses["direct"], losses[form], strict=True)
        ]
        print(f"  {name}, {STEPS} steps, {form}: differs from direct by at most {max(differences):.1e} of the loss")
    print(f"  loss {losses['compiled'][0]:.4f} to {losses['compiled'][-1]:.4f}", flush=True)


MODES = {"single": single, "workers": workers, "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=MODES, default=list(MODES))
    print(f"{torch.get_num_threads()} threads", flush=True)
    for mode in parser.parse_args().modes:
        for name in SHAPES if mode == "single" else ["COCO"]:
            MODES[mode](name)


if __name__ == "__main__":
    main()
