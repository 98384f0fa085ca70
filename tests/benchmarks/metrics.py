"""Time of all metrics on a split of the size of COCO val2014, beside scikit-learn's AP in the same run.

    python -m tests.benchmarks.metrics

scikit-learn computes only the AP of each class, with a call per class. MultiLabelMetrics computes everything it reports. Both get the same
scores on the CPU. Times are the best of a few runs, so that other load on the machine counts less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from sklearn.metrics import average_precision_score

from msrn_ray.training.metrics import MultiLabelMetrics

NUM_ROWS, NUM_CLASSES = 40_137, 80  # val2014 without the images that have no label
NUM_RUNS = 5
T = TypeVar("T")


def best_time(function: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds of the fastest run, and what the last run returned."""
    times = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> None:
    rng = np.random.default_rng(0)
    target = (rng.random((NUM_ROWS, NUM_CLASSES)) < 0.036).astype(np.int8)  # 2.9 labels per image, as in COCO
    logits = 2 * rng.standard_normal((NUM_ROWS, NUM_CLASSES)) - 4 + 5 * target
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)

    metrics = MultiLabelMetrics(NUM_CLASSES)
    start = time.perf_counter()
    metrics.update(scores, target)
    update_seconds = time.perf_counter() - start
    ours, result = best_time(metrics.compute)
    theirs, expected = best_time(
        lambda: [average_precision_score(target[:, c], scores[:, c]) for c in range(NUM_CLASSES)]
    )
    print(f"{NUM_ROWS} x {NUM_CLASSES} scores, best of {NUM_RUNS}")
    print(f"update                           {update_seconds:7.3f} s")
    print(f"compute, all metrics             {ours:7.3f} s")
    print(f"scikit-learn, AP of each class   {theirs:7.3f} s, {theirs / ours:.1f} times as long")
    print(f"largest difference in AP         {np.abs(np.subtract(result['AP'], expected)).max():.1e}")


if __name__ == "__main__":
    main()
