"""What a rank tells while it runs: signs of life to the driver, gauges to Ray's metrics, and what the object store holds."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, TypeVar

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
from ray.util.metrics import Gauge
from ray.util.queue import Queue

T = TypeVar("T")

WAITING, DONE = "waiting for data", "done"
# Bytes: a new process of Ray on a full disk ends when it first writes to its log, and Ray tries again for ever
_LEAST_FREE = 32 * 2**20
_STORE_SECONDS = 1.0  # between two looks at the object store; a block stays there for longer

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


def _own_node() -> dict[str, Any]:
    here = ray.get_runtime_context().get_node_id()
    return next(node for node in ray.nodes() if node["NodeID"] == here)


def _is_full(folder: str) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LEAST_FREE
    except OSError:  # it is away, as when Ray is stopped; that ends the run by other means
        return False


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


class Pulse:
    """Sends signs of life of one rank from a thread, so that they come while the rank computes or waits.

    A beat is an event of kind `beat`: rank, node (address), node_id, pid, epoch, step (batches taken of the epoch), doing,
    idle: seconds since the rank last took or finished something, and full: Ray's folder on the node where its disk has no room, else None.

    Args:
        events: the driver's queue.
        rank: this rank.
        seconds: between two beats.
    """

    def __init__(self, events: Queue, rank: int, seconds: float) -> None:
        node = _own_node()
        self._who = {
            "kind": "beat",
            "rank": rank,
            "node": node["NodeManagerAddress"],
            "node_id": node["NodeID"],
            "pid": os.getpid(),
        }
        self._events, self._seconds = events, seconds
        own: Any = ray._private.worker._global_node
        self._folder: str = own.get_session_dir_path()
        self._state: tuple[int, int, str, float] = (0, 0, "starting", time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Says goodbye: a rank that has ended, well or not, does not hang."""
        self._stop.set()
        self._thread.join()
        self.note(DONE)
        self._send()

    def note(self, doing: str) -> None:
        """Notes what the rank begins to do."""
        epoch, step, _, _ = self._state
        self._state = (epoch, step, doing, time.monotonic())

    def watch(self, batches: Iterator[T], epoch: int, doing: str, first_step: int = 1) -> Iterator[T]:
        """The same batches; notes when one is waited for, and that the rank is `doing` its work on it."""
        for step in count(first_step):
            self._state = (epoch, step, WAITING, time.monotonic())
            batch = next(batches, None)
            if batch is None:
                self.note("ending the epoch")
                return
            self.note(doing)
            yield batch

    def _run(self) -> None:
        while True:
            self._send()
            if self._stop.wait(self._seconds):
                return

    def _send(self) -> None:
        epoch, step, doing, since = self._state
        full = self._folder if _is_full(self._folder) else None
        now = {"epoch": epoch, "step": step, "doing": doing, "idle": time.monotonic() - since, "full": full}
        put: Any = self._events.actor.put_nowait  # not awaited: the driver's pace is not the rank's
        put.remote({**self._who, **now})


class StoreMeter:
    """Watches, from a thread, what the object stores of all nodes hold; use as a context.

    Ray keeps no peak, so the bytes in use are read once a second (one call to a node, 1 to 2 ms); what was spilled is a counter.
    """

    def __init__(self, seconds: float = _STORE_SECONDS) -> None:
        node = _own_node()
        self._channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
        self._stub = node_manager_pb2_grpc.NodeManagerServiceStub(self._channel)
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-meter", daemon=True)
        self._peak = 0
        self._spilled: list[int] = []  # at the first and the last look

    def __enter__(self) -> StoreMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._channel.close()

    @property
    def peak_bytes(self) -> int:
        """Most bytes in use at one of the looks so far."""
        return self._peak

    @property
    def spilled_bytes(self) -> int:
        """Bytes written to disk since this meter was made, because the stores were full."""
        return self._spilled[-1] - self._spilled[0] if self._spilled else 0

    def _read(self) -> tuple[int, int]:
        messages: Any = node_manager_pb2
        request = messages.FormatGlobalMemoryInfoRequest(include_memory_info=False)
        stats = self._stub.FormatGlobalMemoryInfo(request, timeout=_STORE_SECONDS * 10).store_stats
        return int(stats.object_store_bytes_used), int(stats.spilled_bytes_total)

    def _run(self) -> None:
        while True:
            try:
                used, spilled = self._read()
                self._peak = max(self._peak, used)
                self._spilled = [*self._spilled[:1], spilled]
            except grpc.RpcError:
                pass  # a node is being lost; the run goes on or ends by other means, and the next look counts again
            if self._stop.wait(self._seconds):
                return
