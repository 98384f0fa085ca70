"""Semantic attention beside the direct form of its definition: time and memory, forward and backward, three levels of a 448-pixel image.

    python -m tests.benchmarks.attention

Both forms get the same features and semantics, take turns, and show medians. Memory is the most that tensors hold above the start.

Everything runs twice, in separate processes: as Python starts, and with THP_MEM_ALLOC_ENABLE=1, as training workers run. With it, large
tensors come in pages of 2 MB, and the direct form, which allocates gigabytes in each pass, takes less than half its time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from msrn_ray.model.semantic_attention import SemanticAttention

from .measure import Phases, alternate, peak_bytes, stopwatch

POSITIONS, WIDTH = (784, 196, 49), 512  # layer2, layer3, layer4 at 448 pixels
SHAPES = {"VOC": (4, 20, 4), "COCO": (2, 80, 4), "NUS-WIDE": (2, 81, 4), "COCO, 800 labels": (2, 800, 40)}  # B, C, G
ROUNDS = 7


def direct(levels: list[Tensor], semantics: Tensor) -> Tensor:
    """Return the definition: softmax over positions of q P, then the weighted sum of P."""
    pooled = []
    for features in levels:
        weight = (features[:, :, None] * semantics).softmax(1)  # [B,N,Q,D]
        pooled.append((weight * features[:, :, None]).sum(1))
    return torch.cat(pooled, 2)


class Problem:
    """Features, semantics and a gradient of one shape."""

    def __init__(self, batch: int, vectors: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.levels = [torch.randn(batch, n, WIDTH, generator=generator, requires_grad=True) for n in POSITIONS]
        self.semantics = torch.randn(vectors, WIDTH, generator=generator, requires_grad=True)
        self.grad = torch.randn(batch, vectors, WIDTH * len(POSITIONS), generator=generator)

    def run(self, form: Callable[[list[Tensor], Tensor], Tensor]) -> Phases:
        """Return the seconds of forward and backward."""
        output: list[Tensor] = []
        times = stopwatch(
            lambda: output.append(form(self.levels, self.semantics)),
            lambda: output[0].backward(self.grad),
        )
        for leaf in (*self.levels, self.semantics):
            leaf.grad = None
        return times


def roofline(problem: Problem) -> tuple[float, float, float, float]:
    """Return the work that no exact form can avoid, on all threads.

    Returns:
        how many numbers go through 2^x, two passes of [B,N,Q,D]; seconds of that from the cache; bytes of inputs, outputs and
        gradients, each touched once; seconds of copying as many bytes.
    """
    inputs = sum(level.numel() for level in problem.levels)
    exps = 2 * inputs * len(problem.semantics)
    # P in both passes and its gradient; o and its gradient; q and its gradient
    moved = 4 * (3 * inputs + 2 * problem.grad.numel() + 2 * problem.semantics.numel())
    cached, out = torch.randn(2**18), torch.empty(2**18)
    large, copy = torch.randn(2**25), torch.empty(2**25)  # 128 MiB, beyond any cache
    repeats = 50
    times = alternate(
        {
            "exp2": lambda: stopwatch(lambda: [torch.exp2(cached, out=out) for _ in range(repeats)]),
            "copy": lambda: stopwatch(lambda: copy.copy_(large)),
        },
        ROUNDS,
    )
    exp_seconds, copy_seconds = times["exp2"][0] / (repeats * len(cached)), times["copy"][0] / (8 * len(large))
    return exps, exps * exp_seconds, moved, moved * copy_seconds


def compare() -> None:
    """Print the table of this process."""
    kernels = SemanticAttention()
    print(f"{torch.get_num_threads()} threads, attention kernels {kernels.choose_kernels('on', torch.device('cpu'))}")
    eager = SemanticAttention()
    print(
        f"{'shape':18s}{'form':10s}{'forward':>10s}{'backward':>10s}{'both':>10s}{'ratio':>8s}{'memory':>11s}{'ratio':>8s}"
    )
    for name, (batch, labels, groups) in SHAPES.items():
        problem = Problem(batch, labels + groups)
        forms: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
            "direct": direct,
            "tiled": eager,
            "compiled": kernels,
        }
        if labels > 100:  # the direct form would need more than 10 GB
            del forms["direct"]
        times = alternate({form: partial(problem.run, run) for form, run in forms.items()}, ROUNDS)
        memory = {form: peak_bytes(partial(problem.run, run)) for form, run in forms.items()}
        base = "direct" if "direct" in forms else "tiled"
        for form, (forward, backward) in times.items():
            ratio = sum(times[base]) / (forward + backward)
            print(
                f"{name:18s}{form:10s}{forward * 1e3:7.1f} ms{backward * 1e3:7.1f} ms{(forward + backward) * 1e3:7.1f} ms"
                f"{ratio:7.1f}x{memory[form] / 2**20:7.1f} MiB{memory[base] / memory[form]:7.1f}x"
            )
        exps, exp_seconds, moved, copy_seconds = roofline(problem)
        print(
            f"{name:18s}floor: {exps / 1e6:.0f} M exp2 in {exp_seconds * 1e3:.1f} ms, {moved / 2**20:.0f} MiB moved in"
            f" {copy_seconds * 1e3:.1f} ms; compiled takes {sum(times['compiled']) / (exp_seconds + copy_seconds):.2f} times both;"
            f" its memory is {memory['compiled'] / (4 * problem.grad.numel()):.1f} times the output's",
            flush=True,
        )


def main() -> None:
    for pages, setting in (("as Python starts", "0"), ("large pages, as in training workers", "1")):
        print(f"== {pages}", flush=True)
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": setting}
        program = "from tests.benchmarks.attention import compare; compare()"
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)


if __name__ == "__main__":
    main()
