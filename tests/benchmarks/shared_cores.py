"""What threads that sleep while they wait are worth to a train worker: `python -m tests.benchmarks.shared_cores`.

A training step in a process of its own, with as many threads as there are cores: alone, and beside as many processes that compute without
end (as decoding does). OpenMP's threads spin for a while before they sleep; train workers have them sleep at once (`trainer.run_config`).
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
_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # as long as there is who measures


def step_milliseconds(size: int) -> float:
    """Median of some steps of a ResNet-50 over 10 images."""
    torch.set_num_threads(CORES)
    network = torchvision.models.resnet50().train()
    images = torch.randn(10, 3, size, size)
    seconds = [stopwatch(lambda: network(images).sum().backward())[0] for _ in range(STEPS)]
    return 1000 * statistics.median(seconds[2:])


def measured(policy: str, size: int) -> tuple[float]:
    """`step_milliseconds` of a process with a policy."""
    words = [sys.executable, "-m", "tests.benchmarks.shared_cores", str(size)]
    told = subprocess.run(words, env=os.environ | POLICIES[policy], stdout=subprocess.PIPE, check=True).stdout
    return (float(told),)


def main() -> None:
    """Both policies by turns, and their medians."""
    print(f"ms a step of ResNet-50, 10 images, {CORES} threads on {CORES} cores, medians of {ROUNDS} by turns")
    for beside in (0, CORES):
        busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(beside)]
        try:
            for size in SIZES:
                ((spin,), (sleep,)) = alternate(
                    {policy: partial(measured, policy, size) for policy in POLICIES}, ROUNDS
                ).values()
                print(
                    f"{size} px, beside {beside} busy: spin {spin:.0f}, sleep {sleep:.0f}, sleep/spin {sleep / spin:.2f}"
                )
        finally:
            for process in busy:
                process.kill()


if __name__ == "__main__":
    print(step_milliseconds(int(sys.argv[1]))) if len(sys.argv) > 1 else main()
