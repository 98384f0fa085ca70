"""How much a train worker gains if its waiting threads sleep: `python -m tests.benchmarks.shared_cores`.

A training step runs in a new process with one thread per core: alone, and beside one busy process per core, which stand for decoding.
OpenMP's threads spin for a while before they sleep. In train workers they sleep at once (see `ray_train.torch_trainer`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import partial

import torch
import torchvision

from .measure import alternate, stopwatch

CORES = os.cpu_count() or 1
POLICIES = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "passive"}}
ROUNDS, STEPS = 3, 8
SIZES = (64, 224)
_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # until the benchmark ends


def step_milliseconds(size: int) -> float:
    """Return the median milliseconds of a few steps of a ResNet-50 over 10 images."""
    torch.set_num_threads(CORES)
    network = torchvision.models.resnet50().train()
    images = torch.randn(10, 3, size, size)
    seconds = [stopwatch(lambda: network(images).sum().backward())[0] for _ in range(STEPS)]
    return 1000 * statistics.median(seconds[2:])


def measured(policy: str, size: int) -> tuple[float]:
    """Return `step_milliseconds` of a new process with a policy."""
    command = [sys.executable, "-m", "tests.benchmarks.shared_cores", str(size)]
    output = subprocess.run(command, env=os.environ | POLICIES[policy], stdout=subprocess.PIPE, check=True).stdout
    return (float(output),)


def main() -> None:
    """Measure both policies in turns, and print their medians."""
    print(f"ms per step of ResNet-50, 10 images, {CORES} threads on {CORES} cores, medians of {ROUNDS} turns")
    for num_busy in (0, CORES):
        busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(num_busy)]
        try:
            for size in SIZES:
                ((spin,), (sleep,)) = alternate(
                    {policy: partial(measured, policy, size) for policy in POLICIES}, ROUNDS
                ).values()
                print(
                    f"{size} px, beside {num_busy} busy: spin {spin:.0f}, sleep {sleep:.0f}, sleep/spin {sleep / spin:.2f}"
                )
        finally:
            for process in busy:
                process.kill()


if __name__ == "__main__":
    print(step_milliseconds(int(sys.argv[1]))) if len(sys.argv) > 1 else main()
