"""The formula of `msrn plan` against 1, 2 and 4 worker processes of this machine: `python -m tests.benchmarks.plan`.

The benchmark measures one process alone (the elementwise step) and the link between processes (an all-reduce). From these it predicts the
steps of both heads with more processes, and then measures those steps. Processes share cores. On CPUs nothing hides the exchange.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from msrn_ray.presets import PRESETS
from msrn_ray.training.engine import train_step
from msrn_ray.training.estimate import Hardware, count_cost, predict_step

from .measure import stopwatch
from .train_step import Shape, make_batch, make_learner, worker_seconds

PRESET, LABELS, IMAGES = "voc2007", 20, 4
WORKERS = (1, 2, 4)
LINK_BYTES = 100_000_000


def all_reduce(rank: int, world: int, folder: str) -> None:
    """Measure an all-reduce of `LINK_BYTES`; rank 0 writes the median seconds to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=5), world_size=world, rank=rank)
    numbers = torch.zeros(LINK_BYTES // 4)
    seconds = [stopwatch(lambda: dist.all_reduce(numbers))[0] for _ in range(4)][1:]
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(seconds)), encoding="utf-8")
    dist.destroy_process_group()


def link(world: int) -> float:
    """Return the bytes per second between the processes of a ring."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(all_reduce, (world, folder), nprocs=world)  # type: ignore[attr-defined,no-untyped-call]  # untyped in torch
        seconds = float((Path(folder) / "seconds").read_text(encoding="utf-8"))
    return 2 * (world - 1) / world * LINK_BYTES / seconds


def single_step() -> float:
    """Return the seconds of the elementwise step of one image, with the threads that are set."""
    learner, batch = make_learner(PRESET, LABELS, head="elementwise"), make_batch(1, LABELS)
    train_step(learner, batch, 1)
    return statistics.median(stopwatch(lambda: train_step(learner, batch, 1))[0] for _ in range(3))


def main() -> None:
    """Measure one process, predict the steps with more processes, and measure them."""
    cores = os.cpu_count() or 1
    costs = {
        head: count_cost(PRESETS[PRESET].config.with_overrides({"model.head": head}), LABELS)
        for head in ("elementwise", "mlp")
    }
    torch.set_num_threads(1)
    numbers = torch.zeros(50_000_000)
    numbers.add_(1)
    memory = 2 * 4 * numbers.numel() / statistics.median(stopwatch(lambda: numbers.add_(1))[0] for _ in range(5))
    step = single_step()
    update = predict_step(costs["elementwise"], Hardware(1, 1, 1, memory), 0).update
    flops = 3 * costs["elementwise"].flops / (step - update)
    print(
        f"one thread: {flops / 1e9:.0f} GFLOP/s, {memory / 1e9:.1f} GB/s; {cores} cores, {IMAGES} images a step",
        flush=True,
    )
    for world in WORKERS:
        share = cores / world  # threads of a process
        speed = link(world) if world > 1 else float("inf")
        for head, cost in costs.items():
            machine = Hardware(world, flops * share, speed, memory * min(1, share), overlap=0.0)
            predicted = predict_step(cost, machine, IMAGES / world).total
            measured = worker_seconds(world, Shape(PRESET, LABELS, IMAGES), head)
            print(
                f"  {world} workers, {head:12s} predicted {predicted:6.2f} s  measured {measured:6.2f} s  {predicted / measured:5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
