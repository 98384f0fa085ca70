"""Gauges of each rank on Ray's Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

GAUGES = {  # metric of a run -> name and description of its gauge
    "loss": ("msrn_train_loss", "Training loss since the last report, mean over ranks"),
    "images_per_second": ("msrn_images_per_second", "Training images a second over all ranks"),
    "data_wait_fraction": (
        "msrn_data_wait_fraction",
        "Part of the training time spent waiting for images, mean over ranks",
    ),
    "epoch": ("msrn_epoch", "Epoch that is trained, from 1"),
    "bad_images": ("msrn_bad_images", "Images that this rank could not decode"),
    "gpu_memory_bytes": ("msrn_gpu_memory_bytes", "Most memory that tensors of this rank held on its GPU"),
}
EPOCH_GAUGES = {  # the same, of what is known at an epoch's end
    "val/mAP": ("msrn_val_map", "Mean average precision on val after the last epoch"),
    "train/first_batch_seconds": ("msrn_first_batch_seconds", "Wait for the first batch of the last epoch"),
    "train/epoch_gap_seconds": ("msrn_epoch_gap_seconds", "From an epoch's last step to the next one's first batch"),
    "train/object_store_peak_bytes": ("msrn_object_store_peak_bytes", "Most that all object stores held"),
    "train/object_store_spilled_bytes": ("msrn_object_store_spilled_bytes", "What all object stores wrote to disk"),
}


class Gauges:
    """The gauges of one rank, on the Prometheus port of its node, with the tags `run` and `rank`."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Sets some of `GAUGES` and `EPOCH_GAUGES`; a gauge appears when it is first set."""
        for metric, value in values.items():
            if metric not in self._gauges:
                name, description = (GAUGES | EPOCH_GAUGES)[metric]
                self._gauges[metric] = Gauge(name, description, tag_keys=("run", "rank"))
            self._gauges[metric].set(value, self._tags)
