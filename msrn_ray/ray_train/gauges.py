"""Gauges of each rank on Ray's Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ray.util.metrics import Gauge

from ..training.epoch import Progress

GAUGES = {  # metric of a run -> name and description of its gauge
    "loss": ("msrn_train_loss", "Training loss since the last report, mean over ranks"),
    "images_per_second": ("msrn_images_per_second", "Training images per second over all ranks"),
    "data_wait_fraction": (
        "msrn_data_wait_fraction",
        "Fraction of the training time spent waiting for images, mean over ranks",
    ),
    "epoch": ("msrn_epoch", "Epoch in training, from 1"),
    "bad_images": ("msrn_bad_images", "Images that this rank could not decode"),
    "gpu_memory_bytes": ("msrn_gpu_memory_bytes", "Peak bytes of this rank's tensors on its GPU"),
}
EPOCH_GAUGES = {  # set at an epoch's end
    "val/mAP": ("msrn_val_map", "Mean average precision on val after the last epoch"),
    "train/first_batch_seconds": ("msrn_first_batch_seconds", "Wait for the first batch of the last epoch"),
    "train/epoch_gap_seconds": ("msrn_epoch_gap_seconds", "From an epoch's last step to the next one's first batch"),
    "train/object_store_peak_bytes": ("msrn_object_store_peak_bytes", "Peak bytes in all object stores"),
    "train/object_store_spilled_bytes": (
        "msrn_object_store_spilled_bytes",
        "Bytes that all object stores wrote to disk",
    ),
}


class Gauges:
    """The gauges of one rank, on the Prometheus port of its node, with the tags `run` and `rank`."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Set the given `GAUGES` and `EPOCH_GAUGES`; a gauge appears when it is first set."""
        for metric, value in values.items():
            if metric not in self._gauges:
                name, description = (GAUGES | EPOCH_GAUGES)[metric]
                self._gauges[metric] = Gauge(name, description, tag_keys=("run", "rank"))
            self._gauges[metric].set(value, self._tags)

    def set_progress(self, progress: Progress, epoch: int, num_bad: int, device: torch.device) -> None:
        """Set the gauges of a check within epoch `epoch` (1-based), in which this rank could not decode `num_bad` images so far."""
        self.set(
            {
                "loss": progress.loss,
                "images_per_second": progress.images_per_second,
                "data_wait_fraction": progress.data_wait_fraction,
                "epoch": epoch,
                "bad_images": num_bad,
            }
        )
        if device.type == "cuda":
            self.set({"gpu_memory_bytes": torch.cuda.max_memory_allocated(device)})

    def set_epoch(self, metrics: Mapping[str, float]) -> None:
        """Set those of `EPOCH_GAUGES` that the metrics of an epoch hold."""
        self.set({name: metrics[name] for name in EPOCH_GAUGES if name in metrics})
